//! From the keys of a file to the modules of the model.
//!
//! A key is a stem and a role (`….lora_A.weight`). A stem is a prefix that tells the program it comes from, and a path:
//! either a diffusers path or one of Black Forest Labs' reference code, with dots or (kohya) with underscores for dots.
//!
//! | Black Forest Labs | diffusers |
//! |---|---|
//! | `double_blocks.i.{img,txt}_attn.qkv` | `transformer_blocks.i.attn.{to_q,to_k,to_v}`, `attn.add_{q,k,v}_proj` |
//! | `double_blocks.i.{img,txt}_attn.proj` | `…attn.to_out.0`, `attn.to_add_out` |
//! | `double_blocks.i.{img,txt}_mlp.{0,2}` | `…{ff,ff_context}.net.{0.proj,2}` |
//! | `double_blocks.i.{img,txt}_mod.lin` | `…{norm1,norm1_context}.linear` |
//! | `single_blocks.i.linear1` | `single_transformer_blocks.i.attn.{to_q,to_k,to_v}`, `proj_mlp` |
//! | `single_blocks.i.{linear2,modulation.lin}` | `…{proj_out,norm.linear}` |
//! | `img_in`, `txt_in` | `x_embedder`, `context_embedder` |
//! | `{time,vector,guidance}_in.{in,out}_layer` | `time_text_embed.{timestep,text,guidance}_embedder.linear_{1,2}` |
//! | `final_layer.linear`, `final_layer.adaLN_modulation.1` | `proj_out`, `norm_out.linear` with its halves exchanged |

use std::collections::BTreeMap;

use crate::Target;

/// Prefixes that may stand before a path, outermost first.
const PREFIXES: [&str; 5] = [
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
];

const SUFFIXES: [(&str, Role); 6] = [
    (".lora_A.weight", Role::A),
    (".lora_A.default.weight", Role::A),
    (".lora_down.weight", Role::A),
    (".lora_B.weight", Role::B),
    (".lora_B.default.weight", Role::B),
    (".lora_up.weight", Role::B),
];

/// What a tensor is to its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    A,
    B,
    Alpha,
}

/// Cuts a key into its stem and its role.
pub(crate) fn split_key(key: &str) -> Option<(&str, Role)> {
    let alpha = key.strip_suffix(".alpha").map(|stem| (stem, Role::Alpha));
    alpha.or_else(|| {
        SUFFIXES
            .iter()
            .find_map(|(suffix, role)| Some((key.strip_suffix(suffix)?, *role)))
    })
}

/// The key of the other factor, spelled as this one is.
pub(crate) fn other_half(key: &str) -> String {
    for (ours, others) in [(".lora_A.", ".lora_B."), (".lora_down.", ".lora_up.")] {
        if key.contains(ours) {
            return key.replace(ours, others);
        }
        if key.contains(others) {
            return key.replace(others, ours);
        }
    }
    key.to_owned()
}

/// The kind of adapter that a key shows, if it is one that is known and cannot be used.
pub(crate) fn unsupported_kind(key: &str) -> Option<&'static str> {
    let kinds = [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("lokr_", "LoKr"),
        ("hada_", "LoHa"),
        ("lora_B.bias", "LoRA with biases"),
        ("lora_mid", "LoCon"),
    ];
    let text_encoder = key.starts_with("text_encoder") || key.starts_with("lora_te");
    if text_encoder {
        return Some("LoRA on a text encoder");
    }
    kinds
        .iter()
        .find(|(mark, _)| key.contains(mark))
        .map(|(_, kind)| *kind)
}

/// The modules that the two factors of one stem belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Destination<'t> {
    /// One module.
    One(&'t Target),
    /// One module whose halves of output rows are exchanged.
    Swapped(&'t Target),
    /// Several modules whose outputs follow one another.
    Fused {
        /// In the order of rows.
        parts: Vec<&'t Target>,
        /// Path of a part that may follow, if the file has rows for it; absent if all parts are required.
        optional: Option<Optional<'t>>,
    },
}

/// A last part of a fused layer that adapters may leave out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Optional<'t> {
    /// The module, if the model lets it be adapted.
    pub(crate) target: Option<&'t Target>,
}

/// The model's modules by every name that a file may give them.
#[derive(Debug)]
pub(crate) struct Modules<'t> {
    by_path: BTreeMap<&'t str, &'t Target>,
    by_flat_path: BTreeMap<String, &'t Target>,
}

impl<'t> Modules<'t> {
    pub(crate) fn new(targets: &'t [Target]) -> Self {
        Self {
            by_path: targets
                .iter()
                .map(|target| (target.path.as_str(), target))
                .collect(),
            by_flat_path: targets
                .iter()
                .map(|target| (flat(&target.path), target))
                .collect(),
        }
    }

    /// Where a stem leads to, if anywhere.
    pub(crate) fn resolve(&self, stem: &str) -> Option<Destination<'t>> {
        let path = strip_prefixes(stem);
        if let Some(target) = self.by_path.get(path) {
            return Some(Destination::One(target));
        }
        let flat_path = flat(path);
        if let Some(target) = self.by_flat_path.get(&flat_path) {
            return Some(Destination::One(target));
        }
        self.resolve_reference(&flat_path)
    }

    /// The module paths most like a stem, nearest first.
    pub(crate) fn nearest(&self, stem: &str) -> Vec<String> {
        let wanted = flat(strip_prefixes(stem));
        let mut scored: Vec<(f64, &str)> = self
            .by_flat_path
            .iter()
            .map(|(flat_path, target)| {
                (
                    strsim::normalized_levenshtein(&wanted, flat_path),
                    target.path.as_str(),
                )
            })
            .filter(|(score, _)| *score > 0.5)
            .collect();
        scored.sort_by(|left, right| right.0.total_cmp(&left.0).then(left.1.cmp(right.1)));
        scored
            .into_iter()
            .take(3)
            .map(|(_, path)| path.to_owned())
            .collect()
    }

    /// A name of Black Forest Labs' code, flattened.
    fn resolve_reference(&self, name: &str) -> Option<Destination<'t>> {
        let find = |path: String| self.by_path.get(path.as_str()).copied();
        if let Some((index, name)) = block(name, "double_blocks_") {
            let path = |tail: &str| find(format!("transformer_blocks.{index}.{tail}"));
            let tail = match name {
                "img_attn_qkv" => {
                    let parts = vec![path("attn.to_q")?, path("attn.to_k")?, path("attn.to_v")?];
                    return Some(Destination::Fused {
                        parts,
                        optional: None,
                    });
                }
                "txt_attn_qkv" => {
                    let parts = vec![
                        path("attn.add_q_proj")?,
                        path("attn.add_k_proj")?,
                        path("attn.add_v_proj")?,
                    ];
                    return Some(Destination::Fused {
                        parts,
                        optional: None,
                    });
                }
                "img_attn_proj" => "attn.to_out.0",
                "txt_attn_proj" => "attn.to_add_out",
                "img_mlp_0" => "ff.net.0.proj",
                "img_mlp_2" => "ff.net.2",
                "txt_mlp_0" => "ff_context.net.0.proj",
                "txt_mlp_2" => "ff_context.net.2",
                "img_mod_lin" => "norm1.linear",
                "txt_mod_lin" => "norm1_context.linear",
                _ => return None,
            };
            return path(tail).map(Destination::One);
        }
        if let Some((index, name)) = block(name, "single_blocks_") {
            let path = |tail: &str| find(format!("single_transformer_blocks.{index}.{tail}"));
            let tail = match name {
                "linear1" => {
                    let parts = vec![path("attn.to_q")?, path("attn.to_k")?, path("attn.to_v")?];
                    let optional = Some(Optional {
                        target: path("proj_mlp"),
                    });
                    return Some(Destination::Fused { parts, optional });
                }
                "linear2" => "proj_out",
                "modulation_lin" => "norm.linear",
                _ => return None,
            };
            return path(tail).map(Destination::One);
        }
        let path = match name {
            "img_in" => "x_embedder",
            "txt_in" => "context_embedder",
            "time_in_in_layer" => "time_text_embed.timestep_embedder.linear_1",
            "time_in_out_layer" => "time_text_embed.timestep_embedder.linear_2",
            "vector_in_in_layer" => "time_text_embed.text_embedder.linear_1",
            "vector_in_out_layer" => "time_text_embed.text_embedder.linear_2",
            "guidance_in_in_layer" => "time_text_embed.guidance_embedder.linear_1",
            "guidance_in_out_layer" => "time_text_embed.guidance_embedder.linear_2",
            "final_layer_linear" => "proj_out",
            "final_layer_adaLN_modulation_1" => {
                return find("norm_out.linear".to_owned()).map(Destination::Swapped);
            }
            _ => return None,
        };
        find(path.to_owned()).map(Destination::One)
    }
}

fn strip_prefixes(stem: &str) -> &str {
    PREFIXES.iter().fold(stem, |stem, prefix| {
        stem.strip_prefix(prefix).unwrap_or(stem)
    })
}

fn flat(path: &str) -> String {
    path.replace('.', "_")
}

/// `double_blocks_12_img_attn_qkv` → `(12, "img_attn_qkv")`.
fn block<'n>(name: &'n str, prefix: &str) -> Option<(u32, &'n str)> {
    let (index, name) = name.strip_prefix(prefix)?.split_once('_')?;
    Some((index.parse().ok()?, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets() -> Vec<Target> {
        [
            "transformer_blocks.0.attn.",
            "single_transformer_blocks.0.attn.",
        ]
        .iter()
        .flat_map(|block| {
            ["to_q", "to_k", "to_v"].map(|name| Target::new(format!("{block}{name}"), 4, 4))
        })
        .chain([
            Target::new("transformer_blocks.0.attn.to_out.0", 4, 4),
            Target::new("norm_out.linear", 4, 8),
        ])
        .collect()
    }

    #[test]
    fn every_programs_spelling_of_a_module_leads_to_it() {
        let targets = targets();
        let modules = Modules::new(&targets);
        for stem in [
            "transformer.transformer_blocks.0.attn.to_out.0",
            "transformer_blocks.0.attn.to_out.0",
            "base_model.model.transformer_blocks.0.attn.to_out.0",
            "lora_unet_double_blocks_0_img_attn_proj",
            "lora_transformer_transformer_blocks_0_attn_to_out_0",
            "diffusion_model.double_blocks.0.img_attn.proj",
        ] {
            assert_eq!(
                modules.resolve(stem),
                Some(Destination::One(&targets[6])),
                "{stem}"
            );
        }
        assert_eq!(
            modules.resolve("diffusion_model.final_layer.adaLN_modulation.1"),
            Some(Destination::Swapped(&targets[7]))
        );
    }

    #[test]
    fn a_fused_layer_leads_to_its_parts_in_the_order_of_rows() {
        let targets = targets();
        let modules = Modules::new(&targets);
        let parts = vec![&targets[3], &targets[4], &targets[5]];
        let optional = Some(Optional { target: None });
        assert_eq!(
            modules.resolve("lora_unet_single_blocks_0_linear1"),
            Some(Destination::Fused { parts, optional })
        );
        assert_eq!(modules.resolve("lora_unet_single_blocks_1_linear1"), None);
    }

    #[test]
    fn the_other_half_is_spelled_like_the_first() {
        assert_eq!(other_half("x.lora_A.weight"), "x.lora_B.weight");
        assert_eq!(other_half("x.lora_up.weight"), "x.lora_down.weight");
    }

    #[test]
    fn a_mistyped_module_finds_its_neighbours() {
        let targets = targets();
        let nearest = Modules::new(&targets).nearest("transformer.transformer_blocks.0.attn.to_qq");
        assert_eq!(nearest[0], "transformer_blocks.0.attn.to_q");
        assert!(Modules::new(&targets).nearest("vae.decoder").is_empty());
    }
}
