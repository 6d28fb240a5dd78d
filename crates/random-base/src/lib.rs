//! Writes a small, complete base of the FLUX architecture whose weights are random: every part that a published base
//! has, in diffusers layout, so that the whole pipeline runs on it before a trained one exists.
//!
//! Its pictures are noise. `model_index.json` says so under [`UNTRAINED_KEY`], diffusers ignores the key.
//!
//! ```text
//! DIR/model_index.json                    written last: a directory without it is an interrupted run
//!     scheduler/scheduler_config.json
//!     transformer/ vae/                   config.json, diffusion_pytorch_model.safetensors (f16)
//!     text_encoder/ text_encoder_2/       config.json, model.safetensors (f16)
//!     tokenizer/ tokenizer_2/             CLIP's and T5's own files
//! ```
//!
//! The same preset and seed give the same bytes ([`write()`]).

#![forbid(unsafe_code)]

mod init;
mod preset;
mod tokenizer_files;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use artifacts::{ArtifactError, Dtype, TensorToWrite, write_atomically, write_safetensors};
use serde_json::Value;
use tensor::ParameterSpec;

pub use crate::init::{Part, initial_values};
pub use crate::preset::{Preset, UnknownPreset};
pub use crate::tokenizer_files::TokenizerFilesError;

/// The key of `model_index.json` that marks a base as untrained.
pub const UNTRAINED_KEY: &str = "_spritelora_untrained";

/// Why no base could be written.
#[derive(Debug, thiserror::Error)]
pub enum RandomBaseError {
    /// The directory holds a base that this program did not make up.
    #[error(
        "{path} holds a base that is not marked as untrained: choose another directory, or remove it yourself"
    )]
    WouldOverwrite {
        /// Its `model_index.json`.
        path: PathBuf,
    },
    /// The tokenizers' files are not there, or not what they should be.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerFilesError),
    /// A directory could not be made.
    #[error("cannot write the base")]
    Directory(#[source] std::io::Error),
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] ArtifactError),
    /// Our own configuration of the transformer was refused.
    #[error(transparent)]
    Transformer(#[from] mmdit::ConfigError),
    /// Our own configuration of the VAE was refused.
    #[error(transparent)]
    Vae(#[from] autoencoder::AutoencoderError),
    /// Our own configuration of a text encoder was refused.
    #[error(transparent)]
    TextEncoder(#[from] text_encoders::EncoderError),
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RandomBase {
    /// Parameters by part (`transformer`, `vae`, `text_encoder`, `text_encoder_2`).
    pub num_parameters: BTreeMap<&'static str, u64>,
    /// Size of all files together.
    pub size_bytes: u64,
}

/// Writes a base into `dir`, which is made if it is not there; an untrained base in it is replaced.
///
/// `tokenizers` holds the published tokenizers' files in `clip/` and `t5/`.
///
/// # Errors
///
/// If `dir` holds a base that is not marked as untrained, a tokenizer's file is missing, or writing fails.
pub fn write(
    dir: &Path,
    preset: Preset,
    seed: u64,
    tokenizers: &Path,
) -> Result<RandomBase, RandomBaseError> {
    let index_path = dir.join("model_index.json");
    refuse_a_trained_base(&index_path)?;
    let tokenizer_files = tokenizer_files::read(tokenizers)?;

    make_dir(dir)?;
    remove_if_there(&index_path)?;
    for (name, bytes) in &tokenizer_files {
        write_file(&dir.join(name), bytes)?;
    }
    write_json(
        &dir.join("scheduler/scheduler_config.json"),
        &preset.scheduler(),
    )?;

    let mut num_parameters = BTreeMap::new();
    let mut write_part = |part: Part, stem: &str, parameters: Vec<ParameterSpec>| {
        num_parameters.insert(part.dir(), tensor::weights::num_parameters(&parameters));
        let path = dir.join(part.dir()).join(format!("{stem}.safetensors"));
        write_weights(&path, part, &parameters, seed)
    };

    let config = write_config(dir, "transformer", &preset.transformer())?;
    let transformer = mmdit::MmditConfig::from_file(&config)?;
    write_part(
        Part::Transformer,
        "diffusion_pytorch_model",
        transformer.parameters(),
    )?;

    let config = write_config(dir, "vae", &preset.vae())?;
    let vae = autoencoder::AutoencoderConfig::from_file(&config)?;
    write_part(Part::Vae, "diffusion_pytorch_model", vae.parameters())?;

    let config = write_config(dir, "text_encoder", &preset.text_encoder())?;
    let clip = text_encoders::ClipConfig::from_file(&config)?;
    write_part(Part::TextEncoder, "model", clip.parameters())?;

    let config = write_config(dir, "text_encoder_2", &preset.text_encoder_2())?;
    let t5 = text_encoders::T5Config::from_file(&config)?;
    let part = Part::TextEncoder2 { d_kv: t5.d_kv };
    write_part(part, "model", t5.parameters())?;

    write_json(&index_path, &preset.model_index())?;
    Ok(RandomBase {
        num_parameters,
        size_bytes: size_below(dir)?,
    })
}

/// Whether `model_index.json` in `base` marks it as untrained; false too if the file cannot be read as JSON.
pub fn is_untrained(base: &Path) -> bool {
    read_json(&base.join("model_index.json")).is_some_and(|index| index[UNTRAINED_KEY] == true)
}

fn read_json(path: &Path) -> Option<Value> {
    serde_json::from_slice(&fs_err::read(path).ok()?).ok()
}

fn refuse_a_trained_base(index_path: &Path) -> Result<(), RandomBaseError> {
    let untrained = read_json(index_path).is_some_and(|index| index[UNTRAINED_KEY] == true);
    if index_path.exists() && !untrained {
        return Err(RandomBaseError::WouldOverwrite {
            path: index_path.to_owned(),
        });
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<(), RandomBaseError> {
    match fs_err::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(RandomBaseError::Directory(error))
        }
        _ => Ok(()),
    }
}

fn make_dir(dir: &Path) -> Result<(), RandomBaseError> {
    fs_err::create_dir_all(dir).map_err(RandomBaseError::Directory)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), RandomBaseError> {
    if let Some(dir) = path.parent() {
        make_dir(dir)?;
    }
    write_atomically(path, |file| file.write_all(bytes))?;
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<(), RandomBaseError> {
    let mut text =
        serde_json::to_string_pretty(value).expect("a JSON value has only keys that are strings");
    text.push('\n');
    write_file(path, text.as_bytes())
}

fn write_config(dir: &Path, part: &str, value: &Value) -> Result<PathBuf, RandomBaseError> {
    let path = dir.join(part).join("config.json");
    write_json(&path, value)?;
    Ok(path)
}

fn write_weights(
    path: &Path,
    part: Part,
    parameters: &[ParameterSpec],
    seed: u64,
) -> Result<(), RandomBaseError> {
    let values: Vec<_> = parameters
        .iter()
        .map(|parameter| init::values(part, parameter, seed))
        .collect();
    let tensors: Vec<TensorToWrite> = parameters
        .iter()
        .zip(&values)
        .map(|(parameter, values)| TensorToWrite {
            name: &parameter.name,
            dtype: Dtype::F16,
            shape: &parameter.shape,
            bytes: bytemuck::cast_slice(values),
        })
        .collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(path, &tensors, &metadata)?;
    Ok(())
}

fn size_below(dir: &Path) -> Result<u64, RandomBaseError> {
    let mut size_bytes = 0;
    for entry in fs_err::read_dir(dir).map_err(RandomBaseError::Directory)? {
        let entry = entry.map_err(RandomBaseError::Directory)?;
        let metadata = entry.metadata().map_err(RandomBaseError::Directory)?;
        size_bytes += if metadata.is_dir() {
            size_below(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(size_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::Precision;
    use tensor::device::cpu;

    fn tokenizers() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for name in [
            "clip/vocab.json",
            "clip/special_tokens_map.json",
            "clip/tokenizer_config.json",
        ] {
            write_file(&dir.path().join(name), b"{ }").expect("written");
        }
        for name in [
            "t5/tokenizer.json",
            "t5/special_tokens_map.json",
            "t5/tokenizer_config.json",
        ] {
            write_file(&dir.path().join(name), b"{ }").expect("written");
        }
        write_file(&dir.path().join("clip/merges.txt"), b"#version: 0.2\n").expect("written");
        write_file(&dir.path().join("t5/spiece.model"), b"pieces").expect("written");
        dir
    }

    #[test]
    fn every_part_loads_in_the_models_that_use_it() {
        let (tokenizers, base) = (tokenizers(), tempfile::tempdir().expect("a directory"));
        let base = base.path();
        let written = write(base, Preset::Demo, 0, tokenizers.path()).expect("written");
        // With 3.8 MB of tokenizer files this stays below the 12 MB that the repository can carry.
        assert!(written.size_bytes < 8_200_000, "{written:?}");
        assert!(is_untrained(base));

        let options = mmdit::LoadOptions {
            device: cpu(),
            precision: Precision::F32,
            base: mmdit::BaseWeights::Plain,
        };
        mmdit::Mmdit::open(&base.join("transformer"), &options).expect("a transformer");
        autoencoder::Autoencoder::open(&base.join("vae"), &cpu(), Precision::F32).expect("a VAE");
        let clip = base.join("text_encoder");
        text_encoders::ClipTextModel::open(&clip, &cpu(), Precision::F32).expect("CLIP");
        let t5 = base.join("text_encoder_2");
        text_encoders::T5Encoder::open(&t5, &cpu(), Precision::F32).expect("T5");
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
        let tokenizers = tokenizers();
        let weights = |seed| {
            let base = tempfile::tempdir().expect("a directory");
            write(base.path(), Preset::Demo, seed, tokenizers.path()).expect("written");
            fs_err::read(base.path().join("vae/diffusion_pytorch_model.safetensors"))
                .expect("there")
        };
        assert_eq!(weights(3), weights(3));
        assert_ne!(weights(3), weights(4));
    }

    #[test]
    fn an_untrained_base_is_replaced_and_any_other_is_refused() {
        let (tokenizers, base) = (tokenizers(), tempfile::tempdir().expect("a directory"));
        let base = base.path();
        for seed in 0..2 {
            write(base, Preset::Demo, seed, tokenizers.path()).expect("made by us");
        }
        let index = base.join("model_index.json");
        fs_err::write(&index, b"{\"_class_name\": \"FluxPipeline\"}").expect("written");
        let error = write(base, Preset::Demo, 0, tokenizers.path()).expect_err("not made by us");
        assert!(
            matches!(error, RandomBaseError::WouldOverwrite { .. }),
            "{error}"
        );
        assert!(!is_untrained(base));
    }
}
