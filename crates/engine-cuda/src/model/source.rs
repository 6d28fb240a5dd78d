//! Where weights come from: a checkpoint, numbers in memory, or a generator on the device.

use std::collections::BTreeMap;

use artifacts::{ArtifactError, Checkpoint, Dtype};

use super::error::ModelError;

/// One tensor as its source has it.
pub enum Tensor<'a> {
    /// `f32`, little-endian, row by row.
    F32(&'a [u8]),
    /// bfloat16.
    Bf16(&'a [u8]),
    /// Half precision.
    F16(&'a [u8]),
    /// Numbers that had to be converted.
    Converted(Vec<f32>),
    /// To be drawn on the device: normal with this deviation.
    Normal {
        /// Standard deviation.
        std: f32,
        /// Names the sequence.
        seed: u64,
    },
}

/// Something that has tensors by name.
pub trait WeightSource {
    /// The tensor of a name.
    ///
    /// # Errors
    ///
    /// If it is not there or cannot be read.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError>;
}

impl WeightSource for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        Ok(match self.info(name)?.dtype {
            Dtype::F32 => Tensor::F32(self.bytes(name)?),
            Dtype::BF16 => Tensor::Bf16(self.bytes(name)?),
            Dtype::F16 => Tensor::F16(self.bytes(name)?),
            _ => Tensor::Converted(self.f32(name)?),
        })
    }
}

impl WeightSource for BTreeMap<String, Vec<f32>> {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        match self.get(name) {
            Some(values) => Ok(Tensor::F32(bytemuck::cast_slice(values))),
            None => Err(ModelError::Checkpoint(ArtifactError::MissingTensor {
                path: "memory".into(),
                name: name.to_owned(),
                nearest: Vec::new(),
            })),
        }
    }
}

/// Normal numbers of one deviation for every tensor, drawn on the device: for measuring.
#[derive(Clone, Copy, Debug)]
pub struct NormalWeights {
    /// Standard deviation.
    pub std: f32,
}

impl WeightSource for NormalWeights {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        let digest = blake3::hash(name.as_bytes());
        let bytes = digest.as_bytes()[..8].try_into().expect("eight bytes");
        Ok(Tensor::Normal {
            std: self.std,
            seed: u64::from_le_bytes(bytes),
        })
    }
}
