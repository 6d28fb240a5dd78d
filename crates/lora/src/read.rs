//! Reading a LoRA file of any of the formats, checked against the model's modules.

use std::collections::BTreeMap;
use std::path::Path;

use artifacts::SafetensorsFile;

use crate::adapter_metadata::{self, AdapterMetadata};
use crate::keys::{self, Destination, Modules, Role};
use crate::split::split;
use crate::{AlphaSource, LoraError, LoraFile, LoraModule, Target, UnknownKey};

/// The keys of one stem.
#[derive(Debug, Default)]
struct Keys {
    a: Option<String>,
    b: Option<String>,
    alpha: Option<String>,
}

impl Keys {
    fn all(&self) -> impl Iterator<Item = &String> {
        [&self.a, &self.b, &self.alpha].into_iter().flatten()
    }
}

impl LoraFile {
    /// Reads a file and checks it against the modules of the model that may be adapted.
    ///
    /// # Errors
    ///
    /// See [`LoraError`]; above all, any key that leads to no module of `targets`.
    pub fn read(path: &Path, targets: &[Target]) -> Result<Self, LoraError> {
        let reader = Reader {
            path,
            file: SafetensorsFile::open(path)?,
        };
        let mut header = reader.file.metadata().clone();
        header.remove("format");
        let metadata = match header.remove(adapter_metadata::KEY) {
            Some(json) => AdapterMetadata::parse(path, &json)?,
            None => None,
        };
        let modules = Modules::new(targets);
        let (stems, mut unknown) = reader.stems()?;
        let mut destinations = Vec::new();
        for (stem, keys) in &stems {
            match modules.resolve(stem) {
                Some(destination) => destinations.push((stem, keys, destination)),
                None => unknown.extend(keys.all().map(|key| (key.clone(), stem.clone()))),
            }
        }
        if !unknown.is_empty() {
            let keys = unknown
                .into_iter()
                .map(|(key, stem)| UnknownKey {
                    key,
                    nearest: modules.nearest(&stem),
                })
                .collect();
            return Err(LoraError::UnknownKeys {
                path: path.to_path_buf(),
                keys,
            });
        }
        if destinations.is_empty() {
            return Err(LoraError::Empty {
                path: path.to_path_buf(),
            });
        }
        let mut found: BTreeMap<String, (LoraModule, &str)> = BTreeMap::new();
        let mut alpha_source = None;
        for (stem, keys, destination) in destinations {
            let (parts, source) = reader.parts(stem, keys, &destination, metadata.as_ref())?;
            // One module without an alpha is enough to tell of it.
            if alpha_source != Some(AlphaSource::AssumedRank) {
                alpha_source = Some(source);
            }
            for (module_path, module) in parts {
                if let Some((_, first)) = found.insert(module_path.clone(), (module, stem)) {
                    return Err(LoraError::Duplicate {
                        path: path.to_path_buf(),
                        module: module_path,
                        first: first.to_owned(),
                        second: stem.clone(),
                    });
                }
            }
        }
        let modules = found
            .into_iter()
            .map(|(path, (module, _))| (path, module))
            .collect();
        Ok(Self {
            modules,
            metadata: header,
            alpha_source: alpha_source.expect("a file without any stem was refused"),
        })
    }
}

type Stems = BTreeMap<String, Keys>;

struct Reader<'p> {
    path: &'p Path,
    file: SafetensorsFile,
}

impl Reader<'_> {
    /// Keys by stem, and the keys that have none (with the text to look for neighbours of).
    fn stems(&self) -> Result<(Stems, Vec<(String, String)>), LoraError> {
        let mut stems = Stems::new();
        let mut unknown = Vec::new();
        for key in self.file.names() {
            if let Some(kind) = keys::unsupported_kind(key) {
                return Err(LoraError::Unsupported {
                    path: self.path.to_path_buf(),
                    kind,
                    key: key.to_owned(),
                });
            }
            let Some((stem, role)) = keys::split_key(key) else {
                unknown.push((key.to_owned(), key.to_owned()));
                continue;
            };
            let keys = stems.entry(stem.to_owned()).or_default();
            let place = match role {
                Role::A => &mut keys.a,
                Role::B => &mut keys.b,
                Role::Alpha => &mut keys.alpha,
            };
            if let Some(first) = place.replace(key.to_owned()) {
                return Err(LoraError::Duplicate {
                    path: self.path.to_path_buf(),
                    module: stem.to_owned(),
                    first,
                    second: key.to_owned(),
                });
            }
        }
        Ok((stems, unknown))
    }

    /// The modules of one stem, by path.
    fn parts(
        &self,
        stem: &str,
        keys: &Keys,
        destination: &Destination<'_>,
        metadata: Option<&AdapterMetadata>,
    ) -> Result<(Vec<(String, LoraModule)>, AlphaSource), LoraError> {
        let (a_key, b_key) = self.halves(stem, keys)?;
        let in_features = match destination {
            Destination::One(target) | Destination::Swapped(target) => target.in_features,
            Destination::Fused { parts, .. } => parts[0].in_features,
        };
        let (rank, a) = self.matrix(
            a_key,
            |[_, width]| width == in_features,
            || format!("[rank, {in_features}]"),
        )?;
        let b_shape = self.file.info(b_key)?.shape.clone();
        let out_features = match destination {
            Destination::One(target) | Destination::Swapped(target) => vec![target.out_features],
            Destination::Fused { parts, optional } => {
                let mut widths: Vec<usize> = parts.iter().map(|part| part.out_features).collect();
                let required: usize = widths.iter().sum();
                match (optional, b_shape.first()) {
                    (Some(optional), Some(rows)) if *rows > required => {
                        // Without the module's width, its rows are whatever is left.
                        widths.push(
                            optional
                                .target
                                .map_or(rows - required, |target| target.out_features),
                        );
                    }
                    _ => {}
                }
                widths
            }
        };
        let num_rows: usize = out_features.iter().sum();
        let (_, b) = self.matrix(
            b_key,
            |[rows, _]| rows == num_rows,
            || format!("[{num_rows}, rank]"),
        )?;
        if b_shape[1] != rank {
            return Err(LoraError::Rank {
                path: self.path.to_path_buf(),
                module: stem.to_owned(),
                rank_a: rank,
                rank_b: b_shape[1],
            });
        }
        let module_path = match destination {
            Destination::One(target) | Destination::Swapped(target) => Some(target.path.as_str()),
            Destination::Fused { .. } => None,
        };
        let (alpha, source) = self.alpha(keys.alpha.as_deref(), module_path, rank, metadata)?;
        let module = LoraModule::new(alpha, in_features, num_rows, a, b);
        let parts = match destination {
            Destination::One(target) => vec![(target.path.clone(), module)],
            Destination::Swapped(target) => vec![(target.path.clone(), swap_halves(module))],
            Destination::Fused { parts, .. } => {
                let mut paths: Vec<Option<&Target>> = parts.iter().copied().map(Some).collect();
                if let Destination::Fused {
                    optional: Some(optional),
                    ..
                } = destination
                {
                    paths.push(optional.target);
                }
                let has_optional = out_features.len() > parts.len();
                let mut named = Vec::new();
                for (target, part) in
                    paths
                        .into_iter()
                        .zip(split(&module, &out_features, has_optional))
                {
                    match (target, part) {
                        (_, None) => {}
                        (Some(target), Some(part)) => named.push((target.path.clone(), part)),
                        (None, Some(_)) => {
                            return Err(LoraError::UnknownKeys {
                                path: self.path.to_path_buf(),
                                keys: vec![UnknownKey {
                                    key: format!(
                                        "{b_key} (rows {}..{num_rows}: the block's mlp)",
                                        num_rows - out_features[parts.len()]
                                    ),
                                    nearest: Vec::new(),
                                }],
                            });
                        }
                    }
                }
                named
            }
        };
        Ok((parts, source))
    }

    /// Both factors' keys.
    fn halves<'k>(&self, stem: &str, keys: &'k Keys) -> Result<(&'k str, &'k str), LoraError> {
        match (&keys.a, &keys.b) {
            (Some(a), Some(b)) => Ok((a, b)),
            (Some(half), None) | (None, Some(half)) => Err(LoraError::MissingHalf {
                path: self.path.to_path_buf(),
                found: half.clone(),
                missing: keys::other_half(half),
            }),
            (None, None) => Err(LoraError::MissingHalf {
                path: self.path.to_path_buf(),
                found: keys.alpha.clone().unwrap_or_default(),
                missing: format!("{stem}.lora_down.weight"),
            }),
        }
    }

    /// A finite matrix with rows and its number of rows, if its shape is as expected.
    fn matrix(
        &self,
        key: &str,
        fits: impl Fn([usize; 2]) -> bool,
        expected: impl Fn() -> String,
    ) -> Result<(usize, Vec<f32>), LoraError> {
        let shape = &self.file.info(key)?.shape;
        let rows = match shape[..] {
            [rows, columns] if rows > 0 && columns > 0 && fits([rows, columns]) => rows,
            _ => {
                return Err(LoraError::Shape {
                    path: self.path.to_path_buf(),
                    key: key.to_owned(),
                    expected: expected(),
                    found: shape.clone(),
                });
            }
        };
        Ok((rows, self.finite(key)?))
    }

    fn finite(&self, key: &str) -> Result<Vec<f32>, LoraError> {
        let values = self.file.f32(key)?;
        if values.iter().all(|value| value.is_finite()) {
            Ok(values)
        } else {
            Err(LoraError::NotFinite {
                path: self.path.to_path_buf(),
                key: key.to_owned(),
            })
        }
    }

    /// A module's alpha; `module_path` is `None` for a fused layer, which the header's entry knows nothing about.
    fn alpha(
        &self,
        key: Option<&str>,
        module_path: Option<&str>,
        rank: usize,
        metadata: Option<&AdapterMetadata>,
    ) -> Result<(f32, AlphaSource), LoraError> {
        let from_tensor = match key {
            None => None,
            Some(key) => match self.finite(key)?[..] {
                [alpha] => Some(alpha),
                _ => {
                    return Err(LoraError::Shape {
                        path: self.path.to_path_buf(),
                        key: key.to_owned(),
                        expected: "[] (a single number)".to_owned(),
                        found: self.file.info(key)?.shape.clone(),
                    });
                }
            },
        };
        if let (Some(module), Some(metadata)) = (module_path, metadata) {
            let expected = metadata.rank(module);
            if expected != rank {
                return Err(LoraError::MetadataRank {
                    path: self.path.to_path_buf(),
                    module: module.to_owned(),
                    expected,
                    found: rank,
                });
            }
            let alpha = metadata.alpha(module);
            return match from_tensor {
                Some(tensor) if tensor != alpha => Err(LoraError::AlphaConflict {
                    path: self.path.to_path_buf(),
                    module: module.to_owned(),
                    metadata: alpha,
                    tensor,
                }),
                _ => Ok((alpha, AlphaSource::Metadata)),
            };
        }
        Ok(match from_tensor {
            Some(alpha) => (alpha, AlphaSource::Tensors),
            None => (rank as f32, AlphaSource::AssumedRank),
        })
    }
}

/// Exchanges the halves of the output rows: the reference code puts shift before scale, diffusers after it.
fn swap_halves(mut module: LoraModule) -> LoraModule {
    let half = module.b.len() / 2;
    module.b.rotate_left(half);
    module
}

#[cfg(test)]
mod tests;
