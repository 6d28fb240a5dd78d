//! Two plain pixel buffers, and the moves that every stage needs: crop, flip, blend, magnify.
//!
//! Pixels lie row by row from the top left corner, channels innermost: `(h w c)`.

/// An RGB image, 8 bits a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb8 {
    /// Columns.
    pub width_px: u32,
    /// Rows.
    pub height_px: u32,
    /// `(h w 3)`.
    pub pixels: Vec<u8>,
}

/// An RGBA image, 8 bits a channel, colour not multiplied by alpha.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgba8 {
    /// Columns.
    pub width_px: u32,
    /// Rows.
    pub height_px: u32,
    /// `(h w 4)`.
    pub pixels: Vec<u8>,
}

impl Rgb8 {
    /// Takes over a buffer `(h w 3)`.
    ///
    /// # Panics
    ///
    /// If the buffer's length is not `height · width · 3`.
    pub fn new(width_px: u32, height_px: u32, pixels: Vec<u8>) -> Self {
        check_length(width_px, height_px, 3, pixels.len());
        Self {
            width_px,
            height_px,
            pixels,
        }
    }

    /// An image of one colour.
    pub fn filled(width_px: u32, height_px: u32, color: [u8; 3]) -> Self {
        let count = width_px as usize * height_px as usize;
        Self::new(width_px, height_px, color.repeat(count))
    }

    /// The same picture, opaque.
    pub fn into_rgba(self) -> Rgba8 {
        let pixels = self.pixels.chunks_exact(3);
        let pixels = pixels.flat_map(|pixel| [pixel[0], pixel[1], pixel[2], 255]);
        Rgba8::new(self.width_px, self.height_px, pixels.collect())
    }

    /// The colour at a column and row.
    ///
    /// # Panics
    ///
    /// If the position lies outside.
    pub fn pixel(&self, x_px: u32, y_px: u32) -> [u8; 3] {
        assert!(
            x_px < self.width_px && y_px < self.height_px,
            "pixel ({x_px}, {y_px}) of an image of {}×{}",
            self.width_px,
            self.height_px
        );
        let at = (y_px as usize * self.width_px as usize + x_px as usize) * 3;
        [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]]
    }

    /// The rectangle whose top left corner is at `(x_px, y_px)`.
    ///
    /// # Panics
    ///
    /// If the rectangle leaves the image.
    pub fn crop(&self, x_px: u32, y_px: u32, width_px: u32, height_px: u32) -> Self {
        assert!(
            u64::from(x_px) + u64::from(width_px) <= u64::from(self.width_px)
                && u64::from(y_px) + u64::from(height_px) <= u64::from(self.height_px),
            "crop of {width_px}×{height_px} at ({x_px}, {y_px}) from {}×{}",
            self.width_px,
            self.height_px
        );
        let mut pixels = Vec::with_capacity(width_px as usize * height_px as usize * 3);
        for y in y_px..y_px + height_px {
            let start = (y as usize * self.width_px as usize + x_px as usize) * 3;
            pixels.extend_from_slice(&self.pixels[start..start + width_px as usize * 3]);
        }
        Self::new(width_px, height_px, pixels)
    }

    /// Where [`Rgb8::center_crop`] of a square of `size_px` starts: `(x, y)`, halves rounded to even.
    ///
    /// Source: `CenterCrop`, torchvision 0.29 (Python's `round`).
    ///
    /// # Panics
    ///
    /// If the image is smaller than the square.
    pub fn center_offset(&self, size_px: u32) -> (u32, u32) {
        assert!(
            self.width_px >= size_px && self.height_px >= size_px,
            "center crop of {size_px}×{size_px} from {}×{}",
            self.width_px,
            self.height_px
        );
        (
            half_to_even(self.width_px - size_px),
            half_to_even(self.height_px - size_px),
        )
    }

    /// The middle square of `size_px`.
    ///
    /// # Panics
    ///
    /// If the image is smaller than the square.
    pub fn center_crop(&self, size_px: u32) -> Self {
        let (x_px, y_px) = self.center_offset(size_px);
        self.crop(x_px, y_px, size_px, size_px)
    }

    /// The mirror image, left and right exchanged.
    pub fn flip_horizontal(&self) -> Self {
        let mut pixels = Vec::with_capacity(self.pixels.len());
        for row in rows(&self.pixels, self.width_px, 3) {
            for pixel in row.rchunks_exact(3) {
                pixels.extend_from_slice(pixel);
            }
        }
        Self::new(self.width_px, self.height_px, pixels)
    }

    /// Every pixel as a square of `factor`×`factor`.
    pub fn magnify(&self, factor: u32) -> Self {
        let pixels = magnify(&self.pixels, self.width_px, 3, factor);
        Self::new(self.width_px * factor, self.height_px * factor, pixels)
    }

    /// Copies `source` onto this image, its top left corner at `(x_px, y_px)`.
    ///
    /// # Panics
    ///
    /// If it does not fit.
    pub fn paste(&mut self, source: &Rgb8, x_px: u32, y_px: u32) {
        assert!(
            u64::from(x_px) + u64::from(source.width_px) <= u64::from(self.width_px)
                && u64::from(y_px) + u64::from(source.height_px) <= u64::from(self.height_px),
            "paste of {}×{} at ({x_px}, {y_px}) onto {}×{}",
            source.width_px,
            source.height_px,
            self.width_px,
            self.height_px
        );
        for (row, line) in rows(&source.pixels, source.width_px, 3).enumerate() {
            let start = ((y_px as usize + row) * self.width_px as usize + x_px as usize) * 3;
            self.pixels[start..start + line.len()].copy_from_slice(line);
        }
    }
}

impl Rgba8 {
    /// Takes over a buffer `(h w 4)`.
    ///
    /// # Panics
    ///
    /// If the buffer's length is not `height · width · 4`.
    pub fn new(width_px: u32, height_px: u32, pixels: Vec<u8>) -> Self {
        check_length(width_px, height_px, 4, pixels.len());
        Self {
            width_px,
            height_px,
            pixels,
        }
    }

    /// Whether any pixel is not fully opaque.
    pub fn has_alpha(&self) -> bool {
        self.pixels.chunks_exact(4).any(|pixel| pixel[3] != 255)
    }

    /// The colours as stored; what alpha hid becomes visible, as in the public recipe.
    pub fn drop_alpha(&self) -> Rgb8 {
        let pixels = self.pixels.chunks_exact(4);
        let pixels = pixels.flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]);
        Rgb8::new(self.width_px, self.height_px, pixels.collect())
    }

    /// The image laid over one colour: `round((α·c + (255 − α)·background) / 255)`.
    pub fn over(&self, background: [u8; 3]) -> Rgb8 {
        let mut pixels = Vec::with_capacity(self.pixels.len() / 4 * 3);
        for pixel in self.pixels.chunks_exact(4) {
            let alpha = u32::from(pixel[3]);
            for channel in 0..3 {
                let sum = alpha * u32::from(pixel[channel])
                    + (255 - alpha) * u32::from(background[channel]);
                pixels.push(((sum + 127) / 255) as u8);
            }
        }
        Rgb8::new(self.width_px, self.height_px, pixels)
    }

    /// Every pixel as a square of `factor`×`factor`.
    pub fn magnify(&self, factor: u32) -> Self {
        let pixels = magnify(&self.pixels, self.width_px, 4, factor);
        Self::new(self.width_px * factor, self.height_px * factor, pixels)
    }
}

/// Rows of a buffer `(h w c)`; none if the image has no columns.
fn rows(pixels: &[u8], width_px: u32, channels: usize) -> std::slice::ChunksExact<'_, u8> {
    pixels.chunks_exact((width_px as usize * channels).max(1))
}

fn magnify(pixels: &[u8], width_px: u32, channels: usize, factor: u32) -> Vec<u8> {
    assert!(factor > 0, "magnified by 0");
    let factor = factor as usize;
    let mut out = Vec::with_capacity(pixels.len() * factor * factor);
    for row in rows(pixels, width_px, channels) {
        let start = out.len();
        for pixel in row.chunks_exact(channels) {
            for _ in 0..factor {
                out.extend_from_slice(pixel);
            }
        }
        let end = out.len();
        for _ in 1..factor {
            out.extend_from_within(start..end);
        }
    }
    out
}

/// Half of a difference of sizes, halves rounded to even: where torchvision's `CenterCrop` starts (Python's `round`).
pub fn half_to_even(difference: u32) -> u32 {
    let half = difference / 2;
    if difference % 2 == 1 && half % 2 == 1 {
        half + 1
    } else {
        half
    }
}

fn check_length(width_px: u32, height_px: u32, channels: usize, length: usize) {
    let expected = (width_px as usize)
        .checked_mul(height_px as usize)
        .and_then(|count| count.checked_mul(channels));
    assert_eq!(
        expected,
        Some(length),
        "an image of {width_px}×{height_px} with {channels} channels"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row, whose red channel counts up.
    fn ramp(width_px: u32, height_px: u32) -> Rgb8 {
        let pixels = (0..width_px * height_px)
            .flat_map(|i| [i as u8, 0, 9])
            .collect();
        Rgb8::new(width_px, height_px, pixels)
    }

    fn reds(image: &Rgb8) -> Vec<u8> {
        image.pixels.chunks_exact(3).map(|pixel| pixel[0]).collect()
    }

    #[test]
    fn a_crop_takes_the_rectangle_from_its_top_left_corner() {
        assert_eq!(reds(&ramp(4, 3).crop(1, 1, 2, 2)), [5, 6, 9, 10]);
    }

    #[test]
    #[should_panic(expected = "crop of 2×1 at (3, 0) from 4×3")]
    fn a_crop_outside_the_image_is_our_bug() {
        ramp(4, 3).crop(3, 0, 2, 1);
    }

    #[test]
    fn a_flip_reverses_each_row() {
        assert_eq!(reds(&ramp(3, 2).flip_horizontal()), [2, 1, 0, 5, 4, 3]);
    }

    #[test]
    fn the_centre_rounds_halves_to_even() {
        // (w − 1)/2 = 0.5 → 0, 1.5 → 2, 2.5 → 2, 3.5 → 4
        let starts: Vec<u32> = [2, 4, 6, 8]
            .map(|width| ramp(width, 1).center_offset(1).0)
            .to_vec();
        assert_eq!(starts, [0, 2, 2, 4]);
    }

    #[test]
    fn alpha_blends_towards_the_background_with_rounding() {
        let image = Rgba8::new(
            3,
            1,
            vec![200, 100, 0, 255, 200, 100, 0, 0, 200, 100, 0, 128],
        );
        // (128·200 + 127·10 + 127)/255 = 105.87…, (128·100 + 127·20 + 127)/255 = 60.6…, (127·30 + 127)/255 = 15.4…
        assert_eq!(
            image.over([10, 20, 30]).pixels,
            [200, 100, 0, 10, 20, 30, 105, 60, 15]
        );
        assert!(image.has_alpha());
    }

    #[test]
    fn magnifying_repeats_pixels_in_both_directions() {
        assert_eq!(
            reds(&ramp(2, 2).magnify(2)),
            [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
        );
    }

    #[test]
    fn a_paste_writes_only_its_rectangle() {
        let mut canvas = Rgb8::filled(3, 2, [7, 7, 7]);
        canvas.paste(&ramp(1, 2), 2, 0);
        assert_eq!(reds(&canvas), [7, 7, 0, 7, 7, 1]);
    }
}
