//! Which of the three layouts a source has, and every image of it with its caption.
//!
//! - Any `metadata.jsonl` or `metadata.csv` in the folder or below: they name the images, relative to themselves.
//! - Else `.parquet` files: a Hugging Face data set of one or many shards.
//! - Else images, each with a `.txt` file of the same name beside it.
//!
//! Parquet files beside either of the others are refused: half of the data would be left out without a word.
//!
//! Only what [`pipeline::list_source`] lists is read, because only that is fingerprinted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use artifacts::{ParquetImage, ParquetImages, SourceImages};
use pipeline::list_source;
use pipeline::recipe::IngestRecipe;
use rayon::prelude::*;

use crate::check::{Checked, Checker};
use crate::error::IngestError;
use crate::metadata;
use crate::reason::{
    CAPTION_NOT_TEXT, MISSING_CAPTION, MISSING_IMAGE, PATH_ESCAPES, Problem, UNREADABLE,
};

/// Endings of files that are taken for images; some are not read, so that they show up among the rejects.
const IMAGE_ENDINGS: [&str; 12] = [
    "png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "jxl", "heic", "tga",
];
/// Encoded Parquet rows that wait together for the threads.
const BATCH_BYTES: usize = 32 << 20;
/// … and never more of them than this.
const BATCH_ROWS: usize = 512;
/// A caption file longer than this is no caption.
const MAX_CAPTION_BYTES: u64 = 1 << 20;
/// Files named in a message about what is there.
const NAMED: usize = 5;

/// A source's images.
pub(crate) enum Layout {
    /// Each in a file of its own.
    Files {
        images: SourceImages,
        entries: Vec<Entry>,
        notes: Vec<String>,
    },
    /// Rows of Parquet files.
    Tables {
        images: ParquetImages,
        /// Name of each file, relative to the source.
        names: Vec<String>,
    },
}

/// An image in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Relative to the source, with `/`; as written in the metadata if it is no such path.
    pub file: String,
    pub caption: Result<String, Problem>,
}

impl Layout {
    /// Finds the layout and every image; no image is opened yet.
    pub fn open(recipe: &IngestRecipe) -> Result<Self, IngestError> {
        let source = &recipe.source;
        let listed: BTreeMap<String, PathBuf> = list_source(source)?
            .into_iter()
            .map(|file| (file.name, file.path))
            .collect();
        let of_ending = |accepts: fn(&str) -> bool| -> Vec<&String> {
            listed
                .keys()
                .filter(|name| accepts(&ending(name)))
                .collect()
        };
        let tables = of_ending(|ending| ending == "parquet");
        let pictures = of_ending(|ending| IMAGE_ENDINGS.contains(&ending));
        if source.is_file() && tables.is_empty() {
            return Err(IngestError::NotParquet {
                path: source.clone(),
            });
        }
        let metadata_files: Vec<&String> = listed
            .keys()
            .filter(|name| matches!(file_name(name), "metadata.jsonl" | "metadata.csv"))
            .collect();
        let files = |entries, notes| Self::Files {
            images: SourceImages::new(source, &recipe.image_column, &recipe.caption_column),
            entries,
            notes,
        };
        if let (Some(parquet), Some(other)) =
            (tables.first(), metadata_files.first().or(pictures.first()))
        {
            return Err(IngestError::Mixed {
                path: source.clone(),
                other: (*other).clone(),
                parquet: (*parquet).clone(),
            });
        }
        if !metadata_files.is_empty() {
            let entries = by_metadata(recipe, &listed, &metadata_files, &pictures)?;
            return Ok(files(entries, Vec::new()));
        }
        match (tables.first(), pictures.first()) {
            (None, None) => Err(IngestError::NoImages {
                path: source.clone(),
                found: listed.keys().take(NAMED).cloned().collect(),
            }),
            (Some(_), _) => {
                let paths: Vec<&PathBuf> = tables.iter().map(|name| &listed[*name]).collect();
                let images =
                    ParquetImages::open(&paths, &recipe.image_column, &recipe.caption_column)?;
                if images.is_empty() {
                    return Err(IngestError::NoRows {
                        path: source.clone(),
                    });
                }
                let names = tables.into_iter().cloned().collect();
                Ok(Self::Tables { images, names })
            }
            (None, Some(_)) => {
                let (entries, notes) = by_text_files(&listed, &pictures);
                Ok(files(entries, notes))
            }
        }
    }

    /// How many images there are.
    pub fn num_images(&self) -> usize {
        match self {
            Self::Files { entries, .. } => entries.len(),
            Self::Tables { images, .. } => images.len(),
        }
    }

    /// What a person should know, a sentence each.
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Files { notes, .. } => notes,
            Self::Tables { .. } => &[],
        }
    }

    /// Checks every image on the current thread pool, in the order of the source.
    pub fn check(&self, checker: &Checker<'_>) -> Result<Vec<Checked>, IngestError> {
        match self {
            Self::Files {
                images, entries, ..
            } => Ok(entries
                .par_iter()
                .with_max_len(1)
                .map(|entry| checker.file(images, &entry.file, entry.caption.as_deref()))
                .collect()),
            Self::Tables { images, names } => {
                let mut checked = Vec::with_capacity(images.len());
                let mut batch: Vec<ParquetImage> = Vec::new();
                let mut batch_bytes = 0;
                for image in images.iter() {
                    let image = image?;
                    batch_bytes += image.bytes.len();
                    batch.push(image);
                    if batch_bytes >= BATCH_BYTES || batch.len() >= BATCH_ROWS {
                        checked.extend(check_rows(&batch, names, checker));
                        batch.clear();
                        batch_bytes = 0;
                    }
                }
                checked.extend(check_rows(&batch, names, checker));
                Ok(checked)
            }
        }
    }
}

fn check_rows(batch: &[ParquetImage], names: &[String], checker: &Checker<'_>) -> Vec<Checked> {
    let missing = Problem::new(MISSING_CAPTION, "its caption is null");
    batch
        .par_iter()
        .with_max_len(1)
        .map(|image| {
            let caption = image.caption.as_deref().ok_or(&missing);
            checker.row(&image.bytes, &names[image.file], image.row, caption)
        })
        .collect()
}

/// The images that metadata files name, and those that none does.
fn by_metadata(
    recipe: &IngestRecipe,
    listed: &BTreeMap<String, PathBuf>,
    metadata_files: &[&String],
    pictures: &[&String],
) -> Result<Vec<Entry>, IngestError> {
    let mut entries = Vec::new();
    let mut folders = BTreeSet::new();
    for name in metadata_files {
        let folder = folder(name);
        if !folders.insert(folder) {
            return Err(IngestError::TwoMetadataFiles {
                folder: recipe.source.join(folder),
            });
        }
        for line in metadata::read(&listed[*name], &recipe.caption_column)? {
            let found = find(&line.file_name, folder, listed, name, line.number);
            entries.push(match found {
                Ok(file) => Entry {
                    file,
                    caption: line.caption,
                },
                Err(problem) => Entry {
                    file: line.file_name,
                    caption: Err(problem),
                },
            });
        }
    }
    let named: BTreeSet<&String> = entries.iter().map(|entry| &entry.file).collect();
    let unnamed: Vec<Entry> = pictures
        .iter()
        .filter(|picture| !named.contains(*picture))
        .map(|picture| Entry {
            file: (*picture).clone(),
            caption: Err(Problem::new(
                MISSING_CAPTION,
                format!("no line of {} names it", metadata_names(metadata_files)),
            )),
        })
        .collect();
    entries.extend(unnamed);
    Ok(entries)
}

fn metadata_names(metadata_files: &[&String]) -> String {
    match metadata_files {
        [one] => (*one).clone(),
        many => format!("the {} metadata files", many.len()),
    }
}

/// The listed file that a metadata line means.
fn find(
    written: &str,
    folder: &str,
    listed: &BTreeMap<String, PathBuf>,
    metadata_name: &str,
    line: u64,
) -> Result<String, Problem> {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for component in Path::new(written).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str().unwrap_or_default()),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(Problem::new(
                    PATH_ESCAPES,
                    format!(
                        "line {line} of {metadata_name} names it; a path must be relative and without \"..\""
                    ),
                ));
            }
        }
    }
    let name = parts.join("/");
    if listed.contains_key(&name) {
        return Ok(name);
    }
    let hint = listed
        .keys()
        .find(|other| other.eq_ignore_ascii_case(&name))
        .map(|other| format!(" (there is {other}: letter case counts)"))
        .unwrap_or_default();
    Err(Problem::new(
        MISSING_IMAGE,
        format!("line {line} of {metadata_name} names it, but there is no such file{hint}"),
    ))
}

/// Images with `.txt` files beside them.
fn by_text_files(
    listed: &BTreeMap<String, PathBuf>,
    pictures: &[&String],
) -> (Vec<Entry>, Vec<String>) {
    let mut used = BTreeSet::new();
    let entries = pictures
        .iter()
        .map(|picture| {
            let text_name = format!("{}.txt", stem(picture));
            let caption = match listed.get(&text_name) {
                Some(path) => read_caption(path),
                None => Err(Problem::new(
                    MISSING_CAPTION,
                    format!("there is no {text_name} beside it"),
                )),
            };
            used.insert(text_name);
            Entry {
                file: (*picture).clone(),
                caption,
            }
        })
        .collect();
    let idle: Vec<&String> = listed
        .keys()
        .filter(|name| ending(name) == "txt" && !used.contains(*name))
        .collect();
    let notes = match idle.first() {
        Some(first) => vec![format!(
            "{} .txt files stand beside no image and were not read (the first is {first})",
            idle.len()
        )],
        None => Vec::new(),
    };
    (entries, notes)
}

fn read_caption(path: &Path) -> Result<String, Problem> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unreadable = |error: std::io::Error| Problem::new(UNREADABLE, format!("{name}: {error}"));
    let size_bytes = std::fs::metadata(path).map_err(unreadable)?.len();
    if size_bytes > MAX_CAPTION_BYTES {
        return Err(Problem::new(
            CAPTION_NOT_TEXT,
            format!("{name} has {size_bytes} bytes; a caption has at most {MAX_CAPTION_BYTES}"),
        ));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|error| Problem::new(CAPTION_NOT_TEXT, format!("{name} is not UTF-8: {error}")))?;
    Ok(text.trim_start_matches('\u{feff}').trim().to_owned())
}

fn file_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The folders of a name, without the last `/`.
fn folder(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// The ending in lower case; empty if there is none.
fn ending(name: &str) -> String {
    match file_name(name).rsplit_once('.') {
        Some((_, ending)) => ending.to_ascii_lowercase(),
        None => String::new(),
    }
}

/// The name without its ending.
fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}
