//! Colour words, and which of them a pixel would be called by.
//!
//! A word stands for a few shades, dark to light: pixel art shades with three to five of them. A pixel is called by the
//! words of the nearest shade in CIELAB (D65), where distances are roughly what people see. The shades were read from the
//! pixels of 1000 captioned characters (of which the shipped ones are a part); `tests/real_sprites.rs` holds them against
//! the 24 that are shipped as held out.

use palette::{FromColor, Lab, Srgb, white_point::D65};

/// A colour in CIELAB.
pub(crate) type Color = Lab<D65, f32>;

/// Words and their shades in sRGB. Two words may share shades: nobody can tell their pixels apart.
const SHADES: &[(&str, &[[u8; 3]])] = &[
    ("black", &[[24, 24, 24], [52, 52, 52], [76, 76, 76]]),
    ("gray", &[[80, 80, 96], [100, 100, 100], [136, 136, 136]]),
    (
        "white",
        &[[176, 176, 176], [216, 216, 216], [250, 250, 250]],
    ),
    ("red", &[[152, 8, 8], [200, 8, 8], [248, 24, 16]]),
    ("dark red", &[[72, 8, 8], [104, 8, 8], [136, 8, 8]]),
    ("maroon", &[[72, 8, 40], [104, 8, 56], [136, 8, 72]]),
    ("pink", &[[216, 112, 160], [248, 160, 200]]),
    ("orange", &[[160, 84, 8], [200, 104, 8], [240, 130, 16]]),
    (
        "brown",
        &[[56, 40, 16], [80, 44, 12], [110, 64, 24], [140, 96, 60]],
    ),
    (
        "blonde",
        &[[168, 168, 16], [200, 200, 8], [248, 216, 64], [248, 248, 8]],
    ),
    (
        "yellow",
        &[[104, 104, 8], [152, 152, 8], [200, 200, 8], [248, 248, 8]],
    ),
    (
        "gold",
        &[[104, 72, 8], [168, 120, 8], [200, 152, 8], [248, 200, 8]],
    ),
    (
        "mustard",
        &[[104, 72, 8], [136, 104, 8], [168, 120, 8], [200, 152, 8]],
    ),
    (
        "green",
        &[
            [8, 48, 8],
            [8, 88, 8],
            [8, 136, 8],
            [8, 200, 8],
            [128, 232, 8],
        ],
    ),
    ("cyan", &[[8, 104, 104], [8, 152, 152], [8, 216, 216]]),
    (
        "blue",
        &[
            [8, 8, 104],
            [8, 8, 168],
            [8, 8, 240],
            [8, 88, 168],
            [8, 136, 248],
        ],
    ),
    ("purple", &[[48, 8, 88], [80, 8, 152], [112, 8, 216]]),
    ("magenta", &[[112, 8, 112], [168, 8, 168], [232, 8, 232]]),
];

/// Skin: no colour word, so that a face is not taken for hair.
const SKIN: &[[u8; 3]] = &[
    [120, 88, 72],
    [200, 136, 120],
    [248, 184, 152],
    [248, 216, 168],
    [248, 232, 216],
];

/// Other spellings and names.
const ALIASES: &[(&str, &str)] = &[
    ("grey", "gray"),
    ("silver", "gray"),
    ("blond", "blonde"),
    ("golden", "gold"),
    ("violet", "purple"),
    ("crimson", "red"),
    ("scarlet", "red"),
    ("teal", "cyan"),
];

/// Pixels below this lightness (of 100) are outlines: every sprite has them, whatever its colours.
const OUTLINE_LIGHTNESS: f32 = 12.0;

/// The number of a colour word in the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ColorWord(usize);

impl ColorWord {
    /// How many there are.
    pub const COUNT: usize = SHADES.len();

    /// The word that stands at the beginning of `words`, and how many of them it takes ("dark red": two).
    pub fn at_start(words: &[&str]) -> Option<(Self, usize)> {
        let known = |name: &str| SHADES.iter().position(|(word, _)| *word == name).map(Self);
        let two = words.get(..2).map(|pair| pair.join(" "));
        if let Some(word) = two.as_deref().and_then(known) {
            return Some((word, 2));
        }
        let first = *words.first()?;
        let name = ALIASES
            .iter()
            .find(|(alias, _)| *alias == first)
            .map_or(first, |(_, name)| *name);
        known(name).map(|word| (word, 1))
    }

    /// The word.
    pub fn name(self) -> &'static str {
        SHADES[self.0].0
    }

    /// Its number, below [`ColorWord::COUNT`].
    pub fn index(self) -> usize {
        self.0
    }
}

/// CIELAB of an sRGB pixel.
pub(crate) fn to_lab(pixel: [u8; 3]) -> Color {
    Lab::from_color(Srgb::from(pixel).into_linear::<f32>())
}

/// Squared distance in CIELAB.
pub(crate) fn squared_distance(a: Color, b: Color) -> f32 {
    (a.l - b.l).powi(2) + (a.a - b.a).powi(2) + (a.b - b.b).powi(2)
}

/// The shades, ready for comparison.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    /// Each shade with the words that it belongs to; none for skin.
    shades: Vec<(Color, Vec<ColorWord>)>,
}

impl Vocabulary {
    /// All words.
    pub fn new() -> Self {
        let mut by_shade: Vec<([u8; 3], Vec<ColorWord>)> =
            SKIN.iter().map(|shade| (*shade, vec![])).collect();
        for (index, (_, shades)) in SHADES.iter().enumerate() {
            for shade in *shades {
                match by_shade.iter_mut().find(|(known, _)| known == shade) {
                    Some((_, words)) => words.push(ColorWord(index)),
                    None => by_shade.push((*shade, vec![ColorWord(index)])),
                }
            }
        }
        Self {
            shades: by_shade
                .into_iter()
                .map(|(shade, words)| (to_lab(shade), words))
                .collect(),
        }
    }

    /// Of the pixels that are no outline, the share that would be called by each word, by [`ColorWord::index`]. A pixel
    /// of a shade that two words share counts for both. All 0 if there is no such pixel.
    pub(crate) fn shares(&self, pixels: impl Iterator<Item = Color>) -> Vec<f64> {
        let mut counts = vec![0_u64; ColorWord::COUNT];
        let mut total = 0_u64;
        for pixel in pixels.filter(|pixel| pixel.l >= OUTLINE_LIGHTNESS) {
            total += 1;
            for word in self.words_of(pixel) {
                counts[word.index()] += 1;
            }
        }
        counts
            .into_iter()
            .map(|count| count as f64 / total.max(1) as f64)
            .collect()
    }

    fn words_of(&self, pixel: Color) -> &[ColorWord] {
        let nearest = self.shades.iter().min_by(|(a, _), (b, _)| {
            squared_distance(pixel, *a).total_cmp(&squared_distance(pixel, *b))
        });
        nearest.map_or(&[], |(_, words)| words)
    }
}

impl Default for Vocabulary {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_of(pixel: [u8; 3]) -> Vec<&'static str> {
        let vocabulary = Vocabulary::new();
        let words = vocabulary.words_of(to_lab(pixel));
        words.iter().map(|word| word.name()).collect()
    }

    #[test]
    fn cielab_of_known_colours() {
        // sRGB red and mid grey under D65, by the formulas of CIE 15.
        for (pixel, expected) in [
            ([255, 0, 0], [53.24, 80.09, 67.20]),
            ([119, 119, 119], [50.03, 0.0, 0.0]),
        ] {
            let lab = to_lab(pixel);
            for (found, expected) in [lab.l, lab.a, lab.b].into_iter().zip(expected) {
                assert!((found - expected).abs() < 0.05, "{lab:?}");
            }
        }
    }

    #[test]
    fn a_pixel_is_called_by_the_words_of_the_nearest_shade() {
        assert_eq!(names_of([0, 0, 255]), ["blue"]);
        assert_eq!(names_of([210, 20, 20]), ["red"]);
        assert_eq!(names_of([100, 10, 10]), ["dark red"]);
        assert_eq!(names_of([165, 118, 10]), ["gold", "mustard"]);
        assert_eq!(names_of([250, 190, 150]), Vec::<&str>::new(), "skin");
    }

    #[test]
    fn shares_leave_outlines_out() {
        let pixels = [
            [0, 0, 0],
            [0, 0, 255],
            [0, 0, 255],
            [0, 0, 255],
            [255, 255, 255],
        ];
        let shares = Vocabulary::new().shares(pixels.into_iter().map(to_lab));
        let share = |name: &str| {
            let (word, _) = ColorWord::at_start(&[name]).expect("known");
            shares[word.index()]
        };
        assert_eq!(
            (share("blue"), share("white"), share("red")),
            (0.75, 0.25, 0.0)
        );
        assert!(
            Vocabulary::new()
                .shares([].into_iter())
                .iter()
                .all(|s| *s == 0.0)
        );
    }

    #[test]
    fn two_words_make_one_colour_before_one_does() {
        let (word, length) = ColorWord::at_start(&["dark", "red", "boots"]).expect("known");
        assert_eq!((word.name(), length), ("dark red", 2));
        let (word, length) = ColorWord::at_start(&["grey", "hood"]).expect("known");
        assert_eq!((word.name(), length), ("gray", 1));
        assert_eq!(ColorWord::at_start(&["dark", "hood"]), None);
    }
}
