//! Onto the training canvas without touching the sprite's grid.
//!
//! A sprite pixel becomes a square of k×k, k = ⌊canvas / longest side⌋, and the sprite starts at a multiple of k. So a
//! 64² sprite on 512² puts one sprite pixel on one latent cell (k = 8), a 32² sprite one on one token (k = 16).

use crate::{Rgb8, Rgba8};

/// Why an image cannot be placed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CanvasError {
    /// A side is longer than the canvas; shrinking would destroy the grid.
    #[error(
        "image of {width_px}×{height_px} px does not fit a canvas of {canvas_px}×{canvas_px} px; \
         reduce it to its native size or raise the resolution"
    )]
    TooLarge {
        /// The image's columns.
        width_px: u32,
        /// The image's rows.
        height_px: u32,
        /// The canvas's columns and rows.
        canvas_px: u32,
    },
    /// There is nothing to place.
    #[error("image of {width_px}×{height_px} px has no pixels")]
    Empty {
        /// The image's columns.
        width_px: u32,
        /// The image's rows.
        height_px: u32,
    },
}

/// A sprite on its canvas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The canvas, background around the sprite.
    pub picture: Rgb8,
    /// Side of a sprite pixel on the canvas.
    pub factor: u32,
    /// Where the sprite starts; a multiple of `factor`.
    pub x_px: u32,
    /// Where the sprite starts; a multiple of `factor`.
    pub y_px: u32,
}

/// How a sprite of some size sits on a canvas: its factor, and how far it can move in whole sprite cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CanvasGrid {
    /// Side of a sprite pixel on the canvas.
    pub factor: u32,
    /// Whole cells that the canvas has beyond the sprite, across.
    pub free_columns: u32,
    /// Whole cells that the canvas has beyond the sprite, down.
    pub free_rows: u32,
}

impl CanvasGrid {
    /// The column and row of cells that a sprite in the middle starts at: the odd free cell is to the right and below.
    pub fn middle(&self) -> [u32; 2] {
        [self.free_columns / 2, self.free_rows / 2]
    }
}

/// The largest whole factor at which an image fits a square of `canvas_px`.
///
/// # Errors
///
/// If the image has no pixels or is larger than the canvas.
pub fn canvas_grid(
    width_px: u32,
    height_px: u32,
    canvas_px: u32,
) -> Result<CanvasGrid, CanvasError> {
    if width_px == 0 || height_px == 0 {
        return Err(CanvasError::Empty {
            width_px,
            height_px,
        });
    }
    let factor = canvas_px / width_px.max(height_px);
    if factor == 0 {
        return Err(CanvasError::TooLarge {
            width_px,
            height_px,
            canvas_px,
        });
    }
    let cells = canvas_px / factor;
    Ok(CanvasGrid {
        factor,
        free_columns: cells - width_px,
        free_rows: cells - height_px,
    })
}

/// Magnifies by the largest whole factor that fits a square of `canvas_px`, blends over `background` and centres.
///
/// The free space is split in whole sprite cells, the odd one to the right and below. Columns and rows of the canvas
/// beyond the last whole cell are background.
///
/// # Errors
///
/// If the image has no pixels or is larger than the canvas.
pub fn place_on_canvas(
    image: &Rgba8,
    canvas_px: u32,
    background: [u8; 3],
) -> Result<Placed, CanvasError> {
    let grid = canvas_grid(image.width_px, image.height_px, canvas_px)?;
    let opaque = image.over(background);
    let [column, row] = grid.middle();
    place_at(&opaque, canvas_px, background, column, row)
}

/// As [`place_on_canvas`] for an opaque image, `column` and `row` cells from the top left corner.
///
/// # Errors
///
/// If the image has no pixels or is larger than the canvas.
///
/// # Panics
///
/// If `column` or `row` is beyond the free cells of [`canvas_grid`].
pub fn place_at(
    image: &Rgb8,
    canvas_px: u32,
    background: [u8; 3],
    column: u32,
    row: u32,
) -> Result<Placed, CanvasError> {
    let grid = canvas_grid(image.width_px, image.height_px, canvas_px)?;
    assert!(
        column <= grid.free_columns && row <= grid.free_rows,
        "cell ({column}, {row}) of {grid:?}"
    );
    let (x_px, y_px) = (column * grid.factor, row * grid.factor);
    let mut picture = Rgb8::filled(canvas_px, canvas_px, background);
    picture.paste(&image.magnify(grid.factor), x_px, y_px);
    Ok(Placed {
        picture,
        factor: grid.factor,
        x_px,
        y_px,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solid(width_px: u32, height_px: u32) -> Rgba8 {
        let count = (width_px * height_px) as usize;
        Rgba8::new(width_px, height_px, [255, 0, 0, 255].repeat(count))
    }

    fn placed(width_px: u32, height_px: u32, canvas_px: u32) -> (u32, u32, u32) {
        let placed =
            place_on_canvas(&solid(width_px, height_px), canvas_px, [0; 3]).expect("it fits");
        (placed.factor, placed.x_px, placed.y_px)
    }

    #[test]
    fn a_sprite_pixel_becomes_a_whole_square() {
        assert_eq!(placed(64, 64, 512), (8, 0, 0));
        assert_eq!(placed(32, 32, 512), (16, 0, 0));
        assert_eq!(placed(512, 512, 512), (1, 0, 0));
    }

    #[test]
    fn the_sprite_starts_at_a_multiple_of_its_factor() {
        assert_eq!(placed(32, 16, 64), (2, 0, 16));
        assert_eq!(placed(16, 31, 64), (2, 16, 0));
        // 64 / 20 = 3, 21 whole cells, one free: it goes to the right and below.
        assert_eq!(placed(20, 20, 64), (3, 0, 0));
        // 64 / 9 = 7, 9 whole cells and one column over.
        assert_eq!(placed(9, 4, 64), (7, 0, 14));
    }

    #[test]
    fn transparent_pixels_become_background() {
        let image = Rgba8::new(2, 1, vec![255, 0, 255, 0, 1, 2, 3, 255]);
        let placed = place_on_canvas(&image, 2, [10, 20, 30]).expect("it fits");
        assert_eq!(placed.picture.pixel(0, 0), [10, 20, 30]);
        assert_eq!(placed.picture.pixel(1, 0), [1, 2, 3]);
        assert_eq!(placed.picture.pixel(1, 1), [10, 20, 30]);
    }

    #[test]
    fn an_image_larger_than_the_canvas_is_refused_with_both_sizes() {
        let error = place_on_canvas(&solid(65, 3), 64, [0; 3]).expect_err("too large");
        assert_eq!(
            error.to_string(),
            "image of 65×3 px does not fit a canvas of 64×64 px; reduce it to its native size or raise the resolution"
        );
    }
}
