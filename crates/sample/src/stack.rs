//! The LoRAs of a run, read, named and put on the transformer's layers, one on top of the other.

use std::path::{Path, PathBuf};

use artifacts::digest_file;
use engine::Factors;
use lora::{AlphaSource, LoraFile, Target};
use mmdit::MmditConfig;

use crate::error::SampleError;
use crate::parameters::LoraUse;

/// What the LoRA that the run itself trained is called.
const TRAINED: &str = "trained";

/// A LoRA to apply.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraChoice {
    /// What it is called in the pictures' parameters.
    pub name: String,
    /// The file, in diffusers or kohya form.
    pub path: PathBuf,
    /// Multiplies its own alpha / rank.
    pub scale: f64,
}

impl LoraChoice {
    /// The LoRA of the run's own training.
    pub fn trained(path: PathBuf, scale: f64) -> Self {
        Self {
            name: TRAINED.to_owned(),
            path,
            scale,
        }
    }

    /// A file, called by its name without the ending.
    pub fn file(path: &Path, scale: f64) -> Self {
        let name = path.file_stem().unwrap_or_default();
        Self {
            name: name.to_string_lossy().into_owned(),
            path: path.to_owned(),
            scale,
        }
    }
}

/// LoRAs that were read and fit the transformer.
#[derive(Clone, Debug)]
pub struct LoraStack {
    files: Vec<LoraFile>,
    /// Names, scales and digests, in the order in which they are applied.
    pub uses: Vec<LoraUse>,
    /// A sentence for each file whose strength had to be guessed.
    pub notes: Vec<String>,
}

impl LoraStack {
    /// No LoRAs: the base alone.
    pub fn none() -> Self {
        Self {
            files: Vec::new(),
            uses: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Reads the files and checks them against the transformer's layers.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, or holds a key that leads to no layer of this transformer.
    pub fn read(choices: &[LoraChoice], config: &MmditConfig) -> Result<Self, SampleError> {
        let targets: Vec<Target> = config
            .linears()
            .into_iter()
            .map(|layer| Target::new(layer.path, layer.in_features, layer.out_features))
            .collect();
        let mut stack = Self::none();
        for choice in choices {
            let file = LoraFile::read(&choice.path, &targets)?;
            if file.alpha_source == AlphaSource::AssumedRank {
                stack.notes.push(format!(
                    "{} says no alpha; it was applied with alpha = rank, as other programs do",
                    choice.name
                ));
            }
            stack.uses.push(LoraUse {
                name: choice.name.clone(),
                scale: choice.scale,
                digest: digest_file(&choice.path)?.to_string(),
            });
            stack.files.push(file);
        }
        Ok(stack)
    }

    /// The factors, file by file, as an engine takes them.
    pub fn factors(&self) -> Vec<Factors> {
        let files = self.files.iter().zip(&self.uses);
        files
            .flat_map(|(file, lora)| {
                file.modules.iter().map(|(path, module)| Factors {
                    path: path.clone(),
                    rank: module.rank,
                    scale: (f64::from(module.scale()) * lora.scale) as f32,
                    a: module.a.clone(),
                    b: module.b.clone(),
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use artifacts::{Dtype, TensorToWrite, write_safetensors};
    use std::collections::BTreeMap;

    const QUERY: &str = "transformer_blocks.0.attn.to_q";

    fn lora_file(dir: &Path, name: &str, module: &str) -> PathBuf {
        let path = dir.join(name);
        let keys = ["A", "B"].map(|half| format!("transformer.{module}.lora_{half}.weight"));
        let zeros = [0; 4 * 2 * 16];
        let tensor = |key, shape| TensorToWrite {
            name: key,
            dtype: Dtype::F32,
            shape,
            bytes: &zeros,
        };
        let tensors = [tensor(&keys[0], &[2, 16]), tensor(&keys[1], &[16, 2])];
        write_safetensors(&path, &tensors, &BTreeMap::new()).expect("written");
        path
    }

    #[test]
    fn loras_on_one_layer_are_stacked_with_their_own_scales() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = lora_file(dir.path(), "knight.safetensors", QUERY);
        let choices = [
            LoraChoice::trained(path.clone(), 1.0),
            LoraChoice::file(&path, 0.25),
        ];
        let stack = LoraStack::read(&choices, &MmditConfig::tiny()).expect("valid");
        let factors = stack.factors();
        assert!(factors.iter().all(|factors| factors.path == QUERY));
        let scales: Vec<f32> = factors.iter().map(|factors| factors.scale).collect();
        assert_eq!(scales, [1.0, 0.25]);
        assert_eq!(factors[0].a, [0.0; 32]);
        let names: Vec<&str> = stack.uses.iter().map(|lora| lora.name.as_str()).collect();
        assert_eq!(names, ["trained", "knight"]);
        assert_eq!(stack.uses[0].digest, stack.uses[1].digest);
        assert_eq!(stack.notes.len(), 2, "neither file says its alpha");
    }

    #[test]
    fn a_key_that_leads_to_no_layer_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let module = "transformer_blocks.7.attn.to_q";
        let path = lora_file(dir.path(), "other.safetensors", module);
        let error = LoraStack::read(&[LoraChoice::file(&path, 1.0)], &MmditConfig::tiny())
            .expect_err("the model has no block 7")
            .to_string();
        assert!(error.contains(module), "{error}");
    }
}
