//! Every file that the stages exchange, and the only crate that knows how Parquet and safetensors lay them out.
//!
//! A file is written whole or not at all ([`atomic`]), named by its content ([`Digest`]), and never believed before it
//! is checked: headers, offsets, types and lengths are compared with the file before a byte of it is used.
//!
//! | what | module | written by | read by |
//! |---|---|---|---|
//! | weights of a model | [`Checkpoint`] | others | text-encoders, autoencoder, mmdit |
//! | tensors in one file | [`safetensors_file`] | lora, train, latents | everyone |
//! | `samples.parquet`, `captions.parquet`, `rejects.parquet` | [`samples`], [`captions`], [`rejects`] | ingest | everyone after it |
//! | `text-embeddings.parquet` | [`text_embeddings`] | embed-text | train |
//! | the public recipe's embeddings | [`public_embeddings`] | others | embed-text |
//! | latents | [`latents`] | cache-latents | train |
//! | `metrics.parquet` | [`metrics`] | train | people |
//! | the list in `images.json` | [`images`] | sample | evaluate |
//! | Hugging Face image data sets | [`hf_dataset`] | others | sources, cache-latents |
//! | source images, by what `samples.parquet` says | [`SourceImages`] | others | sources, cache-latents, evaluate |
#![deny(unsafe_code)]

mod error;

pub mod atomic;
mod digest;

mod checkpoint;
pub mod safetensors_file;

mod parquet_read;
mod parquet_write;

pub mod captions;
pub mod images;
pub mod metrics;
pub mod rejects;
pub mod samples;

pub mod latents;
pub mod public_embeddings;
pub mod text_embeddings;

pub mod hf_dataset;
mod source_images;

pub use atomic::{AtomicFile, write_atomically};
pub use captions::CaptionRow;
pub use checkpoint::Checkpoint;
pub use digest::{Digest, Hasher, ParseDigestError, digest_bytes, digest_file};
pub use error::{ArtifactError, HeaderProblem, KeyMismatch, ParquetProblem, Result, WriteProblem};
pub use hf_dataset::{ParquetImage, ParquetImages};
pub use images::ImageEntry;
pub use latents::{Latent, LatentCache, LatentCacheWriter, LatentRow};
pub use metrics::MetricRow;
pub use parquet_write::Footer;
pub use public_embeddings::{PublicEmbedding, PublicEmbeddings, read_public_embeddings};
pub use rejects::RejectRow;
pub use safetensors_file::{Dtype, SafetensorsFile, TensorInfo, TensorToWrite, write_safetensors};
pub use samples::SampleRow;
pub use source_images::SourceImages;
pub use text_embeddings::{
    Embedding, TextEmbeddingHeader, TextEmbeddingRow, TextEmbeddingWriter, TextEmbeddings,
};
