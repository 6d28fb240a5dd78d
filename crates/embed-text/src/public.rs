//! Embeddings made elsewhere with the public recipe's `compute_embeddings.py`, one Parquet file or a folder of them.
//!
//! Its rows belong to images: the key is the SHA-256 of PIL's raw buffer, taken before or after EXIF turning depending on
//! the data loader's version, so both are tried. The files do not say which captions or encoders they were made from;
//! sizes are checked, and images that share a caption must agree, as must files that have the same image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use artifacts::{
    CaptionRow, PublicEmbedding, PublicEmbeddings, SampleRow, TextEmbeddingRow,
    read_public_embeddings,
};
use pipeline::{StageContext, StageReport, list_source};

use crate::captions::{Captions, Texts};
use crate::error::EmbedTextError;
use crate::table::{Table, to_half};

/// Two embeddings of one caption may differ by this much (norm of the difference over norm): half precision on
/// different cards, not different words.
const SAME_CAPTION: f64 = 1e-2;

/// Fills the table from public embeddings.
pub(crate) fn import(
    context: &StageContext,
    source: &Path,
    captions: &Captions,
    texts: &Texts,
    mut table: Table,
    report: StageReport,
) -> Result<(Table, StageReport), EmbedTextError> {
    let files = open(context, source)?;
    let found = align(source, &files, captions)?;
    let job = context.progress.job(
        "import embeddings",
        captions.by_hash.len() as u64,
        "captions",
    );
    for (hash, caption) in &captions.by_hash {
        let mut chosen: Option<(&SampleRow, PublicEmbedding)> = None;
        for &(sample, file, key) in &found[hash.as_str()] {
            let Some(embedding) = files[file].1.get(key)? else {
                continue;
            };
            match &chosen {
                None => chosen = Some((sample, embedding)),
                Some((first, kept)) if !agree(kept, &embedding) => {
                    return Err(EmbedTextError::PublicConflict {
                        caption: caption.clone(),
                        first: first.source_file.clone(),
                        second: sample.source_file.clone(),
                    });
                }
                Some(_) => {}
            }
        }
        let (_, embedding) =
            chosen.expect("every caption belongs to an image, and every image has a row");
        let row = TextEmbeddingRow {
            caption: caption.clone(),
            num_t5_tokens: texts.tokens[hash].num_t5_tokens,
            embedding: to_half(caption, &embedding.t5, &embedding.pooled)?,
        };
        table.push(hash, row)?;
        job.advance(1);
    }
    let report = report
        .count("imported", captions.by_hash.len() as u64)
        .note(format!(
            "embeddings come from {}; such files do not say which captions and encoders they were made from",
            source.display()
        ));
    Ok((table, report))
}

/// Opens all files and checks their sizes against recipe and base.
fn open(
    context: &StageContext,
    source: &Path,
) -> Result<Vec<(PathBuf, PublicEmbeddings)>, EmbedTextError> {
    let paths: Vec<PathBuf> = list_source(source)?
        .into_iter()
        .map(|file| file.path)
        .filter(|path| {
            source.is_file() || path.extension().is_some_and(|ending| ending == "parquet")
        })
        .collect();
    if paths.is_empty() {
        return Err(EmbedTextError::NoPublicFiles {
            path: source.to_path_buf(),
        });
    }
    let header = crate::header(context)?;
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        let embeddings = read_public_embeddings(&path)?;
        if !embeddings.is_empty() {
            for (what, found, expected_by, expected) in [
                (
                    "T5 tokens",
                    embeddings.t5_tokens(),
                    "embed_text.t5_tokens",
                    header.t5_tokens,
                ),
                (
                    "numbers in a T5 state",
                    embeddings.t5_width(),
                    "the base's T5 encoder",
                    header.t5_width,
                ),
                (
                    "numbers in a pooled vector",
                    embeddings.pooled_width(),
                    "the base's CLIP encoder",
                    header.pooled_width,
                ),
            ] {
                if found != expected {
                    return Err(EmbedTextError::PublicSize {
                        path,
                        what,
                        found,
                        expected_by,
                        expected,
                    });
                }
            }
        }
        files.push((path, embeddings));
    }
    Ok(files)
}

/// For every caption hash its images, each with file and key of its row.
type Aligned<'a> = BTreeMap<&'a str, Vec<(&'a SampleRow, usize, &'a str)>>;

fn align<'a>(
    source: &Path,
    files: &[(PathBuf, PublicEmbeddings)],
    captions: &'a Captions,
) -> Result<Aligned<'a>, EmbedTextError> {
    let mut files_of: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, (_, embeddings)) in files.iter().enumerate() {
        for key in embeddings.keys() {
            files_of.entry(key).or_default().push(index);
        }
    }
    let mut found: Aligned<'a> = BTreeMap::new();
    let mut missing: Vec<&SampleRow> = Vec::new();
    let mut row_of: BTreeMap<&str, (&SampleRow, &CaptionRow)> = BTreeMap::new();
    for row in &captions.rows {
        let sample = &captions.samples[&row.sample_id]; // checked when they were read
        let keys = [
            sample.compat_sha256.as_str(),
            sample.compat_sha256_oriented.as_str(),
        ];
        match keys
            .into_iter()
            .find_map(|key| files_of.get(key).map(|files| (files, key)))
        {
            Some((places, key)) => {
                let file = the_same_in_all(files, places, key, sample)?;
                let (other, caption) = *row_of.entry(key).or_insert((sample, row));
                if caption.caption_hash != row.caption_hash {
                    return Err(EmbedTextError::PublicShared {
                        first: other.source_file.clone(),
                        first_caption: caption.caption.clone(),
                        second: sample.source_file.clone(),
                        second_caption: row.caption.clone(),
                        hash: key.to_owned(),
                    });
                }
                found
                    .entry(&row.caption_hash)
                    .or_default()
                    .push((sample, file, key));
            }
            None => missing.push(sample),
        }
    }
    if let Some(first) = missing.first() {
        return Err(EmbedTextError::PublicMissing {
            path: source.to_path_buf(),
            missing: missing.len(),
            images: captions.rows.len(),
            source_file: first.source_file.clone(),
            compat_sha256: first.compat_sha256.clone(),
            compat_sha256_oriented: first.compat_sha256_oriented.clone(),
        });
    }
    Ok(found)
}

/// The first of the files that have a row of `key`, if all have the same there.
fn the_same_in_all(
    files: &[(PathBuf, PublicEmbeddings)],
    places: &[usize],
    key: &str,
    sample: &SampleRow,
) -> Result<usize, EmbedTextError> {
    let row = |file: usize| files[file].1.get(key);
    for &other in &places[1..] {
        if let (Some(first), Some(second)) = (row(places[0])?, row(other)?)
            && !agree(&first, &second)
        {
            return Err(EmbedTextError::PublicTwice {
                first: files[places[0]].0.clone(),
                second: files[other].0.clone(),
                hash: key.to_owned(),
                source_file: sample.source_file.clone(),
            });
        }
    }
    Ok(places[0])
}

fn agree(a: &PublicEmbedding, b: &PublicEmbedding) -> bool {
    let close = |a: &[f32], b: &[f32]| {
        let square = |x: f64| x * x;
        let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
        let norm: f64 = a.iter().map(|a| square(f64::from(*a))).sum();
        difference <= square(SAME_CAPTION) * norm
    };
    close(&a.t5, &b.t5) && close(&a.pooled, &b.pooled)
}

#[cfg(test)]
mod tests {
    use artifacts::captions::caption_hash;

    use super::*;

    /// Palette swaps have one recipe hash: it is the SHA-256 of indices, without the palette.
    #[test]
    fn images_with_one_hash_and_different_captions_are_refused() {
        let public = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../artifacts/tests/fixtures/public-embeddings.parquet"
        );
        let embeddings = read_public_embeddings(Path::new(public)).expect("a sound file");
        let hash = embeddings.keys().next().expect("it has rows").to_owned();
        let files = [(PathBuf::from(public), embeddings)];
        let captions = |texts: [&str; 2]| {
            let mut captions = Captions {
                by_hash: BTreeMap::new(),
                rows: Vec::new(),
                samples: BTreeMap::new(),
            };
            for (i, caption) in texts.into_iter().enumerate() {
                let (sample_id, caption_hash) = (format!("{i:064}"), caption_hash(caption));
                let sample = SampleRow {
                    sample_id: sample_id.clone(),
                    compat_sha256: hash.clone(),
                    compat_sha256_oriented: hash.clone(),
                    width_px: 1,
                    height_px: 1,
                    has_alpha: false,
                    num_colors: 1,
                    source_file: format!("{i}.png"),
                    source_row: None,
                };
                captions.samples.insert(sample_id.clone(), sample);
                captions
                    .by_hash
                    .insert(caption_hash.clone(), caption.to_owned());
                captions.rows.push(CaptionRow {
                    sample_id,
                    caption_hash,
                    caption: caption.to_owned(),
                });
            }
            captions
        };
        let one = captions(["a red knight", "a red knight"]);
        let found = align(Path::new(public), &files, &one).expect("one caption");
        assert_eq!(found.values().map(Vec::len).collect::<Vec<_>>(), [2]);
        let two = captions(["a red knight", "a blue knight"]);
        let error = align(Path::new(public), &files, &two).expect_err("one row, two captions");
        let text = error.to_string();
        assert!(
            text.contains("0.png (\"a red knight\") and 1.png (\"a blue knight\") have one hash"),
            "{text}"
        );
    }

    #[test]
    fn rounding_is_agreement_and_other_words_are_not() {
        let embedding = |t5: [f32; 2]| PublicEmbedding {
            t5: t5.to_vec(),
            pooled: vec![1.0],
        };
        assert!(agree(&embedding([3.0, 4.0]), &embedding([3.01, 4.0])));
        assert!(!agree(&embedding([3.0, 4.0]), &embedding([3.0, 3.0])));
    }
}
