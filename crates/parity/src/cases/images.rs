//! `image_compat`: crate `pixel-art` on the public recipe's way: its hash, its resize, its crop and its numbers.

use pixel_art::{Limits, Rgb8, decode, resize_short_side, to_model_range};
use serde::Deserialize;

use crate::checker::{CaseError, CaseRun};
use crate::compare::Values;

/// More than any fixture has, and little enough that a damaged header cannot take the memory.
const MAX_PIXELS: u64 = 1 << 24;

#[derive(Deserialize)]
struct Params {
    size: u32,
    images: Vec<Image>,
}

#[derive(Deserialize)]
struct Image {
    file: String,
    mode: String,
    width: u32,
    height: u32,
    sha256_tobytes: String,
    sha256_after_exif_transpose: String,
    resized_width: u32,
    resized_height: u32,
    crop_x: u32,
    crop_y: u32,
    center_x: u32,
    center_y: u32,
}

/// Every image of the case.
pub fn compat(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: Params = run.params()?;
    let size_px = params.size;
    for image in &params.images {
        let name = image.file.rsplit('/').next().unwrap_or(&image.file);
        let bytes = fs_err::read(run.set.dir().join(&image.file))?;
        let limits = Limits {
            max_pixels: MAX_PIXELS,
        };
        let decoded = decode(&bytes, &limits)?;
        let stored = format!(
            "{} {}x{}",
            decoded.pil.mode().name(),
            decoded.pil.width_px(),
            decoded.pil.height_px()
        );
        let expected = format!("{} {}x{}", image.mode, image.width, image.height);
        run.text(&format!("{name}.stored"), &expected, &stored);
        let digests = [
            (
                "sha256_tobytes",
                &image.sha256_tobytes,
                decoded.compat_sha256(),
            ),
            (
                "sha256_after_exif_transpose",
                &image.sha256_after_exif_transpose,
                decoded.compat_sha256_oriented(),
            ),
        ];
        for (digest, expected, found) in digests {
            run.text(&format!("{name}.{digest}"), expected, &found);
        }

        let rgb = decoded.compat_rgb();
        let given = format!("in.{name}.rgb_u8");
        let rgb = if run.has(&given) {
            let (expected, expected_shape) = run.values(&given)?;
            let (found, shape) = bytes_of(&rgb);
            let what = format!("{name}.rgb_u8");
            run.against(&what, (&expected, &expected_shape), (&found, &shape));
            // From here on the given pixels count: JPEG decoders may differ by a unit.
            let (pixels, shape) = run.u8(&given)?;
            let [height, width, _] = run.axes(&given, shape)?;
            Rgb8::new(u32::try_from(width)?, u32::try_from(height)?, pixels)
        } else {
            rgb
        };

        let resized = resize_short_side(&rgb, size_px);
        let (pixels, shape) = bytes_of(&resized);
        run.output(&format!("{name}.resized_u8"), pixels, &shape);
        let expected = format!("{}x{}", image.resized_width, image.resized_height);
        let found = format!("{}x{}", resized.width_px, resized.height_px);
        run.text(&format!("{name}.resized_size"), &expected, &found);

        let expected = format!("{},{}", image.center_x, image.center_y);
        let (x_px, y_px) = resized.center_offset(size_px);
        run.text(
            &format!("{name}.center"),
            &expected,
            &format!("{x_px},{y_px}"),
        );
        let center = format!("{name}.center_u8");
        if run.has(&format!("out.{center}")) {
            let (pixels, shape) = bytes_of(&resized.center_crop(size_px));
            run.output(&center, pixels, &shape);
        }
        for (values, source) in [
            (format!("{name}.pixel_values"), resized.clone()),
            (
                format!("{name}.pixel_values_flipped"),
                resized.flip_horizontal(),
            ),
        ] {
            if run.has(&format!("out.{values}")) {
                let cut = source.crop(image.crop_x, image.crop_y, size_px, size_px);
                let side = size_px as usize;
                run.output_f32(&values, to_model_range(&cut), &[3, side, side]);
            }
        }
    }
    Ok(())
}

fn bytes_of(image: &Rgb8) -> (Values, [usize; 3]) {
    (
        Values::U8(image.pixels.clone()),
        [image.height_px as usize, image.width_px as usize, 3],
    )
}
