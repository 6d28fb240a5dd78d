//! All images together: duplicates are taken once, contradictions stop the stage, and rows get their final order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use artifacts::captions::caption_hash;
use artifacts::{CaptionRow, Digest, Hasher, RejectRow, SampleRow};
use sources::{LISTED, Problem, place};

use crate::check::{Checked, Taken};
use crate::error::{Conflict, IngestError};

/// The same picture with the same caption is already there. No failure, so not counted as one.
const DUPLICATE: &str = "duplicate";

/// The three tables.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    /// Sorted by sample id.
    pub samples: Vec<SampleRow>,
    /// Sorted by sample id, one each.
    pub captions: Vec<CaptionRow>,
    /// Sorted by place.
    pub rejects: Vec<RejectRow>,
    /// Rejects that are only duplicates.
    pub num_duplicates: u64,
}

/// What later stages can see of the tables.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Digests {
    pub samples: Digest,
    pub captions: Digest,
    pub pairs: Digest,
    pub compat_hashes: Digest,
}

impl Collected {
    /// Sorts the images by what became of them. Of duplicates the one with the first place is taken.
    pub fn new(checked: Vec<Checked>) -> Result<Self, IngestError> {
        let mut collected = Self::default();
        let mut taken: BTreeMap<String, Vec<Taken>> = BTreeMap::new();
        for image in checked {
            match image {
                Ok(image) => taken
                    .entry(image.sample.sample_id.clone())
                    .or_default()
                    .push(image),
                Err(reject) => collected.rejects.push(reject),
            }
        }
        let mut conflicts = Vec::new();
        for (sample_id, mut images) in taken {
            images.sort_by(|a, b| place_of(a).cmp(&place_of(b)));
            let mut images = images.into_iter();
            let Some(first) = images.next() else { continue };
            let first_place = place(&first.sample.source_file, first.sample.source_row);
            let mut is_contradicted = false;
            for again in images {
                let sample = &again.sample;
                if again.caption == first.caption {
                    collected.num_duplicates += 1;
                    let detail = format!("the same picture with the same caption is {first_place}");
                    collected.rejects.push(
                        Problem::new(DUPLICATE, detail).at(&sample.source_file, sample.source_row),
                    );
                } else if !is_contradicted {
                    is_contradicted = true;
                    conflicts.push(Conflict {
                        sample_id: sample_id.clone(),
                        first: first_place.clone(),
                        first_caption: first.caption.clone(),
                        second: place(&sample.source_file, sample.source_row),
                        second_caption: again.caption,
                    });
                }
            }
            collected.captions.push(CaptionRow {
                sample_id,
                caption_hash: caption_hash(&first.caption),
                caption: first.caption,
            });
            collected.samples.push(first.sample);
        }
        if !conflicts.is_empty() {
            let count = conflicts.len();
            conflicts.sort_by(|a, b| a.first.cmp(&b.first));
            conflicts.truncate(LISTED);
            return Err(IngestError::TwoCaptions { conflicts, count });
        }
        collected.rejects.sort_by(|a, b| {
            let key = |row: &RejectRow| {
                (
                    row.source_file.clone(),
                    row.source_row,
                    row.reason.clone(),
                    row.detail.clone(),
                )
            };
            key(a).cmp(&key(b))
        });
        Ok(collected)
    }

    /// Images left out that are no mere duplicates.
    pub fn num_rejects(&self) -> u64 {
        self.rejects.len() as u64 - self.num_duplicates
    }

    /// Captions, each counted once.
    pub fn num_distinct_captions(&self) -> u64 {
        self.caption_hashes().len() as u64
    }

    /// Whether enough is left to go on.
    pub fn check_rejects(&self, source: &Path, max_rejects: u64) -> Result<(), IngestError> {
        let count = self.num_rejects();
        let listed = || -> Vec<RejectRow> {
            let failures = self.rejects.iter().filter(|row| row.reason != DUPLICATE);
            failures.take(LISTED).cloned().collect()
        };
        if count > max_rejects {
            return Err(IngestError::TooManyRejects {
                count,
                max_rejects,
                listed: listed(),
            });
        }
        if self.samples.is_empty() {
            return Err(IngestError::NoSamples {
                path: source.to_path_buf(),
                count,
                listed: listed(),
            });
        }
        Ok(())
    }

    /// Logical digests: over the rows' content in sorted order, whatever the tables' bytes are.
    pub fn digests(&self) -> Digests {
        let mut samples = Hasher::new();
        let mut pairs = Hasher::new();
        let mut compat_hashes = Hasher::new();
        for row in &self.samples {
            samples
                .field(row.sample_id.as_bytes())
                .update(&row.width_px.to_le_bytes())
                .update(&row.height_px.to_le_bytes());
            compat_hashes
                .field(row.sample_id.as_bytes())
                .field(row.compat_sha256.as_bytes())
                .field(row.compat_sha256_oriented.as_bytes());
        }
        for row in &self.captions {
            pairs
                .field(row.sample_id.as_bytes())
                .field(row.caption_hash.as_bytes());
        }
        let mut captions = Hasher::new();
        for hash in self.caption_hashes() {
            captions.field(hash.as_bytes());
        }
        Digests {
            samples: samples.finish(),
            captions: captions.finish(),
            pairs: pairs.finish(),
            compat_hashes: compat_hashes.finish(),
        }
    }

    fn caption_hashes(&self) -> BTreeSet<&str> {
        let rows = self.captions.iter();
        rows.map(|row| row.caption_hash.as_str()).collect()
    }
}

fn place_of(image: &Taken) -> (&str, Option<u32>) {
    (&image.sample.source_file, image.sample.source_row)
}
