//! Latents into pictures, and pictures into files: PNGs that say how they were made, a contact sheet, an index.

use std::io::Write as _;
use std::path::Path;

use artifacts::{Digest, Hasher, ImageEntry, write_atomically};
use autoencoder::Autoencoder;
use pipeline::recipe::SampleRecipe;
use pixel_art::{
    Rgb8, Rgba8, SheetEntry, SheetStyle, contact_sheet, encode_png_rgb, from_model_range,
};
use serde::{Deserialize, Serialize};
use tensor::{Tensor, to_f32};

use crate::error::SampleError;
use crate::parameters::{JSON_KEYWORD, PARAMETERS_KEYWORD, Parameters, Settings};
use crate::plan::Pass;

/// Space between the pictures of a sheet.
const SHEET_GAP_PX: u32 = 8;

/// Most lines of a prompt below its picture.
const SHEET_LABEL_LINES: u32 = 6;

/// A sheet may be so large, or as large as the pictures are together.
const SHEET_MAX_PIXELS: u64 = 1 << 30;

/// PNG's largest side.
const SHEET_MAX_SIDE_PX: u64 = (1 << 31) - 1;

fn style(columns: u32, magnify: u32) -> SheetStyle {
    SheetStyle {
        columns,
        magnify,
        gap_px: SHEET_GAP_PX,
        label_lines: SHEET_LABEL_LINES,
        background: [32, 32, 36],
        ink: [224, 224, 224],
    }
}

/// Whether the sheets that the recipe wants of `count` pictures can be made, before any is drawn.
///
/// # Errors
///
/// [`SampleError::Sheet`] if they are too large.
pub fn check_sheets(recipe: &SampleRecipe, count: usize) -> Result<(), SampleError> {
    let (width_px, height_px) = (recipe.width_px, recipe.height_px);
    let count = if recipe.compare_with_base {
        2 * count
    } else {
        count
    };
    let size =
        |magnify| style(recipe.sheet_columns, magnify).largest_size_px(count, width_px, height_px);
    let area = |[w, h]: [u64; 2]| w.saturating_mul(h);
    let [w, h] = size(recipe.sheet_magnify);
    let most = SHEET_MAX_PIXELS.max(area(size(1)));
    if area([w, h]) <= most && w.max(h) <= SHEET_MAX_SIDE_PX {
        return Ok(());
    }
    Err(SampleError::Sheet {
        count,
        columns: recipe.sheet_columns,
        magnify: recipe.sheet_magnify,
        width_px: w,
        height_px: h,
    })
}

/// Decodes latents as the transformer leaves them: tokens `(b, n, 4c)` of `latent_cells` rows and columns.
///
/// Waits for the device.
///
/// # Errors
///
/// [`NotFinite`] if a latent or what the VAE makes of it is infinite or no number: 8 bits would turn that to black.
///
/// # Panics
///
/// If the tokens are not of that many cells or of the VAE's channels.
pub fn decode(
    vae: &Autoencoder,
    tokens: Tensor<3>,
    latent_cells: [usize; 2],
) -> Result<Vec<Rgb8>, NotFinite> {
    let [h, w] = latent_cells;
    let all_finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    if !all_finite(&to_f32(&tokens)) {
        return Err(NotFinite::Latents);
    }
    let latents = mmdit::unpatchify(tokens, h, w); // b c h w
    let pictures = vae.decode(vae.config().from_model(latents)); // b 3 f·h f·w
    let [_, _, height_px, width_px] = pictures.dims();
    let values = to_f32(&pictures);
    if !all_finite(&values) {
        return Err(NotFinite::Pixels);
    }
    Ok(values
        .chunks_exact(3 * height_px * width_px)
        .map(|planes| from_model_range(planes, width_px as u32, height_px as u32))
        .collect())
}

/// Numbers that are no picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFinite {
    /// The transformer's.
    #[error("its latents are not finite")]
    Latents,
    /// The VAE's.
    #[error("what the VAE makes of its latents is not finite")]
    Pixels,
}

/// A finished picture.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Its file's name.
    pub file: String,
    /// Whether LoRAs had a part in it.
    pub pass: Pass,
    /// Its pixels.
    pub image: Rgb8,
    /// How it was made.
    pub parameters: Parameters,
}

/// `images.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// What all pictures have in common (pictures of the base alone lack the LoRAs).
    pub settings: Settings,
    /// The pictures in the order of their numbers; those of the base alone last.
    pub images: Vec<ImageEntry>,
}

impl Picture {
    /// BLAKE3 of the pixels.
    pub fn digest(&self) -> Digest {
        artifacts::digest_bytes(&self.image.pixels)
    }

    /// Writes the PNG into `dir`.
    ///
    /// # Errors
    ///
    /// If the directory or the disk refuses.
    pub fn write(&self, dir: &Path) -> Result<(), SampleError> {
        let (json, text) = (self.parameters.to_json(), self.parameters.to_text());
        let texts = [
            (JSON_KEYWORD, json.as_str()),
            (PARAMETERS_KEYWORD, text.as_str()),
        ];
        write_png(&dir.join(&self.file), &self.image, &texts)
    }
}

/// Writes all pictures on one sheet, each over its prompt and, if there are several, its seed.
///
/// # Errors
///
/// If the directory or the disk refuses.
///
/// # Panics
///
/// If there are no pictures, or `columns` or `magnify` is 0.
pub fn write_sheet(
    path: &Path,
    pictures: &[Picture],
    columns: u32,
    magnify: u32,
) -> Result<(), SampleError> {
    let several = several_seeds(pictures);
    let cells = pictures
        .iter()
        .map(|picture| (picture.image.clone().into_rgba(), label(picture, several)))
        .collect();
    write_cells(path, cells, columns, magnify)
}

/// Writes the base's pictures and those with LoRAs side by side, pair by pair. As many pairs stand in a row as fit into
/// `columns` pictures, at least one.
///
/// # Errors
///
/// If the directory or the disk refuses.
///
/// # Panics
///
/// If there are no pictures or not as many of each, or `magnify` is 0.
pub fn write_comparison(
    path: &Path,
    before: &[Picture],
    after: &[Picture],
    columns: u32,
    magnify: u32,
) -> Result<(), SampleError> {
    assert_eq!(before.len(), after.len(), "pictures before and after");
    let several = several_seeds(after);
    let cells = before
        .iter()
        .zip(after)
        .flat_map(|pair| {
            [("BASE", pair.0), ("LORA", pair.1)].map(|(side, picture)| {
                let label = format!("{side} {}", label(picture, several));
                (picture.image.clone().into_rgba(), label)
            })
        })
        .collect();
    write_cells(path, cells, (columns / 2).max(1) * 2, magnify)
}

fn several_seeds(pictures: &[Picture]) -> bool {
    pictures
        .iter()
        .any(|picture| picture.parameters.seed != pictures[0].parameters.seed)
}

fn label(picture: &Picture, with_seed: bool) -> String {
    let parameters = &picture.parameters;
    if with_seed {
        format!("s{} {}", parameters.seed, parameters.prompt)
    } else {
        parameters.prompt.clone()
    }
}

fn write_cells(
    path: &Path,
    cells: Vec<(Rgba8, String)>,
    columns: u32,
    magnify: u32,
) -> Result<(), SampleError> {
    let entries: Vec<SheetEntry> = cells
        .iter()
        .map(|(picture, label)| SheetEntry { picture, label })
        .collect();
    let sheet = contact_sheet(&entries, &style(columns, magnify));
    write_png(path, &sheet, &[])
}

/// Writes the index.
///
/// # Errors
///
/// If the directory or the disk refuses.
pub fn write_index(
    path: &Path,
    settings: &Settings,
    pictures: &[Picture],
) -> Result<(), SampleError> {
    let index = Index {
        settings: settings.clone(),
        images: pictures
            .iter()
            .map(|picture| ImageEntry {
                file: picture.file.clone(),
                prompt: picture.parameters.prompt.clone(),
                seed: picture.parameters.seed,
                image: picture.parameters.image,
                without_loras: picture.pass == Pass::BaseAlone,
                pixels: picture.digest().to_string(),
            })
            .collect(),
    };
    let mut json =
        serde_json::to_string_pretty(&index).expect("strings, numbers and lists are always JSON");
    json.push('\n');
    write_atomically(path, |file| file.write_all(json.as_bytes()))?;
    Ok(())
}

/// One digest over the pictures' names, sizes and pixels, in order.
pub fn digest_of_all(pictures: &[Picture]) -> Digest {
    let mut hasher = Hasher::new();
    for picture in pictures {
        hasher.update(picture.file.as_bytes());
        hasher.update(&[0]);
        hasher.update(&picture.image.width_px.to_le_bytes());
        hasher.update(&picture.image.height_px.to_le_bytes());
        hasher.update(picture.digest().as_bytes());
    }
    hasher.finish()
}

fn write_png(path: &Path, picture: &Rgb8, texts: &[(&str, &str)]) -> Result<(), SampleError> {
    let bytes = encode_png_rgb(picture, texts).map_err(|source| SampleError::Png {
        path: path.to_owned(),
        source,
    })?;
    write_atomically(path, |file| file.write_all(&bytes))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::tests::parameters;
    use pixel_art::read_png_text;

    fn picture(seed: u64) -> Picture {
        let mut parameters = parameters();
        parameters.seed = seed;
        Picture {
            file: format!("0000-a-knight-s{seed}.png"),
            pass: Pass::WithLoras,
            image: Rgb8::filled(64, 96, [10, 20, seed as u8]),
            parameters,
        }
    }

    #[test]
    fn a_picture_tells_how_it_was_made() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let picture = picture(7);
        picture.write(dir.path()).expect("written");
        let bytes = fs_err::read(dir.path().join(&picture.file)).expect("there");
        let texts = read_png_text(&bytes).expect("a whole PNG");
        let text = |keyword| {
            let found = texts.iter().find(|(k, _)| k == keyword);
            found
                .map(|(_, text)| text.as_str())
                .expect("the keyword is there")
        };
        let json: Parameters = serde_json::from_str(text(JSON_KEYWORD)).expect("JSON");
        assert_eq!(json, picture.parameters);
        assert_eq!(text(PARAMETERS_KEYWORD), picture.parameters.to_text());
    }

    #[test]
    fn equal_pictures_are_equal_bytes() {
        let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a temporary directory"));
        let bytes = dirs.each_ref().map(|dir| {
            picture(7).write(dir.path()).expect("written");
            fs_err::read(dir.path().join(picture(7).file)).expect("there")
        });
        assert_eq!(bytes[0], bytes[1]);
    }

    #[test]
    fn the_index_lists_every_picture_once() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let pictures = [picture(1), picture(2)];
        let path = dir.path().join("images.json");
        write_index(&path, &pictures[0].parameters.settings, &pictures).expect("written");
        let index: Index =
            serde_json::from_slice(&fs_err::read(&path).expect("there")).expect("JSON");
        let seeds: Vec<u64> = index.images.iter().map(|entry| entry.seed).collect();
        assert_eq!(seeds, [1, 2]);
        assert_ne!(index.images[0].pixels, index.images[1].pixels);
    }

    #[test]
    fn a_comparison_sheet_has_whole_pairs_in_its_rows() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("pairs.png");
        let (before, after) = ([picture(1), picture(2)], [picture(3), picture(4)]);
        write_comparison(&path, &before, &after, 3, 1).expect("written");
        let limits = pixel_art::Limits {
            max_pixels: 1 << 20,
        };
        let bytes = fs_err::read(&path).expect("there");
        let sheet = pixel_art::decode(&bytes, &limits).expect("a PNG").picture;
        assert_eq!(sheet.width_px, 2 * 64 + 3 * SHEET_GAP_PX);
        let sheet = sheet.drop_alpha();
        let second_row = (sheet.height_px + SHEET_GAP_PX) / 2;
        assert_eq!(sheet.pixel(SHEET_GAP_PX, SHEET_GAP_PX), [10, 20, 1]);
        assert_eq!(
            sheet.pixel(2 * SHEET_GAP_PX + 64, SHEET_GAP_PX),
            [10, 20, 3]
        );
        assert_eq!(sheet.pixel(SHEET_GAP_PX, second_row), [10, 20, 2]);
    }

    #[test]
    fn the_digest_follows_pixels_and_order() {
        let (one, two) = (picture(1), picture(2));
        let forth = digest_of_all(&[one.clone(), two.clone()]);
        assert_eq!(forth, digest_of_all(&[one.clone(), two.clone()]));
        assert_ne!(forth, digest_of_all(&[two, one]));
    }
}
