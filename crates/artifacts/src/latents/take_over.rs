//! Shards that a cache in the making takes over: from another cache, or left behind by an interrupted run.
//!
//! A shard never changes once it has its name, so another cache's is linked, not copied.

use std::path::{Path, PathBuf};

use super::{FORMAT, LatentCache, LatentCacheWriter, LatentRow, shard_name, tensor_names};
use crate::atomic::link_or_copy;
use crate::error::{ArtifactError, Result};
use crate::safetensors_file::{Dtype, SafetensorsFile};

/// A sound shard of the right VAE and geometry that an interrupted run left in the cache's directory.
#[derive(Debug)]
pub struct LatentShard {
    path: PathBuf,
    keys: Vec<(String, u32)>,
    shapes: Vec<[u32; 3]>,
}

impl LatentShard {
    /// The latents that it holds, as sample id and view.
    pub fn keys(&self) -> &[(String, u32)] {
        &self.keys
    }

    /// Removes it.
    ///
    /// # Errors
    ///
    /// If the disk refuses.
    pub fn remove(self) -> Result<()> {
        remove(&self.path)
    }
}

impl LatentCacheWriter {
    /// Whether a cache's latents are what this one would hold: same VAE, same geometry.
    pub fn accepts(&self, cache: &LatentCache) -> bool {
        cache.vae_digest == self.vae_digest && cache.geometry == self.geometry
    }

    /// The shards that lie in the directory from an interrupted run, by name. Unsound ones and those of another VAE or
    /// geometry are removed. Ask before anything else is added, and [`Self::keep`] or [`LatentShard::remove`] each.
    ///
    /// # Errors
    ///
    /// If the directory cannot be listed or a file in it not be removed.
    pub fn leftover_shards(&self) -> Result<Vec<LatentShard>> {
        let listed = |e| ArtifactError::io("list", &self.dir, e);
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(listed)? {
            let path = entry.map_err(listed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("latents-") && name.ends_with(".safetensors") {
                paths.push(path);
            }
        }
        paths.sort();
        let mut shards = Vec::new();
        for path in paths {
            match self.read_leftover(&path) {
                Some(shard) => shards.push(shard),
                None => remove(&path)?,
            }
        }
        Ok(shards)
    }

    /// Makes a leftover shard the next one of this cache. `place` says of each latent whether its picture was mirrored,
    /// and left and top edge of its crop.
    ///
    /// # Errors
    ///
    /// If one of its latents is in the cache already, or the shard cannot be renamed.
    pub fn keep(
        &mut self,
        shard: &LatentShard,
        mut place: impl FnMut(&str, u32) -> (bool, u32, u32),
    ) -> Result<()> {
        self.flush()?;
        let name = shard_name(self.num_shards);
        let path = self.dir.join(&name);
        if shard.path != path {
            std::fs::rename(&shard.path, &path).map_err(|e| ArtifactError::write(&path, e))?;
        }
        self.num_shards += 1;
        for ((sample_id, view), [channels, height, width]) in shard.keys.iter().zip(&shard.shapes) {
            let (flipped, crop_x_px, crop_y_px) = place(sample_id, *view);
            self.add_row(LatentRow {
                sample_id: sample_id.clone(),
                view: *view,
                shard: name.clone(),
                channels: *channels,
                height: *height,
                width: *width,
                flipped,
                crop_x_px,
                crop_y_px,
            })?;
        }
        Ok(())
    }

    /// Links a whole shard of another cache as the next one of this.
    ///
    /// # Errors
    ///
    /// If one of its latents is in the cache already, or the shard can be neither linked nor copied.
    ///
    /// # Panics
    ///
    /// If this cache does not accept the other one.
    pub fn link(&mut self, cache: &LatentCache, shard: &str) -> Result<()> {
        assert!(
            self.accepts(cache),
            "latents of {} are not what {} holds",
            cache.geometry,
            self.geometry
        );
        self.flush()?;
        let name = shard_name(self.num_shards);
        link_or_copy(&cache.dir.join(shard), &self.dir.join(&name))?;
        self.num_shards += 1;
        for row in cache.rows.iter().filter(|row| row.shard == shard) {
            self.add_row(LatentRow {
                shard: name.clone(),
                ..row.clone()
            })?;
        }
        Ok(())
    }

    fn add_row(&mut self, row: LatentRow) -> Result<()> {
        if !self.keys.insert((row.sample_id.clone(), row.view)) {
            return Err(ArtifactError::DuplicateLatent {
                dir: self.dir.clone(),
                sample_id: row.sample_id,
                view: row.view,
            });
        }
        self.rows.push(row);
        Ok(())
    }

    fn read_leftover(&self, path: &Path) -> Option<LatentShard> {
        let file = SafetensorsFile::open(path).ok()?;
        let says = |key: &str, expected: &str| {
            file.metadata().get(key).map(String::as_str) == Some(expected)
        };
        if !says("format", FORMAT)
            || !says("vae_digest", &self.vae_digest.to_string())
            || !says("geometry", &self.geometry)
        {
            return None;
        }
        let (mut keys, mut shapes) = (Vec::new(), Vec::new());
        for mean in file.names().filter(|name| name.ends_with(".mean")) {
            let (sample_id, view) = mean.strip_suffix(".mean")?.rsplit_once('.')?;
            let key = (sample_id.to_owned(), view.parse().ok()?);
            let [_, logvar] = tensor_names(&key.0, key.1);
            let (mean, logvar) = (file.info(mean).ok()?, file.info(&logvar).ok()?);
            if mean.dtype != Dtype::F32 || logvar.dtype != Dtype::F32 || mean.shape != logvar.shape
            {
                return None;
            }
            let &[c, h, w] = mean.shape.as_slice() else {
                return None;
            };
            let shape = [c, h, w].map(|size| u32::try_from(size).ok());
            shapes.push([shape[0]?, shape[1]?, shape[2]?]);
            keys.push(key);
        }
        // Nothing else may be in it.
        (2 * keys.len() == file.names().len()).then(|| LatentShard {
            path: path.to_path_buf(),
            keys,
            shapes,
        })
    }
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).map_err(|e| ArtifactError::io("remove", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::digest_bytes;
    use crate::latents::Latent;

    fn latent(sample_id: &str, view: u32) -> Latent {
        Latent {
            sample_id: sample_id.to_owned(),
            view,
            shape: [1, 1, 2],
            mean: vec![f32::from(sample_id.as_bytes()[0]), view as f32],
            logvar: vec![0.0, -1.0],
            flipped: view == 1,
            crop_x_px: view,
            crop_y_px: 0,
        }
    }

    fn writer(dir: &Path, geometry: &str) -> LatentCacheWriter {
        LatentCacheWriter::create(dir, digest_bytes(b"vae"), geometry)
    }

    fn tempdir() -> tempfile::TempDir {
        tempfile::tempdir().expect("a temporary directory")
    }

    #[test]
    fn a_linked_shard_reads_as_in_its_first_cache() {
        let (first, second) = (tempdir(), tempdir());
        let mut old = writer(first.path(), "g");
        old.push(latent("a", 0)).expect("fits");
        old.push(latent("b", 1)).expect("fits");
        old.finish().expect("written");
        let old = LatentCache::open(first.path()).expect("sound");

        let mut new = writer(second.path(), "g");
        assert!(new.accepts(&old));
        new.link(&old, "latents-00000.safetensors").expect("linked");
        new.push(latent("c", 0)).expect("fits");
        new.finish().expect("written");
        first.close().expect("the first cache can go");
        let cache = LatentCache::open(second.path()).expect("sound");
        for (sample_id, view) in [("a", 0), ("b", 1), ("c", 0)] {
            assert_eq!(
                cache.get(sample_id, view).expect("there"),
                latent(sample_id, view)
            );
        }
    }

    #[test]
    fn a_linked_latent_cannot_be_added_again() {
        let (first, second) = (tempdir(), tempdir());
        let mut old = writer(first.path(), "g");
        old.push(latent("a", 0)).expect("fits");
        old.finish().expect("written");
        let old = LatentCache::open(first.path()).expect("sound");
        let mut new = writer(second.path(), "g");
        new.link(&old, "latents-00000.safetensors").expect("linked");
        new.push(latent("a", 0)).expect_err("it is there");
        assert!(!writer(second.path(), "other").accepts(&old));
    }

    #[test]
    fn shards_of_an_interrupted_run_are_kept_and_closed_up() {
        let dir = tempdir();
        let mut cut = writer(dir.path(), "g");
        cut.shard_bytes = 1;
        for sample_id in ["a", "b", "c"] {
            cut.push(latent(sample_id, 0)).expect("fits");
        }
        drop(cut); // killed before the index
        std::fs::write(dir.path().join("latents-00007.safetensors"), b"half").expect("written");
        let mut new = writer(dir.path(), "g");
        let mut shards = new.leftover_shards().expect("listed");
        assert_eq!(shards.len(), 3);
        shards.remove(0).remove().expect("removed");
        for shard in &shards {
            new.keep(shard, |_, _| (false, 0, 0)).expect("kept");
        }
        new.finish().expect("written");
        let cache = LatentCache::open(dir.path()).expect("sound");
        assert_eq!(cache.get("c", 0).expect("there"), latent("c", 0));
        assert!(!cache.contains("a", 0));
        assert!(!dir.path().join("latents-00002.safetensors").exists());
    }

    #[test]
    fn leftovers_of_another_geometry_are_removed() {
        let dir = tempdir();
        let mut cut = writer(dir.path(), "g");
        cut.shard_bytes = 1;
        cut.push(latent("a", 0)).expect("fits");
        let other = writer(dir.path(), "other");
        assert!(other.leftover_shards().expect("listed").is_empty());
        assert!(!dir.path().join("latents-00000.safetensors").exists());
    }
}
