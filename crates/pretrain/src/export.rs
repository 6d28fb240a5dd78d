//! A trained base as a directory in diffusers' layout, half precision, with its model card.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use artifacts::{Digest, Dtype, Hasher, TensorToWrite, write_atomically, write_safetensors};
use half::f16;
use random_base::Preset;
use serde_json::Value;
use tensor::ParameterSpec;
use walkdir::WalkDir;

use crate::PretrainError;

/// Writes one file, making its directory.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), PretrainError> {
    if let Some(dir) = path.parent() {
        fs_err::create_dir_all(dir).map_err(PretrainError::Read)?;
    }
    write_atomically(path, |file| file.write_all(bytes))?;
    Ok(())
}

/// Writes JSON as people read it.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<(), PretrainError> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

/// Writes the configurations of all parts, the scheduler's and the tokenizers' files; gives the digest of the last.
pub(crate) fn write_skeleton(
    base: &Path,
    preset: Preset,
    vae: &Value,
    tokenizers: &Path,
) -> Result<Digest, PretrainError> {
    write_json(
        &base.join("scheduler/scheduler_config.json"),
        &preset.scheduler(),
    )?;
    for (part, config) in [
        ("transformer", &preset.transformer()),
        ("vae", vae),
        ("text_encoder", &preset.text_encoder()),
        ("text_encoder_2", &preset.text_encoder_2()),
    ] {
        write_json(&base.join(part).join("config.json"), config)?;
    }
    let mut hasher = Hasher::new();
    for part in ["tokenizer", "tokenizer_2"] {
        let mut files: Vec<_> = fs_err::read_dir(tokenizers.join(part))
            .map_err(PretrainError::Read)?
            .collect::<Result<_, _>>()
            .map_err(PretrainError::Read)?;
        files.sort_by_key(|entry| entry.file_name());
        for entry in files {
            // An editor's folder beside them is none of a tokenizer's files.
            if !fs_err::metadata(entry.path())
                .map_err(PretrainError::Read)?
                .is_file()
            {
                continue;
            }
            let bytes = fs_err::read(entry.path()).map_err(PretrainError::Read)?;
            let path = Path::new(part).join(entry.file_name());
            hasher.field(path.as_os_str().as_encoded_bytes());
            hasher.field(&bytes);
            write_file(&base.join(path), &bytes)?;
        }
    }
    Ok(hasher.finish())
}

/// Takes the files of a finished draft over into `out`, and the draft away.
///
/// `index`, which makes a base of them, is the first to go and the last to come: who reads meanwhile finds none, and after
/// an end in between the same call begins anew.
pub(crate) fn publish(draft: &Path, out: &Path, index: &str) -> Result<(), PretrainError> {
    let (from, to) = (draft.join(index), out.join(index));
    if to.exists() {
        fs_err::remove_file(&to).map_err(PretrainError::Read)?;
    }
    for entry in WalkDir::new(draft).sort_by_file_name() {
        let entry = entry.map_err(|error| PretrainError::Read(error.into()))?;
        let path = entry.path();
        if entry.file_type().is_file() && path != from {
            let name = path.strip_prefix(draft).expect("it lies below");
            take_over(path, &out.join(name))?;
        }
    }
    take_over(&from, &to)?;
    fs_err::remove_dir_all(draft).map_err(PretrainError::Read)
}

fn take_over(from: &Path, to: &Path) -> Result<(), PretrainError> {
    write_file(to, &fs_err::read(from).map_err(PretrainError::Read)?)
}

/// Writes weights in half precision; `about` joins the file's metadata.
pub(crate) fn write_weights(
    path: &Path,
    parameters: &[(ParameterSpec, Vec<f32>)],
    about: &BTreeMap<String, String>,
) -> Result<(), PretrainError> {
    let halves: Vec<Vec<f16>> = parameters
        .iter()
        .map(|(_, values)| values.iter().map(|&value| f16::from_f32(value)).collect())
        .collect();
    let tensors: Vec<TensorToWrite> = parameters
        .iter()
        .zip(&halves)
        .map(|((spec, _), values)| TensorToWrite {
            name: &spec.name,
            dtype: Dtype::F16,
            shape: &spec.shape,
            bytes: bytemuck::cast_slice(values),
        })
        .collect();
    if let Some(dir) = path.parent() {
        fs_err::create_dir_all(dir).map_err(PretrainError::Read)?;
    }
    let mut metadata = about.clone();
    metadata.insert("format".to_owned(), "pt".to_owned());
    write_safetensors(path, &tensors, &metadata)?;
    Ok(())
}
