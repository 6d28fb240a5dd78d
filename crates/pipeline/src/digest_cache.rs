//! Content digests of files, remembered so that a second look at 24 GB of weights costs a `stat`.
//!
//! A remembered digest is believed only while path, size, modification time, change time and inode are the same, and
//! only if the file had rested for two seconds when it was hashed: a file that is written again within its
//! timestamp's resolution would otherwise keep its old digest. The cache file is a convenience; without it everything
//! is hashed again.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use console::Progress;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::clock::since_epoch;
use crate::error::PipelineError;
use crate::manifest::write_json_atomically;

/// Coarsest timestamps in use (FAT's) tick every two seconds.
const MUST_HAVE_RESTED_NS: u128 = 2_000_000_000;
/// Read size of hashing; large enough for BLAKE3 to use all cores.
const CHUNK_BYTES: usize = 8 << 20;

/// Digests of files by their path.
#[derive(Debug)]
pub struct DigestCache {
    file: PathBuf,
    entries: BTreeMap<String, Entry>,
    changed: bool,
    progress: Progress,
}

/// What the file looked like when it was hashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    seen: Seen,
    hashed_at_ns: u128,
    digest: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    size_bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
    inode: u64,
}

impl Seen {
    #[cfg(unix)]
    fn of(metadata: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        let nanoseconds = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
        Self {
            size_bytes: metadata.len(),
            modified_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
        }
    }

    #[cfg(not(unix))]
    fn of(metadata: &Metadata) -> Self {
        let modified_ns = metadata
            .modified()
            .ok()
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
            // Without a modification time nothing is ever believed: the far future has never rested.
            .map_or(i128::MAX, |since| since.as_nanos() as i128);
        Self {
            size_bytes: metadata.len(),
            modified_ns,
            changed_ns: modified_ns,
            inode: 0,
        }
    }
}

impl Entry {
    fn can_be_believed(&self, seen: Seen) -> bool {
        let last_written_ns = seen.modified_ns.max(seen.changed_ns);
        let rested = i128::try_from(self.hashed_at_ns.saturating_sub(MUST_HAVE_RESTED_NS))
            .is_ok_and(|latest| last_written_ns < latest);
        self.seen == seen && rested
    }
}

impl DigestCache {
    /// Reads the cache of a runs directory; one that is absent or damaged counts as empty.
    pub fn open(runs: &Path, progress: Progress) -> Self {
        let file = runs.join(".digest-cache.json");
        let entries = fs_err::read(&file)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self {
            file,
            entries,
            changed: false,
            progress,
        }
    }

    /// BLAKE3 of each file's content as 64 hex digits, in the order given.
    ///
    /// # Errors
    ///
    /// If a file cannot be read.
    pub fn digests(&mut self, paths: &[PathBuf]) -> Result<Vec<String>, PipelineError> {
        let looked_up: Vec<(PathBuf, Seen, Option<String>)> = paths
            .par_iter()
            .map(|path| {
                let absolute =
                    std::path::absolute(path).map_err(PipelineError::io("resolve", path))?;
                let metadata = fs_err::metadata(&absolute).map_err(PipelineError::read(path))?;
                let seen = Seen::of(&metadata);
                let known = self
                    .entries
                    .get(key(&absolute).as_ref())
                    .filter(|entry| entry.can_be_believed(seen))
                    .map(|entry| entry.digest.clone());
                Ok((absolute, seen, known))
            })
            .collect::<Result<_, PipelineError>>()?;

        let bytes_to_hash: u64 = looked_up
            .iter()
            .filter(|(_, _, known)| known.is_none())
            .map(|(_, seen, _)| seen.size_bytes.div_ceil(1 << 20))
            .sum();
        let job = self.progress.job("hash files", bytes_to_hash, "MiB");
        let hashed: Vec<(Entry, bool)> = looked_up
            .par_iter()
            .map(|(path, seen, known)| match known {
                Some(digest) => Ok((
                    Entry {
                        seen: *seen,
                        hashed_at_ns: 0,
                        digest: digest.clone(),
                    },
                    false,
                )),
                None => {
                    let hashed_at_ns = since_epoch().as_nanos();
                    let digest = hash_file(path, |mib| job.advance(mib))
                        .map_err(PipelineError::read(path))?;
                    let entry = Entry {
                        seen: *seen,
                        hashed_at_ns,
                        digest,
                    };
                    Ok((entry, true))
                }
            })
            .collect::<Result<_, PipelineError>>()?;

        let mut digests = Vec::with_capacity(paths.len());
        for ((path, _, _), (entry, is_new)) in looked_up.iter().zip(hashed) {
            digests.push(entry.digest.clone());
            if is_new {
                self.entries.insert(key(path).into_owned(), entry);
                self.changed = true;
            }
        }
        Ok(digests)
    }

    /// Writes the cache if it learned something. A directory that refuses is no error: the cache is a convenience.
    pub fn save(&mut self) {
        if !self.changed {
            return;
        }
        self.entries
            .retain(|path, _| Path::new(path).symlink_metadata().is_ok());
        match write_json_atomically(&self.file, &self.entries) {
            Ok(()) => self.changed = false,
            Err(error) => tracing::debug!(%error, "digest cache not written"),
        }
    }
}

fn key(path: &Path) -> std::borrow::Cow<'_, str> {
    path.to_string_lossy()
}

fn hash_file(path: &Path, advance_mib: impl Fn(u64)) -> io::Result<String> {
    let mut file = fs_err::File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let size_bytes = file.metadata()?.len();
    let buffer_bytes = usize::try_from(size_bytes.clamp(1, CHUNK_BYTES as u64))
        .expect("clamped to a size that fits");
    let mut buffer = vec![0; buffer_bytes];
    loop {
        let read = read_full(&mut file, &mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update_rayon(&buffer[..read]);
        advance_mib((read as u64).div_ceil(1 << 20));
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Fills `buffer` unless the file ends first.
fn read_full(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(dir: &Path) -> DigestCache {
        DigestCache::open(dir, Progress::silent())
    }

    fn digest(cache: &mut DigestCache, path: &Path) -> String {
        cache
            .digests(&[path.to_owned()])
            .expect("readable")
            .remove(0)
    }

    /// Makes the cached entry look as if it had been hashed an hour after the file was written.
    fn let_it_rest(cache: &mut DigestCache) {
        for entry in cache.entries.values_mut() {
            entry.hashed_at_ns += 3_600_000_000_000;
        }
    }

    #[test]
    fn a_digest_is_blake3_of_the_content() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("f");
        fs_err::write(&file, b"sprite").expect("written");
        let found = digest(&mut cache(dir.path()), &file);
        assert_eq!(found, blake3::hash(b"sprite").to_hex().to_string());
    }

    #[test]
    fn a_file_that_had_not_rested_is_hashed_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("f");
        fs_err::write(&file, b"one").expect("written");
        let mut cache = cache(dir.path());
        digest(&mut cache, &file);
        let key = key(&file).into_owned();
        cache.entries.get_mut(&key).expect("cached").digest = "stale".into();
        assert_ne!(digest(&mut cache, &file), "stale");
    }

    #[test]
    fn a_file_that_had_rested_is_not_read_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("f");
        fs_err::write(&file, b"one").expect("written");
        let mut cache = cache(dir.path());
        digest(&mut cache, &file);
        let_it_rest(&mut cache);
        let key = key(&file).into_owned();
        cache.entries.get_mut(&key).expect("cached").digest = "remembered".into();
        assert_eq!(digest(&mut cache, &file), "remembered");
    }

    #[test]
    fn same_size_and_time_with_other_content_is_noticed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("f");
        fs_err::write(&file, b"one").expect("written");
        let modified = fs_err::metadata(&file)
            .and_then(|metadata| metadata.modified())
            .expect("has a time");
        let mut cache = cache(dir.path());
        let before = digest(&mut cache, &file);
        let_it_rest(&mut cache);
        fs_err::write(&file, b"two").expect("written");
        let handle = std::fs::File::options()
            .write(true)
            .open(&file)
            .expect("opened");
        handle.set_modified(modified).expect("time set back");
        assert_ne!(digest(&mut cache, &file), before);
    }

    #[test]
    fn a_file_that_vanished_is_bad_input() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let gone = dir.path().join("gone.png");
        let error = cache(dir.path()).digests(&[gone]).expect_err("not there");
        assert!(
            matches!(error, PipelineError::NotReadable { .. }),
            "{error}"
        );
    }

    #[test]
    fn a_damaged_or_deleted_cache_is_an_empty_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("f");
        fs_err::write(&file, b"one").expect("written");
        let mut first = cache(dir.path());
        let before = digest(&mut first, &file);
        first.save();
        assert_eq!(cache(dir.path()).entries.len(), 1);
        fs_err::write(dir.path().join(".digest-cache.json"), b"{not json").expect("written");
        assert_eq!(digest(&mut cache(dir.path()), &file), before);
    }
}
