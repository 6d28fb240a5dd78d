//! What can keep images from becoming latents.

use std::path::PathBuf;

use artifacts::ArtifactError;
use autoencoder::AutoencoderError;
use pipeline::{FailureKind, StageError};
use pixel_art::{CanvasError, SourceError};
use tensor::DeviceError;

/// Why the stage stopped.
#[derive(Debug, thiserror::Error)]
pub enum CacheLatentsError {
    /// An image is larger than the canvas, or has no pixels.
    #[error("{source_file} cannot be scaled by a whole factor")]
    Canvas {
        /// The image.
        source_file: String,
        /// Both sizes.
        source: CanvasError,
    },
    /// The short side resized to the resolution would make the long side absurd.
    #[error("{source_file} is {width_px}×{height_px}, too long for its width to be resized")]
    Proportions {
        /// The image.
        source_file: String,
        /// Its width.
        width_px: u32,
        /// Its height.
        height_px: u32,
    },
    /// An image is not what was ingested.
    #[error("{source_file}{} is not the image that was ingested", row(*source_row))]
    Image {
        /// The image's file.
        source_file: String,
        /// Row in that file, if it is a table.
        source_row: Option<u32>,
        /// Why not.
        source: SourceError,
    },
    /// An image is no longer where it was ingested from.
    #[error("{source_file}{} cannot be fetched", row(*source_row))]
    Fetch {
        /// The image's file.
        source_file: String,
        /// Row in that file, if it is a table.
        source_row: Option<u32>,
        /// Why not.
        source: Box<ArtifactError>,
    },
    /// The VAE is not for RGB pictures.
    #[error("{}: `in_channels` is {found}, expected 3", path.display())]
    Channels {
        /// The configuration.
        path: PathBuf,
        /// What it says.
        found: usize,
    },
    /// The VAE gave infinities or not-a-numbers.
    #[error("the latent of {source_file} is not finite")]
    NotFinite {
        /// The image.
        source_file: String,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The VAE cannot be used.
    #[error(transparent)]
    Vae(#[from] AutoencoderError),
    /// A table or shard cannot be read or written.
    #[error(transparent)]
    File(#[from] ArtifactError),
}

fn row(source_row: Option<u32>) -> String {
    source_row.map_or_else(String::new, |row| format!(", row {row},"))
}

impl StageError for CacheLatentsError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::File(ArtifactError::Io { .. }) => FailureKind::Failed,
            _ => FailureKind::BadInput,
        }
    }

    fn help(&self) -> Option<String> {
        Some(match self {
            Self::Canvas { .. } => {
                "reduce the image to its native size, raise cache_latents.resolution_px, or give up the pixel grid with \
                 cache_latents.scaling = \"bilinear-short-side\""
                    .to_owned()
            }
            Self::Proportions { .. } => "crop the image".to_owned(),
            Self::Image { .. } | Self::Fetch { .. } => "run `cargo xtask ingest`".to_owned(),
            Self::NotFinite { .. } => {
                "set cache_latents.precision = \"f32\" or \"bf16\": fp16 overflows in some autoencoders".to_owned()
            }
            _ => return None,
        })
    }
}
