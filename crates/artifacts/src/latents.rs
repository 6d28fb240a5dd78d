//! The latent cache: what the VAE made of every view of every image.
//!
//! A directory of safetensors shards, `latents-00000.safetensors` and so on, each with `<sample_id>.<view>.mean` and
//! `<sample_id>.<view>.logvar` as F32 `(channels, height, width)`, and an `index.parquet` with a row per view that names
//! the shard. The sample id stands in every tensor's name and every row, and is compared when the cache is opened, so a
//! latent can never be read for another image than its own. The VAE's digest stands in the index and in every shard.

mod take_over;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{ArtifactError, Result};
use crate::parquet_read::ParquetFile;
use crate::parquet_write::{Footer, column, write_table};
use crate::safetensors_file::{Dtype, SafetensorsFile, TensorToWrite, write_safetensors};
use crate::text_embeddings::footer_entry;

pub use take_over::LatentShard;

/// The index's file name.
pub const INDEX_FILE: &str = "index.parquet";

/// Version of the layout, in the index's footer and the shards' metadata.
const FORMAT: &str = "spritelora-latents/1";

/// A shard closes when it reaches this size.
const SHARD_BYTES: usize = 256 << 20;

/// One view of one image in the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatentRow {
    /// Identity of the picture: 64 hexadecimal digits.
    pub sample_id: String,
    /// Which view of it, counted from 0.
    pub view: u32,
    /// File name of its shard.
    pub shard: String,
    /// Channels of the latent.
    pub channels: u32,
    /// Rows of the latent.
    pub height: u32,
    /// Columns of the latent.
    pub width: u32,
    /// Whether the picture was mirrored.
    pub flipped: bool,
    /// Left edge of the crop in the resized picture.
    pub crop_x_px: u32,
    /// Top edge of the crop in the resized picture.
    pub crop_y_px: u32,
}

/// The VAE's posterior for one view of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct Latent {
    /// Identity of the picture: 64 hexadecimal digits.
    pub sample_id: String,
    /// Which view of it, counted from 0.
    pub view: u32,
    /// Channels, height, width.
    pub shape: [usize; 3],
    /// Posterior mean, `(c, h, w)` row by row.
    pub mean: Vec<f32>,
    /// Logarithm of the posterior variance, likewise.
    pub logvar: Vec<f32>,
    /// Whether the picture was mirrored.
    pub flipped: bool,
    /// Left edge of the crop in the resized picture.
    pub crop_x_px: u32,
    /// Top edge of the crop in the resized picture.
    pub crop_y_px: u32,
}

/// A cache in the making. It exists once [`Self::finish`] has written the index; shards are written as they fill up.
pub struct LatentCacheWriter {
    dir: PathBuf,
    vae_digest: Digest,
    geometry: String,
    shard_bytes: usize,
    rows: Vec<LatentRow>,
    keys: BTreeSet<(String, u32)>,
    pending: Vec<Latent>,
    pending_bytes: usize,
    num_shards: usize,
}

impl LatentCacheWriter {
    /// Starts a cache in `dir`, which must exist. `geometry` says how pictures were scaled and cropped.
    pub fn create(dir: &Path, vae_digest: Digest, geometry: &str) -> Self {
        Self {
            dir: dir.to_path_buf(),
            vae_digest,
            geometry: geometry.to_owned(),
            shard_bytes: SHARD_BYTES,
            rows: Vec::new(),
            keys: BTreeSet::new(),
            pending: Vec::new(),
            pending_bytes: 0,
            num_shards: 0,
        }
    }

    /// Adds a latent.
    ///
    /// # Errors
    ///
    /// If its numbers do not fill its shape, it is there already, or a full shard cannot be written.
    pub fn push(&mut self, latent: Latent) -> Result<()> {
        let [channels, height, width] = latent.shape;
        let expected = channels.saturating_mul(height).saturating_mul(width);
        for (part, found) in [("mean", latent.mean.len()), ("logvar", latent.logvar.len())] {
            if found != expected || u32::try_from(expected).is_err() {
                return Err(ArtifactError::LatentSize {
                    sample_id: latent.sample_id,
                    view: latent.view,
                    part,
                    shape: latent.shape,
                    expected,
                    found,
                });
            }
        }
        if !self.keys.insert((latent.sample_id.clone(), latent.view)) {
            return Err(ArtifactError::DuplicateLatent {
                dir: self.dir.clone(),
                sample_id: latent.sample_id,
                view: latent.view,
            });
        }
        self.rows.push(LatentRow {
            sample_id: latent.sample_id.clone(),
            view: latent.view,
            shard: shard_name(self.num_shards),
            channels: channels as u32, // these fit: their product does
            height: height as u32,
            width: width as u32,
            flipped: latent.flipped,
            crop_x_px: latent.crop_x_px,
            crop_y_px: latent.crop_y_px,
        });
        self.pending_bytes += 2 * expected * size_of::<f32>();
        self.pending.push(latent);
        if self.pending_bytes >= self.shard_bytes {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the last shard and the index.
    ///
    /// # Errors
    ///
    /// If the disk refuses.
    pub fn finish(mut self) -> Result<Vec<LatentRow>> {
        self.flush()?;
        let rows = &self.rows;
        let footer = Footer::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("vae_digest".to_owned(), self.vae_digest.to_string()),
            ("geometry".to_owned(), self.geometry.clone()),
        ]);
        write_table(
            &self.dir.join(INDEX_FILE),
            vec![
                column("sample_id", rows.iter().map(|r| r.sample_id.as_str())),
                column("view", rows.iter().map(|r| r.view)),
                column("shard", rows.iter().map(|r| r.shard.as_str())),
                column("channels", rows.iter().map(|r| r.channels)),
                column("height", rows.iter().map(|r| r.height)),
                column("width", rows.iter().map(|r| r.width)),
                column("flipped", rows.iter().map(|r| r.flipped)),
                column("crop_x_px", rows.iter().map(|r| r.crop_x_px)),
                column("crop_y_px", rows.iter().map(|r| r.crop_y_px)),
            ],
            &footer,
        )?;
        Ok(self.rows)
    }

    fn flush(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let names: Vec<[String; 2]> = self
            .pending
            .iter()
            .map(|latent| tensor_names(&latent.sample_id, latent.view))
            .collect();
        let tensors: Vec<TensorToWrite<'_>> = self
            .pending
            .iter()
            .zip(&names)
            .flat_map(|(latent, [mean, logvar])| {
                [
                    TensorToWrite::f32(mean, &latent.shape, &latent.mean),
                    TensorToWrite::f32(logvar, &latent.shape, &latent.logvar),
                ]
            })
            .collect();
        let metadata = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("vae_digest".to_owned(), self.vae_digest.to_string()),
            ("geometry".to_owned(), self.geometry.clone()),
        ]);
        let path = self.dir.join(shard_name(self.num_shards));
        write_safetensors(&path, &tensors, &metadata)?;
        self.pending.clear();
        self.pending_bytes = 0;
        self.num_shards += 1;
        Ok(())
    }
}

fn shard_name(index: usize) -> String {
    format!("latents-{index:05}.safetensors")
}

fn tensor_names(sample_id: &str, view: u32) -> [String; 2] {
    ["mean", "logvar"].map(|part| format!("{sample_id}.{view}.{part}"))
}

/// An open cache: the index is in memory and agrees with the shards; latents are read when asked for.
pub struct LatentCache {
    dir: PathBuf,
    vae_digest: Digest,
    geometry: String,
    rows: Vec<LatentRow>,
    row_of: HashMap<(String, u32), usize>,
    shards: BTreeMap<String, SafetensorsFile>,
}

impl LatentCache {
    /// Opens the cache in `dir` and compares every row with its shard's header.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, a row's tensors are missing or of another shape, a tensor has no row, a row appears twice,
    /// or a shard is of another VAE than the index.
    pub fn open(dir: &Path) -> Result<Self> {
        let index_path = dir.join(INDEX_FILE);
        let index = ParquetFile::open(&index_path)?;
        let footer = index.footer();
        let format = footer_entry::<String>(&index_path, &footer, "format", FORMAT)?;
        if format != FORMAT {
            return Err(wrong_entry(&index_path, "format", FORMAT, Some(&format)));
        }
        let vae_digest = footer_entry(&index_path, &footer, "vae_digest", "a digest")?;
        let geometry = footer_entry(
            &index_path,
            &footer,
            "geometry",
            "how pictures were cropped",
        )?;
        let mut cache = Self {
            dir: dir.to_path_buf(),
            vae_digest,
            geometry,
            rows: read_rows(&index)?,
            row_of: HashMap::new(),
            shards: BTreeMap::new(),
        };
        cache.open_shards(&index)?;
        cache.check_rows()?;
        cache.check_unlisted()?;
        Ok(cache)
    }

    /// The index's rows, in its order.
    pub fn rows(&self) -> &[LatentRow] {
        &self.rows
    }

    /// The VAE that made the latents.
    pub fn vae_digest(&self) -> Digest {
        self.vae_digest
    }

    /// How pictures were scaled and cropped.
    pub fn geometry(&self) -> &str {
        &self.geometry
    }

    /// Checks that this VAE made the latents.
    ///
    /// # Errors
    ///
    /// If another one did.
    pub fn check_vae(&self, expected: Digest) -> Result<()> {
        if self.vae_digest == expected {
            return Ok(());
        }
        Err(ArtifactError::OtherVae {
            dir: self.dir.clone(),
            expected,
            found: self.vae_digest,
        })
    }

    /// Whether it has this view of this image.
    pub fn contains(&self, sample_id: &str, view: u32) -> bool {
        self.row_of.contains_key(&(sample_id.to_owned(), view))
    }

    /// The latent of a view of an image.
    ///
    /// # Errors
    ///
    /// If the cache does not have it.
    pub fn get(&self, sample_id: &str, view: u32) -> Result<Latent> {
        let row = self
            .row_of
            .get(&(sample_id.to_owned(), view))
            .map(|&row| &self.rows[row])
            .ok_or_else(|| ArtifactError::MissingLatent {
                dir: self.dir.clone(),
                sample_id: sample_id.to_owned(),
                view,
            })?;
        let shard = &self.shards[&row.shard]; // opened with the cache
        let [mean, logvar] = tensor_names(sample_id, view);
        Ok(Latent {
            sample_id: row.sample_id.clone(),
            view,
            shape: shape_of(row),
            mean: shard.f32(&mean)?,
            logvar: shard.f32(&logvar)?,
            flipped: row.flipped,
            crop_x_px: row.crop_x_px,
            crop_y_px: row.crop_y_px,
        })
    }

    fn open_shards(&mut self, index: &ParquetFile) -> Result<()> {
        for (row, latent) in self.rows.iter().enumerate() {
            if self.shards.contains_key(&latent.shard) {
                continue;
            }
            if !is_plain_file_name(&latent.shard) {
                let found = latent.shard.chars().take(80).collect::<String>();
                return Err(index.wrong_cell("shard", row, "a plain file name", found));
            }
            let shard = SafetensorsFile::open(&self.dir.join(&latent.shard))?;
            let found = shard.metadata().get("vae_digest");
            let expected = self.vae_digest.to_string();
            if found != Some(&expected) {
                return Err(wrong_entry(shard.path(), "vae_digest", &expected, found));
            }
            self.shards.insert(latent.shard.clone(), shard);
        }
        Ok(())
    }

    fn check_rows(&mut self) -> Result<()> {
        for (row, latent) in self.rows.iter().enumerate() {
            let shard = &self.shards[&latent.shard];
            let expected = shape_of(latent);
            for name in tensor_names(&latent.sample_id, latent.view) {
                let info = shard.info(&name)?;
                if info.dtype != Dtype::F32 || info.shape != expected {
                    return Err(ArtifactError::LatentShape {
                        shard: shard.path().to_path_buf(),
                        name,
                        expected: expected.to_vec(),
                        found_dtype: info.dtype,
                        found: info.shape.clone(),
                    });
                }
            }
            let key = (latent.sample_id.clone(), latent.view);
            if self.row_of.insert(key, row).is_some() {
                return Err(ArtifactError::DuplicateLatent {
                    dir: self.dir.clone(),
                    sample_id: latent.sample_id.clone(),
                    view: latent.view,
                });
            }
        }
        Ok(())
    }

    fn check_unlisted(&self) -> Result<()> {
        let mut listed: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for row in &self.rows {
            listed
                .entry(&row.shard)
                .or_default()
                .extend(tensor_names(&row.sample_id, row.view));
        }
        for (name, shard) in &self.shards {
            let unlisted: Vec<String> = shard
                .names()
                .filter(|tensor| !listed[name.as_str()].contains(*tensor))
                .map(str::to_owned)
                .collect();
            if !unlisted.is_empty() {
                return Err(ArtifactError::LatentShard {
                    shard: shard.path().to_path_buf(),
                    unlisted,
                });
            }
        }
        Ok(())
    }
}

fn shape_of(row: &LatentRow) -> [usize; 3] {
    [row.channels, row.height, row.width].map(|size| size as usize)
}

fn wrong_entry(path: &Path, key: &str, expected: &str, found: Option<&String>) -> ArtifactError {
    ArtifactError::Footer {
        path: path.to_path_buf(),
        key: key.to_owned(),
        expected: expected.to_owned(),
        found: found.cloned(),
    }
}

/// Whether a name stays in its directory on every system.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':', '\0'])
}

fn read_rows(index: &ParquetFile) -> Result<Vec<LatentRow>> {
    let mut sample_id = index.strings("sample_id")?.into_iter();
    let mut view = index.u32s("view")?.into_iter();
    let mut shard = index.strings("shard")?.into_iter();
    let mut channels = index.u32s("channels")?.into_iter();
    let mut height = index.u32s("height")?.into_iter();
    let mut width = index.u32s("width")?.into_iter();
    let mut flipped = index.bools("flipped")?.into_iter();
    let mut crop_x_px = index.u32s("crop_x_px")?.into_iter();
    let mut crop_y_px = index.u32s("crop_y_px")?.into_iter();
    let row = || {
        Some(LatentRow {
            sample_id: sample_id.next()?,
            view: view.next()?,
            shard: shard.next()?,
            channels: channels.next()?,
            height: height.next()?,
            width: width.next()?,
            flipped: flipped.next()?,
            crop_x_px: crop_x_px.next()?,
            crop_y_px: crop_y_px.next()?,
        })
    };
    Ok(std::iter::from_fn(row).collect())
}

#[cfg(test)]
mod tests;
