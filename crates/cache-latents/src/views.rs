//! How an image becomes a square picture: scaling, background, crop, flip; all but the pixels known beforehand.
//!
//! `integer-nearest` puts the sprite, every pixel a k×k square, on a canvas of background, in the middle or at a random
//! whole cell. `bilinear-short-side` is the public recipe: short side to the resolution, flip, then the middle or a
//! random crop.

use std::fmt;

use artifacts::SampleRow;
use flow_matching::noise::{Purpose, Stream};
use pipeline::recipe::{Background, CacheLatentsRecipe, Crop, PrecisionChoice, Scaling};
use pixel_art::{Decoded, Rgb8, canvas_grid, half_to_even, place_at, resize_short_side};

use crate::error::CacheLatentsError;

/// Around sprites whose hidden colour shows: the public recipe never leaves space, and black adds no colour.
const NO_BACKGROUND: [u8; 3] = [0, 0, 0];

/// Longest side that a resize may make; a 1×60000 strip at 512 would take 30 million pixels across.
const MAX_SIDE_PX: u64 = 1 << 16;

/// What decides a view's pixels beside the image: two runs of equal geometry (and VAE) have equal latents.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Geometry {
    pub(crate) resolution_px: u32,
    scaling: Scaling,
    background: Background,
    crop: Crop,
    flip_probability: f64,
    seed: u64,
    pub(crate) precision: PrecisionChoice,
}

/// One picture to be encoded.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View<'a> {
    pub(crate) sample: &'a SampleRow,
    /// Which view of the image, counted from 0.
    pub(crate) view: u32,
    /// Whether it is mirrored.
    pub(crate) flipped: bool,
    /// Left edge of the crop in the resized picture, or of the sprite on its canvas.
    pub(crate) x_px: u32,
    /// Top edge, likewise.
    pub(crate) y_px: u32,
}

/// The text that shards and index carry. The number of views is left out: more views leave the others as they are. So is
/// the seed where nothing is drawn.
impl fmt::Display for Geometry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scaling = match self.scaling {
            Scaling::IntegerNearest => "integer-nearest",
            Scaling::BilinearShortSide => "bilinear-short-side",
        };
        let crop = match self.crop {
            Crop::Center => "center",
            Crop::Random => "random",
        };
        let precision = match self.precision {
            PrecisionChoice::F32 => "f32",
            PrecisionChoice::Bf16 => "bf16",
            PrecisionChoice::Fp16 => "fp16",
        };
        let Self {
            resolution_px,
            background,
            flip_probability,
            seed,
            ..
        } = self;
        write!(
            formatter,
            "{scaling} {resolution_px}px background={background} crop={crop} flip={flip_probability} precision={precision}"
        )?;
        if self.draws() {
            write!(formatter, " seed={seed}")?;
        }
        Ok(())
    }
}

impl Geometry {
    pub(crate) fn new(recipe: &CacheLatentsRecipe) -> Self {
        Self {
            resolution_px: recipe.resolution_px,
            scaling: recipe.scaling,
            background: recipe.background,
            crop: recipe.crop,
            flip_probability: recipe.flip_probability,
            seed: recipe.seed,
            precision: recipe.precision,
        }
    }

    /// Whether anything depends on the seed.
    fn draws(&self) -> bool {
        self.crop == Crop::Random || (self.flip_probability > 0.0 && self.flip_probability < 1.0)
    }

    /// All views, image by image in the order of their ids.
    ///
    /// # Errors
    ///
    /// If an image cannot be scaled.
    pub(crate) fn views<'a>(
        &self,
        samples: &'a [SampleRow],
        num_views: u32,
    ) -> Result<Vec<View<'a>>, CacheLatentsError> {
        let mut samples: Vec<&SampleRow> = samples.iter().collect();
        samples.sort_by(|a, b| a.sample_id.cmp(&b.sample_id));
        let mut views = Vec::with_capacity(samples.len() * num_views as usize);
        for sample in samples {
            let room = self.room(sample)?;
            views.extend((0..num_views).map(|view| self.draw(sample, view, room)));
        }
        Ok(views)
    }

    fn draw<'a>(&self, sample: &'a SampleRow, view: u32, room: Room) -> View<'a> {
        let mut stream = Stream::new(
            self.seed,
            Purpose::Augmentation,
            view.into(),
            &sample.sample_id,
        );
        // Always three draws in this order, so that changing one setting leaves the others' outcome alone.
        let flipped = f64::from(stream.uniform()) < self.flip_probability;
        let drawn = room
            .free
            .map(|free| stream.below(u64::from(free) + 1) as u32);
        let [x, y] = match self.crop {
            Crop::Random => drawn,
            Crop::Center => room.middle,
        };
        View {
            sample,
            view,
            flipped,
            x_px: x * room.step_px,
            y_px: y * room.step_px,
        }
    }

    /// How far a view can move.
    fn room(&self, sample: &SampleRow) -> Result<Room, CacheLatentsError> {
        let SampleRow {
            width_px,
            height_px,
            ..
        } = *sample;
        match self.scaling {
            Scaling::IntegerNearest => {
                let grid =
                    canvas_grid(width_px, height_px, self.resolution_px).map_err(|source| {
                        CacheLatentsError::Canvas {
                            source_file: sample.source_file.clone(),
                            source,
                        }
                    })?;
                Ok(Room {
                    free: [grid.free_columns, grid.free_rows],
                    middle: grid.middle(),
                    step_px: grid.factor,
                })
            }
            Scaling::BilinearShortSide => {
                let (short, long) = (width_px.min(height_px), width_px.max(height_px));
                // As `resize_short_side`.
                let resized =
                    (u64::from(self.resolution_px) * u64::from(long)).checked_div(u64::from(short));
                match resized.filter(|&side| side <= MAX_SIDE_PX) {
                    Some(side) => {
                        let free = side as u32 - self.resolution_px;
                        let free = if width_px <= height_px {
                            [0, free]
                        } else {
                            [free, 0]
                        };
                        Ok(Room {
                            free,
                            middle: free.map(half_to_even),
                            step_px: 1,
                        })
                    }
                    None => Err(CacheLatentsError::Proportions {
                        source_file: sample.source_file.clone(),
                        width_px,
                        height_px,
                    }),
                }
            }
        }
    }

    /// The picture of a view.
    pub(crate) fn render(&self, decoded: &Decoded, view: &View) -> Rgb8 {
        let (rgb, background) = match self.background {
            Background::Color(color) => (decoded.picture.over(color), color),
            Background::DropAlpha => (decoded.compat_rgb(), NO_BACKGROUND),
        };
        let mirrored = |picture: Rgb8| {
            if view.flipped {
                picture.flip_horizontal()
            } else {
                picture
            }
        };
        let side_px = self.resolution_px;
        match self.scaling {
            Scaling::IntegerNearest => {
                let picture = mirrored(rgb);
                let factor = side_px / picture.width_px.max(picture.height_px);
                let (column, row) = (view.x_px / factor, view.y_px / factor);
                place_at(&picture, side_px, background, column, row)
                    .expect("the size was checked when views were drawn")
                    .picture
            }
            Scaling::BilinearShortSide => mirrored(resize_short_side(&rgb, side_px))
                .crop(view.x_px, view.y_px, side_px, side_px),
        }
    }
}

/// Steps that a view can move to the right and down.
#[derive(Clone, Copy, Debug)]
struct Room {
    free: [u32; 2],
    /// Those to a centred view.
    middle: [u32; 2],
    /// Pixels of a step: a sprite cell on a canvas, one pixel in a resized picture.
    step_px: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use pixel_art::{Limits, Rgba8, encode_png_rgba, place_on_canvas};
    use std::collections::BTreeMap;

    fn sample(sample_id: &str, width_px: u32, height_px: u32) -> SampleRow {
        SampleRow {
            sample_id: sample_id.to_owned(),
            compat_sha256: String::new(),
            compat_sha256_oriented: String::new(),
            width_px,
            height_px,
            has_alpha: false,
            num_colors: 1,
            source_file: format!("{sample_id}.png"),
            source_row: None,
        }
    }

    fn geometry(scaling: Scaling, crop: Crop, flip_probability: f64) -> Geometry {
        Geometry {
            resolution_px: 16,
            scaling,
            background: Background::Color([9, 9, 9]),
            crop,
            flip_probability,
            seed: 3,
            precision: PrecisionChoice::F32,
        }
    }

    /// A picture of distinct colours, opaque but for its first pixel.
    fn decoded(width_px: u32, height_px: u32) -> Decoded {
        let count = width_px * height_px;
        let pixels = (0..count).flat_map(|i| [i as u8, 100, 200, if i == 0 { 0 } else { 255 }]);
        let picture = Rgba8::new(width_px, height_px, pixels.collect());
        let png = encode_png_rgba(&picture, &[]).expect("a small PNG");
        pixel_art::decode(&png, &Limits { max_pixels: 4096 }).expect("it was just encoded")
    }

    #[test]
    fn a_centred_sprite_is_where_the_canvas_puts_it() {
        let geometry = geometry(Scaling::IntegerNearest, Crop::Center, 0.0);
        for (width_px, height_px) in [(5, 3), (16, 16), (4, 7), (3, 8), (13, 9)] {
            let samples = [sample("a", width_px, height_px)];
            let views = geometry.views(&samples, 1).expect("it fits");
            let decoded = decoded(width_px, height_px);
            let placed = place_on_canvas(&decoded.picture, 16, [9, 9, 9]).expect("it fits");
            assert_eq!((views[0].x_px, views[0].y_px), (placed.x_px, placed.y_px));
            assert_eq!(geometry.render(&decoded, &views[0]), placed.picture);
        }
    }

    #[test]
    fn a_centred_crop_is_torchvisions() {
        let geometry = geometry(Scaling::BilinearShortSide, Crop::Center, 0.0);
        for width_px in 8..24 {
            let samples = [sample("a", width_px, 8)];
            let view = &geometry.views(&samples, 1).expect("proportions are fine")[0];
            let resized = resize_short_side(&decoded(width_px, 8).picture.over([9, 9, 9]), 16);
            assert_eq!(
                (view.x_px, view.y_px),
                resized.center_offset(16),
                "{width_px}"
            );
        }
    }

    #[test]
    fn a_view_depends_on_seed_image_and_number_alone() {
        let geometry = geometry(Scaling::BilinearShortSide, Crop::Random, 0.5);
        let (a, b) = (sample("a", 30, 8), sample("b", 30, 8));
        let both = [b.clone(), a.clone()];
        let all = geometry.views(&both, 3).expect("proportions are fine");
        let ids: Vec<_> = all
            .iter()
            .map(|view| (view.sample.sample_id.as_str(), view.view))
            .collect();
        assert_eq!(
            ids,
            [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
        );
        let alone = [b];
        assert_eq!(
            geometry.views(&alone, 1).expect("proportions are fine")[0],
            all[3]
        );
        let places: std::collections::BTreeSet<_> =
            all.iter().map(|view| (view.x_px, view.flipped)).collect();
        assert!(places.len() > 1, "{all:?}");
    }

    #[test]
    fn random_places_are_on_the_sprites_grid_and_all_occur() {
        let geometry = geometry(Scaling::IntegerNearest, Crop::Random, 0.0);
        let samples = [sample("a", 3, 5)]; // 16 / 5 = 3: 5 whole cells, 2 free columns, no free rows
        let mut counts = BTreeMap::new();
        for view in geometry.views(&samples, 60).expect("it fits") {
            *counts.entry((view.x_px, view.y_px)).or_insert(0) += 1;
        }
        assert_eq!(
            counts.keys().copied().collect::<Vec<_>>(),
            [(0, 0), (3, 0), (6, 0)]
        );
        assert!(counts.values().all(|&count| count > 8), "{counts:?}");
    }

    #[test]
    fn a_flip_of_probability_one_mirrors_the_picture_before_it_is_placed() {
        let plain = geometry(Scaling::IntegerNearest, Crop::Center, 0.0);
        let mirrored = geometry(Scaling::IntegerNearest, Crop::Center, 1.0);
        let samples = [sample("a", 4, 4)];
        let decoded = decoded(4, 4);
        let render = |geometry: &Geometry| {
            geometry.render(&decoded, &geometry.views(&samples, 1).expect("it fits")[0])
        };
        assert_eq!(render(&mirrored), render(&plain).flip_horizontal());
    }

    #[test]
    fn background_shows_through_alpha_or_hidden_colour_does() {
        let mut geometry = geometry(Scaling::IntegerNearest, Crop::Center, 0.0);
        let samples = [sample("a", 2, 2)];
        let decoded = decoded(2, 2);
        let first = |geometry: &Geometry| {
            let views = geometry.views(&samples, 1).expect("it fits");
            geometry.render(&decoded, &views[0]).pixel(0, 0)
        };
        assert_eq!(first(&geometry), [9, 9, 9]);
        geometry.background = Background::DropAlpha;
        assert_eq!(first(&geometry), [0, 100, 200]);
    }

    #[test]
    fn an_image_larger_than_the_canvas_is_named() {
        let samples = [sample("big", 17, 4)];
        let error = geometry(Scaling::IntegerNearest, Crop::Center, 0.0)
            .views(&samples, 1)
            .expect_err("17 is more than 16");
        assert!(error.to_string().contains("big.png"), "{error}");
    }

    #[test]
    fn the_seed_is_part_of_the_geometry_only_where_something_is_drawn() {
        let fixed = geometry(Scaling::IntegerNearest, Crop::Center, 1.0).to_string();
        assert_eq!(
            fixed,
            "integer-nearest 16px background=#090909 crop=center flip=1 precision=f32"
        );
        let drawn = geometry(Scaling::IntegerNearest, Crop::Center, 0.5).to_string();
        assert!(drawn.ends_with(" seed=3"), "{drawn}");
    }
}
