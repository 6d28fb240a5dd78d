//! Which of the three layouts a source has, and every image of it with its caption.
//!
//! - Any `metadata.jsonl` or `metadata.csv` in the folder or below: they name the images, relative to themselves.
//! - Else `.parquet` files: a Hugging Face data set of one or many shards.
//! - Else images, each with a `.txt` file of the same name beside it.
//!
//! Parquet files beside either of the others are refused: half of the data would be left out without a word.
//!
//! Only what [`pipeline::list_source`] lists is read, because only that is fingerprinted.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use artifacts::{ParquetImage, ParquetImages, SourceImages};
use pipeline::list_source;
use rayon::prelude::*;
use unicode_normalization::UnicodeNormalization as _;

use crate::error::SourceError;
use crate::image::{Content, SourceImage};
use crate::metadata;
use crate::problem::{
    CAPTION_NOT_TEXT, MISSING_CAPTION, MISSING_IMAGE, PATH_ESCAPES, Problem, UNREADABLE,
};
use crate::{SourceKeys, SourceRecipe};

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
pub struct Source {
    keys: &'static SourceKeys,
    layout: Layout,
}

enum Layout {
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
        /// For rows without a caption.
        no_caption: Problem,
    },
}

/// An image in a file.
struct Entry {
    /// Relative to the source, with `/`; as written in the metadata if it is no such path.
    file: String,
    caption: Result<String, Problem>,
}

/// What a source's files are, by their endings.
struct Listing {
    files: BTreeMap<String, PathBuf>,
    tables: Vec<String>,
    pictures: Vec<String>,
    metadata: Vec<String>,
}

impl Source {
    /// Finds the layout and every image; no image is opened yet.
    ///
    /// # Errors
    ///
    /// If the source cannot be listed, has no known layout or more than one, its metadata is damaged, or a column that
    /// the recipe names is nowhere.
    pub fn open(recipe: &SourceRecipe<'_>) -> Result<Self, SourceError> {
        let listing = Listing::of(recipe)?;
        let layout = if !listing.metadata.is_empty() {
            Layout::files(recipe, by_metadata(recipe, &listing)?, Vec::new())
        } else if listing.tables.is_empty() {
            let (entries, notes) = by_text_files(&listing);
            Layout::files(recipe, entries, notes)
        } else {
            Layout::tables(recipe, &listing, true)?
        };
        Ok(Self {
            keys: recipe.keys,
            layout,
        })
    }

    /// Finds every image where no caption is wanted: of a folder each file once, whatever metadata names it, and of
    /// Parquet files the image column.
    ///
    /// # Errors
    ///
    /// If the source cannot be listed, holds no images or two kinds of them, or has no such column.
    pub fn open_pictures(recipe: &SourceRecipe<'_>) -> Result<Self, SourceError> {
        let listing = Listing::of(recipe)?;
        let layout = if listing.tables.is_empty() {
            if listing.pictures.is_empty() {
                return Err(listing.no_images(recipe));
            }
            let entry = |file: &String| Entry {
                file: file.clone(),
                caption: Err(not_wanted()),
            };
            let entries = listing.pictures.iter().map(entry).collect();
            Layout::files(recipe, entries, Vec::new())
        } else {
            Layout::tables(recipe, &listing, false)?
        };
        Ok(Self {
            keys: recipe.keys,
            layout,
        })
    }

    /// How many images there are; one that two lines of metadata name counts twice.
    pub fn num_images(&self) -> usize {
        match &self.layout {
            Layout::Files { entries, .. } => entries.len(),
            Layout::Tables { images, .. } => images.len(),
        }
    }

    /// What a person should know, a sentence each.
    pub fn notes(&self) -> &[String] {
        match &self.layout {
            Layout::Files { notes, .. } => notes,
            Layout::Tables { .. } => &[],
        }
    }

    /// Looks at every image on the current thread pool; results come in the order of the source: files by name, lines
    /// of metadata as written, rows as stored. At most one image per thread and one batch of encoded Parquet rows are
    /// in memory.
    ///
    /// # Errors
    ///
    /// If a Parquet file is damaged. A damaged image is its own [`Problem`].
    pub fn map<T: Send>(
        &self,
        look: impl Fn(&SourceImage<'_>) -> T + Sync,
    ) -> Result<Vec<T>, SourceError> {
        match &self.layout {
            Layout::Files {
                images, entries, ..
            } => Ok(entries
                .par_iter()
                .with_max_len(1)
                .map(|entry| {
                    look(&SourceImage {
                        file: &entry.file,
                        row: None,
                        caption: entry.caption.as_deref(),
                        content: Content::File(images),
                    })
                })
                .collect()),
            Layout::Tables {
                images,
                names,
                no_caption,
            } => {
                let look_at = |batch: &[ParquetImage], seen: &mut Vec<T>| {
                    seen.par_extend(batch.par_iter().with_max_len(1).map(|image| {
                        look(&SourceImage {
                            file: &names[image.file],
                            row: Some(image.row),
                            caption: image.caption.as_deref().ok_or(no_caption),
                            content: Content::Row(&image.bytes),
                        })
                    }));
                };
                let mut seen = Vec::new();
                let mut batch: Vec<ParquetImage> = Vec::new();
                let mut batch_bytes = 0;
                for image in images.iter() {
                    let image = image.map_err(|error| SourceError::of_table(error, self.keys))?;
                    batch_bytes +=
                        image.bytes.len() + image.caption.as_ref().map_or(0, String::len);
                    batch.push(image);
                    if batch_bytes >= BATCH_BYTES || batch.len() >= BATCH_ROWS {
                        look_at(&batch, &mut seen);
                        batch.clear();
                        batch_bytes = 0;
                    }
                }
                look_at(&batch, &mut seen);
                Ok(seen)
            }
        }
    }
}

impl Listing {
    /// Lists a source and sees to it that it has one layout.
    fn of(recipe: &SourceRecipe<'_>) -> Result<Self, SourceError> {
        let (keys, path) = (recipe.keys, recipe.path.to_path_buf());
        let files: BTreeMap<String, PathBuf> = list_source(&path)
            .map_err(|error| SourceError::of_listing(error, keys))?
            .into_iter()
            .map(|file| (file.name, file.path))
            .collect();
        let that = |accepts: fn(&str) -> bool| -> Vec<String> {
            let names = files.keys();
            names.filter(|name| accepts(name)).cloned().collect()
        };
        let tables = that(|name| ending(name) == "parquet");
        let pictures = that(|name| IMAGE_ENDINGS.contains(&ending(name).as_str()));
        let metadata = that(|name| matches!(file_name(name), "metadata.jsonl" | "metadata.csv"));
        if path.is_file() && tables.is_empty() {
            return Err(SourceError::NotParquet { keys, path });
        }
        let listing = Self {
            files,
            tables,
            pictures,
            metadata,
        };
        let other = listing.metadata.first().or(listing.pictures.first());
        match (listing.tables.first(), other) {
            (Some(parquet), Some(other)) => Err(SourceError::Mixed {
                keys,
                path,
                other: other.clone(),
                parquet: parquet.clone(),
            }),
            (None, None) => Err(listing.no_images(recipe)),
            _ => Ok(listing),
        }
    }

    fn no_images(&self, recipe: &SourceRecipe<'_>) -> SourceError {
        SourceError::NoImages {
            keys: recipe.keys,
            path: recipe.path.to_path_buf(),
            found: self.files.keys().take(NAMED).cloned().collect(),
        }
    }
}

impl Layout {
    fn files(recipe: &SourceRecipe<'_>, entries: Vec<Entry>, notes: Vec<String>) -> Self {
        Self::Files {
            images: SourceImages::new(recipe.path, recipe.image_column, recipe.caption_column),
            entries,
            notes,
        }
    }

    fn tables(
        recipe: &SourceRecipe<'_>,
        listing: &Listing,
        with_captions: bool,
    ) -> Result<Self, SourceError> {
        let names = listing.tables.clone();
        let paths: Vec<&PathBuf> = names.iter().map(|name| &listing.files[name]).collect();
        let (images, no_caption) = if with_captions {
            (
                ParquetImages::open(&paths, recipe.image_column, recipe.caption_column),
                Problem::new(MISSING_CAPTION, "its caption is null"),
            )
        } else {
            (
                ParquetImages::open_pictures(&paths, recipe.image_column),
                not_wanted(),
            )
        };
        let images = images.map_err(|error| SourceError::of_table(error, recipe.keys))?;
        if images.is_empty() {
            return Err(SourceError::NoRows {
                path: recipe.path.to_path_buf(),
            });
        }
        Ok(Self::Tables {
            images,
            names,
            no_caption,
        })
    }
}

/// The caption of an image whose source was opened without captions.
fn not_wanted() -> Problem {
    Problem::new(MISSING_CAPTION, "its caption was not read")
}

/// The images that metadata files name, and those that none does.
fn by_metadata(recipe: &SourceRecipe<'_>, listing: &Listing) -> Result<Vec<Entry>, SourceError> {
    let mut entries = Vec::new();
    let mut folders = BTreeSet::new();
    let names = Names::new(&listing.files);
    for name in &listing.metadata {
        let folder = folder(name);
        if !folders.insert(folder) {
            return Err(SourceError::TwoMetadataFiles {
                folder: recipe.path.join(folder),
            });
        }
        for line in metadata::read(&listing.files[name], recipe)? {
            let found = names.find(&line.file_name, folder, name, line.number);
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
    let unnamed: Vec<Entry> = listing
        .pictures
        .iter()
        .filter(|picture| !named.contains(picture))
        .map(|picture| Entry {
            file: picture.clone(),
            caption: Err(Problem::new(
                MISSING_CAPTION,
                format!("no line of {} names it", metadata_names(&listing.metadata)),
            )),
        })
        .collect();
    entries.extend(unnamed);
    Ok(entries)
}

fn metadata_names(metadata_files: &[String]) -> String {
    match metadata_files {
        [one] => one.clone(),
        many => format!("the {} metadata files", many.len()),
    }
}

/// The files of a source, found by what people write.
struct Names<'a> {
    listed: &'a BTreeMap<String, PathBuf>,
    /// Names by how they look; made when first a file is not found.
    by_look: OnceCell<BTreeMap<String, &'a str>>,
}

impl<'a> Names<'a> {
    fn new(listed: &'a BTreeMap<String, PathBuf>) -> Self {
        Self {
            listed,
            by_look: OnceCell::new(),
        }
    }

    /// The listed file that a metadata line means.
    fn find(
        &self,
        written: &str,
        folder: &str,
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
        if self.listed.contains_key(&name) {
            return Ok(name);
        }
        let hint = self.hint(&name).unwrap_or_default();
        Err(Problem::new(
            MISSING_IMAGE,
            format!("line {line} of {metadata_name} names it, but there is no such file{hint}"),
        ))
    }

    /// A file whose name looks like one that is not there, and how they differ.
    fn hint(&self, absent: &str) -> Option<String> {
        let by_look = self.by_look.get_or_init(|| {
            let names = self.listed.keys();
            names.map(|name| (look(name), name.as_str())).collect()
        });
        let there = by_look.get(&look(absent))?;
        let why = if absent.contains('\\') {
            "folders are separated by /"
        } else if there.nfc().eq(absent.nfc()) {
            "its accented letters are other Unicode characters, as macOS writes them"
        } else if there.trim() != absent.trim() {
            "letter case counts"
        } else {
            "spaces count"
        };
        Some(format!(" (there is {there}: {why})"))
    }
}

/// What stays of a name to the eye: composed characters in lower case, `/` between folders.
fn look(name: &str) -> String {
    let composed: String = name.trim().replace('\\', "/").nfc().collect();
    composed.to_lowercase()
}

/// Images with `.txt` files beside them.
fn by_text_files(listing: &Listing) -> (Vec<Entry>, Vec<String>) {
    // Of a.TXT and a.txt the latter is read: it comes later.
    let texts: BTreeMap<&str, &String> = listing
        .files
        .keys()
        .filter(|name| ending(name) == "txt")
        .map(|name| (stem(name), name))
        .collect();
    let mut used = BTreeSet::new();
    let entries = listing
        .pictures
        .iter()
        .map(|picture| {
            let caption = match texts.get(stem(picture)) {
                Some(&text) => {
                    used.insert(text);
                    read_caption(&listing.files[text])
                }
                None => Err(Problem::new(
                    MISSING_CAPTION,
                    format!("there is no {}.txt beside it", stem(picture)),
                )),
            };
            Entry {
                file: picture.clone(),
                caption,
            }
        })
        .collect();
    let idle: Vec<&String> = listing
        .files
        .keys()
        .filter(|name| ending(name) == "txt" && !used.contains(name))
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
