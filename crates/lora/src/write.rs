//! Writing a LoRA file as diffusers does, with alpha.
//!
//! Tensors `transformer.<path>.lora_{A,B}.weight` in `f32`; header entries `format`, `lora_adapter_metadata` and the
//! file's own. The bytes depend on the content alone.

use std::path::Path;

use artifacts::{TensorToWrite, write_safetensors};

use crate::{LoraError, LoraFile, adapter_metadata};

impl LoraFile {
    /// Writes the file atomically.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    ///
    /// # Panics
    ///
    /// If there are no modules.
    pub fn write(&self, path: &Path) -> Result<(), LoraError> {
        assert!(!self.modules.is_empty(), "a LoRA without modules");
        let mut metadata = self.metadata.clone();
        metadata.insert("format".to_owned(), "pt".to_owned());
        metadata.insert(
            adapter_metadata::KEY.to_owned(),
            adapter_metadata::render(&self.modules),
        );
        let names: Vec<[String; 2]> = self
            .modules
            .keys()
            .map(|path| ["A", "B"].map(|factor| format!("transformer.{path}.lora_{factor}.weight")))
            .collect();
        let shapes: Vec<[[usize; 2]; 2]> = self
            .modules
            .values()
            .map(|module| {
                [
                    [module.rank, module.in_features],
                    [module.out_features, module.rank],
                ]
            })
            .collect();
        let tensors: Vec<TensorToWrite<'_>> = self
            .modules
            .values()
            .zip(&names)
            .zip(&shapes)
            .flat_map(|((module, [a, b]), [a_shape, b_shape])| {
                [
                    TensorToWrite::f32(a, a_shape, &module.a),
                    TensorToWrite::f32(b, b_shape, &module.b),
                ]
            })
            .collect();
        Ok(write_safetensors(path, &tensors, &metadata)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{LoraModule, Target};

    #[test]
    fn a_written_file_is_read_back_to_the_bit() {
        let modules = BTreeMap::from([
            (
                "transformer_blocks.0.attn.to_q".to_owned(),
                LoraModule::new(8.0, 2, 1, vec![0.1, 0.2], vec![0.3]),
            ),
            (
                "proj_out".to_owned(),
                LoraModule::new(2.5, 1, 1, vec![1.5, f32::MIN_POSITIVE], vec![-0.0, 7.0]),
            ),
        ]);
        let metadata = BTreeMap::from([("spritelora.base".to_owned(), "abc".to_owned())]);
        let file = LoraFile::new(modules, metadata);
        let targets = [
            Target::new("transformer_blocks.0.attn.to_q", 2, 1),
            Target::new("proj_out", 1, 1),
        ];
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (first, second) = (
            dir.path().join("a.safetensors"),
            dir.path().join("b.safetensors"),
        );
        file.write(&first).expect("a writable directory");
        let read = LoraFile::read(&first, &targets).expect("own file");
        assert_eq!(read, file);
        read.write(&second).expect("a writable directory");
        let bytes = |path| std::fs::read(path).expect("just written");
        assert_eq!(bytes(&first), bytes(&second));
    }
}
