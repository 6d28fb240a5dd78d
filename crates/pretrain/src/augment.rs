//! Versions of a captioned picture whose captions say what was done: recoloured, on a coloured ground, small and aside,
//! in two colours.
//!
//! A caption is `style, subject`, as the corpora have it; what was done is said where a person would say it: the colour
//! before the subject; ground, place and parts behind it.

use flow_matching::noise::{Purpose, Stream};
use pixel_art::{Rgb8, Rgba8};

/// Colours by the words that captions use.
pub const COLORS: [(&str, [u8; 3]); 16] = [
    ("red", [214, 40, 40]),
    ("dark red", [130, 20, 24]),
    ("orange", [240, 130, 30]),
    ("yellow", [246, 214, 50]),
    ("mustard", [190, 150, 40]),
    ("gold", [218, 170, 60]),
    ("green", [60, 160, 70]),
    ("cyan", [70, 200, 210]),
    ("blue", [50, 90, 210]),
    ("purple", [130, 60, 180]),
    ("pink", [245, 130, 180]),
    ("maroon", [110, 30, 60]),
    ("brown", [130, 80, 45]),
    ("gray", [140, 140, 145]),
    ("black", [35, 35, 40]),
    ("white", [240, 240, 240]),
];

/// A picture without words about colour may be recoloured; these words would make the new caption a lie.
const COLOR_WORDS: [&str; 20] = [
    "skin tone",
    "hair",
    "red",
    "orange",
    "yellow",
    "gold",
    "green",
    "cyan",
    "blue",
    "purple",
    "pink",
    "brown",
    "gray",
    "grey",
    "black",
    "white",
    "silver",
    "dark",
    "light",
    "rainbow",
];

/// Where a small picture stands: words, and the place as shares of the free room.
const PLACES: [(&str, [f32; 2]); 5] = [
    ("on the left", [0.0, 0.5]),
    ("on the right", [1.0, 0.5]),
    ("at the top", [0.5, 0.0]),
    ("at the bottom", [0.5, 1.0]),
    ("in the middle", [0.5, 0.5]),
];

/// Side of a small picture as a share of the whole.
const SMALL: f32 = 0.55;

/// Where a picture in two colours changes from one to the other, as a share of the subject's height.
const PARTED_AT: [f32; 5] = [0.35, 0.42, 0.5, 0.58, 0.65];

/// What is done to a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Another colour, or another ground where the caption names colours already.
    Tint,
    /// Another ground, perhaps in another colour.
    Ground,
    /// Smaller, at one of the places, perhaps in another colour.
    Small,
    /// Another colour above than below, or another ground where the caption names colours already.
    TwoTone,
}

/// The kinds in turn.
const KINDS: [Kind; 4] = [Kind::Tint, Kind::Ground, Kind::Small, Kind::TwoTone];

/// What stands behind a picture that says nothing about it.
pub const BACKGROUND: [u8; 3] = [255, 255, 255];

/// Version `variant` of a pair; 0 is the picture as it is.
pub fn variant(
    picture: &Rgba8,
    caption: &str,
    pair: usize,
    variant: usize,
    seed: u64,
) -> (Rgb8, String) {
    if variant == 0 {
        return (picture.over(BACKGROUND), caption.to_owned());
    }
    let key = format!("pretrain/variant/{pair}");
    let mut stream = Stream::new(seed, Purpose::Augmentation, variant as u64, &key);
    let (style, subject) = caption.split_once(", ").unwrap_or(("", caption));
    let may_tint = !COLOR_WORDS.iter().any(|word| subject.contains(word));
    let kind = KINDS[(variant - 1) % KINDS.len()];
    // A kind may be joined by a colour.
    let tint_share = match kind {
        Kind::Tint => 1.0,
        Kind::Ground => 0.5,
        Kind::Small => 0.25,
        Kind::TwoTone => 0.0,
    };
    let mut picture = picture.clone();
    let mut subject = subject.to_owned();
    let tint = draw(&mut stream, &COLORS);
    let is_tinted = may_tint && stream.uniform() < tint_share;
    if is_tinted {
        picture = tinted(&picture, tint.1);
        subject = format!("{} {subject}", tint.0);
    }
    let is_two_toned = kind == Kind::TwoTone && may_tint;
    if is_two_toned {
        let below = draw(&mut stream, &COLORS);
        picture = two_toned(&picture, tint.1, below.1, draw(&mut stream, &PARTED_AT));
        subject = format!("{subject}, {} top, {} bottom", tint.0, below.0);
    }
    let mut ground = BACKGROUND;
    let has_color = is_tinted || is_two_toned;
    if kind == Kind::Ground || (kind != Kind::Small && !has_color) {
        let (word, color) = draw(&mut stream, &COLORS);
        ground = color;
        subject = format!("{subject}, {word} background");
    }
    if kind == Kind::Small {
        let (words, place) = draw(&mut stream, &PLACES);
        picture = moved(&picture, place);
        subject = format!("{subject}, small, {words}");
    }
    let caption = if style.is_empty() {
        subject
    } else {
        format!("{style}, {subject}")
    };
    (picture.over(ground), caption)
}

fn draw<T: Copy>(stream: &mut Stream, choices: &[T]) -> T {
    choices[stream.below(choices.len() as u64) as usize]
}

/// Everything in shades of one colour; the picture's own light and shade stay.
fn tinted(picture: &Rgba8, color: [u8; 3]) -> Rgba8 {
    let mut picture = picture.clone();
    for pixel in picture.pixels.chunks_exact_mut(4) {
        let light = (0.299 * f32::from(pixel[0])
            + 0.587 * f32::from(pixel[1])
            + 0.114 * f32::from(pixel[2]))
            / 255.0;
        for (value, target) in pixel.iter_mut().zip(color) {
            let target = f32::from(target);
            let shade = if light < 0.7 {
                target * (0.25 + 0.75 * light / 0.7)
            } else {
                target + (255.0 - target) * 0.6 * (light - 0.7) / 0.3
            };
            *value = shade.round() as u8;
        }
    }
    picture
}

/// [`tinted`] in one colour above a line and in another below it. The line lies at a share of the height between the
/// first and the last row with anything in it.
fn two_toned(picture: &Rgba8, above: [u8; 3], below: [u8; 3], at: f32) -> Rgba8 {
    let row_bytes = (picture.width_px * 4) as usize;
    let has_anything = |row: &[u8]| row.chunks_exact(4).any(|pixel| pixel[3] > 0);
    let filled: Vec<bool> = picture
        .pixels
        .chunks_exact(row_bytes)
        .map(has_anything)
        .collect();
    let first = filled.iter().position(|filled| *filled).unwrap_or(0);
    let last = filled.iter().rposition(|filled| *filled).unwrap_or(0);
    let line = first + ((last + 1 - first) as f32 * at).round() as usize;
    let mut both = tinted(picture, above);
    let lower = tinted(picture, below);
    both.pixels[line * row_bytes..].copy_from_slice(&lower.pixels[line * row_bytes..]);
    both
}

/// Made smaller, and put at a place of an empty picture of the old size.
fn moved(picture: &Rgba8, place: [f32; 2]) -> Rgba8 {
    let (w, h) = (picture.width_px, picture.height_px);
    let side = |length: u32| ((length as f32 * SMALL) as u32).max(1);
    let small = scale(picture, side(w), side(h));
    let left = ((w - small.width_px) as f32 * place[0]) as u32;
    let top = ((h - small.height_px) as f32 * place[1]) as u32;
    let mut pixels = vec![0; (w * h * 4) as usize];
    for y in 0..small.height_px {
        let from = (y * small.width_px * 4) as usize;
        let to = (((top + y) * w + left) * 4) as usize;
        let length = (small.width_px * 4) as usize;
        pixels[to..to + length].copy_from_slice(&small.pixels[from..from + length]);
    }
    Rgba8::new(w, h, pixels)
}

/// Another size: bilinear on colour times alpha, four points to a pixel, so that shrinking by less than 4 misses nothing.
pub fn scale(picture: &Rgba8, width_px: u32, height_px: u32) -> Rgba8 {
    if (picture.width_px, picture.height_px) == (width_px, height_px) {
        return picture.clone();
    }
    let (w, h) = (picture.width_px as i64, picture.height_px as i64);
    let (step_x, step_y) = (w as f32 / width_px as f32, h as f32 / height_px as f32);
    let at = |x: i64, y: i64| {
        let place = ((y.clamp(0, h - 1) * w + x.clamp(0, w - 1)) * 4) as usize;
        let pixel = &picture.pixels[place..place + 4];
        let alpha = f32::from(pixel[3]);
        [
            f32::from(pixel[0]) * alpha,
            f32::from(pixel[1]) * alpha,
            f32::from(pixel[2]) * alpha,
            alpha,
        ]
    };
    let mut pixels = Vec::with_capacity((width_px * height_px * 4) as usize);
    for y in 0..height_px {
        for x in 0..width_px {
            let mut sum = [0.0f32; 4];
            for (dx, dy) in [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)] {
                let fx = (x as f32 + dx) * step_x - 0.5;
                let fy = (y as f32 + dy) * step_y - 0.5;
                let (x0, y0) = (fx.floor(), fy.floor());
                let (tx, ty) = (fx - x0, fy - y0);
                for (ox, oy, weight) in [
                    (0, 0, (1.0 - tx) * (1.0 - ty)),
                    (1, 0, tx * (1.0 - ty)),
                    (0, 1, (1.0 - tx) * ty),
                    (1, 1, tx * ty),
                ] {
                    let value = at(x0 as i64 + ox, y0 as i64 + oy);
                    for (sum, value) in sum.iter_mut().zip(value) {
                        *sum += value * weight;
                    }
                }
            }
            let alpha = sum[3];
            let color = |value: f32| {
                if alpha > 0.0 {
                    (value / alpha).round() as u8
                } else {
                    0
                }
            };
            pixels.extend([
                color(sum[0]),
                color(sum[1]),
                color(sum[2]),
                (alpha / 4.0).round() as u8,
            ]);
        }
    }
    Rgba8::new(width_px, height_px, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disc() -> Rgba8 {
        Rgba8::new(2, 2, [[200, 100, 50, 255]; 4].concat())
    }

    #[test]
    fn version_zero_is_the_picture_itself() {
        let (picture, caption) = variant(&disc(), "3d emoji, disc", 0, 0, 1);
        assert_eq!(picture.pixel(0, 0), [200, 100, 50]);
        assert_eq!(caption, "3d emoji, disc");
    }

    #[test]
    fn a_recoloured_picture_says_its_colour_before_the_subject() {
        let (_, caption) = variant(&disc(), "3d emoji, disc", 3, 1, 1);
        let (style, subject) = caption.split_once(", ").expect("style and subject");
        let color = subject.strip_suffix(" disc").expect("the subject is last");
        assert_eq!(style, "3d emoji");
        assert!(COLORS.iter().any(|(word, _)| *word == color), "{caption}");
    }

    #[test]
    fn a_picture_in_two_colours_says_which_is_above() {
        let tall = Rgba8::new(1, 40, [[120, 120, 120, 255]; 40].concat());
        let (picture, caption) = variant(&tall, "3d emoji, disc", 3, 4, 1);
        let (_, parts) = caption.split_once("disc, ").expect("the subject is first");
        let (above, below) = parts.split_once(" top, ").expect("two parts");
        let below = below.strip_suffix(" bottom").expect("the lower is last");
        let shade = |word: &str| {
            let (_, color) = COLORS.iter().find(|(w, _)| *w == word).expect("a word");
            let flat = Rgba8::new(1, 1, vec![120, 120, 120, 255]);
            tinted(&flat, *color).over(BACKGROUND).pixel(0, 0)
        };
        assert_eq!(picture.pixel(0, 0), shade(above));
        assert_eq!(picture.pixel(0, 39), shade(below));
        assert_eq!(picture.pixel(0, 13), shade(above));
        assert_eq!(picture.pixel(0, 26), shade(below));
    }

    #[test]
    fn a_caption_with_a_colour_is_not_contradicted() {
        for index in 0..20 {
            let (_, caption) = variant(&disc(), "flat emoji, red heart", index, 1, 1);
            assert!(caption.starts_with("flat emoji, red heart, "), "{caption}");
        }
    }

    #[test]
    fn doubling_a_flat_picture_keeps_its_colour() {
        let large = scale(&disc(), 4, 4);
        assert_eq!((large.width_px, large.height_px), (4, 4));
        assert!(
            large
                .pixels
                .chunks_exact(4)
                .all(|p| p == [200, 100, 50, 255])
        );
    }
}
