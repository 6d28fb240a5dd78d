//! The figure in a picture: which pixels are not background, and where its head, torso, legs and feet are.
//!
//! Background is what can be reached from the edge through pixels like the edge's median colour, so that a white robe on
//! white ground stays a robe as long as an outline is around it. Regions are fixed parts of the figure's height, around
//! its middle column. They were read from the shipped characters (all are 32×32 and face forward): from the pixels where
//! the colour depends most on the caption's colour word for hair, armour, trousers and boots.

use pixel_art::Rgb8;
use serde::{Deserialize, Serialize};

use crate::color_words::{Color, Vocabulary, squared_distance, to_lab};

/// Distance in CIELAB up to which a pixel is like the background: about the noise that an autoencoder leaves.
const BACKGROUND_DISTANCE: f32 = 12.0;

/// A part of a standing figure that faces forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Region {
    /// Hair, beard, hat.
    Head,
    /// Shirt, armour, upper part of a robe; arms and what they hold are mostly outside.
    Torso,
    /// Trousers.
    Legs,
    /// Boots.
    Feet,
}

impl Region {
    /// All regions, top to bottom.
    pub const ALL: [Self; 4] = [Self::Head, Self::Torso, Self::Legs, Self::Feet];

    /// First and last row, and half the width, in heights of the figure; rows from its top, columns from its middle.
    fn extent(self) -> (f32, f32, f32) {
        match self {
            Self::Head => (0.0, 0.30, 0.22),
            Self::Torso => (0.30, 0.58, 0.16),
            Self::Legs => (0.58, 0.86, 0.16),
            Self::Feet => (0.86, 1.0, 0.27),
        }
    }
}

/// A picture seen as a figure on a background.
#[derive(Clone, Debug)]
pub struct Figure {
    width_px: usize,
    height_px: usize,
    colors: Vec<Color>,
    foreground: Vec<bool>,
    /// First row of the figure, and the row behind its last; equal if there is none.
    rows: (usize, usize),
    /// The column with as many foreground pixels to its left as to its right.
    middle: f32,
}

/// Of each region's foreground pixels that are no outline, the share that would be called by each colour word.
#[derive(Clone, Debug, PartialEq)]
pub struct RegionShares([Vec<f64>; 4]);

impl RegionShares {
    /// The share of a region's pixels, outlines left out, that have this colour.
    pub fn of(&self, attribute: crate::attributes::Attribute) -> f64 {
        self.0[attribute.region as usize][attribute.color.index()]
    }
}

impl Figure {
    /// Tells figure from background.
    pub fn find(picture: &Rgb8) -> Self {
        let (w, h) = (picture.width_px as usize, picture.height_px as usize);
        let colors: Vec<Color> = picture
            .pixels
            .chunks_exact(3)
            .map(|pixel| to_lab([pixel[0], pixel[1], pixel[2]]))
            .collect();
        let foreground = foreground(&colors, w, h);
        let occupied = |y: &usize| foreground[y * w..(y + 1) * w].contains(&true);
        let first = (0..h).find(occupied).unwrap_or(0);
        let end = (0..h).rfind(occupied).map_or(first, |last| last + 1);
        let mut columns: Vec<usize> = (0..w * h)
            .filter(|at| foreground[*at])
            .map(|at| at % w)
            .collect();
        columns.sort_unstable();
        let middle = columns.get(columns.len() / 2).map_or(0.0, |x| *x as f32) + 0.5;
        Self {
            width_px: w,
            height_px: h,
            colors,
            foreground,
            rows: (first, end),
            middle,
        }
    }

    /// Whether the pixel at a column and row is not background.
    pub fn is_foreground(&self, x_px: usize, y_px: usize) -> bool {
        x_px < self.width_px
            && y_px < self.height_px
            && self.foreground[y_px * self.width_px + x_px]
    }

    /// Which colours each region has.
    pub fn shares(&self, vocabulary: &Vocabulary) -> RegionShares {
        RegionShares(Region::ALL.map(|region| vocabulary.shares(self.pixels(region))))
    }

    /// The foreground pixels of a region: those whose middle lies in it.
    fn pixels(&self, region: Region) -> impl Iterator<Item = Color> {
        let (top, bottom, half_width) = region.extent();
        let (first, end) = self.rows;
        let height = (end - first) as f32;
        let w = self.width_px;
        (first * w..end * w)
            .filter(move |at| {
                let down = ((at / w - first) as f32 + 0.5) / height;
                let aside = ((at % w) as f32 + 0.5 - self.middle).abs() / height;
                self.foreground[*at] && down >= top && down < bottom && aside <= half_width
            })
            .map(|at| self.colors[at])
    }
}

/// Everything that the background does not reach from the edge.
fn foreground(colors: &[Color], w: usize, h: usize) -> Vec<bool> {
    let on_edge = |at: &usize| {
        let (x, y) = (at % w, at / w);
        x == 0 || y == 0 || x + 1 == w || y + 1 == h
    };
    let edge: Vec<usize> = (0..w * h).filter(on_edge).collect();
    if edge.is_empty() {
        return vec![];
    }
    let median = |channel: fn(&Color) -> f32| {
        let mut values: Vec<f32> = edge.iter().map(|at| channel(&colors[*at])).collect();
        values.sort_by(f32::total_cmp);
        values[values.len() / 2]
    };
    let background = Color::new(median(|c| c.l), median(|c| c.a), median(|c| c.b));
    let is_like = |at: usize| {
        squared_distance(colors[at], background) < BACKGROUND_DISTANCE * BACKGROUND_DISTANCE
    };
    let mut foreground = vec![true; w * h];
    let mut open: Vec<usize> = edge.into_iter().filter(|at| is_like(*at)).collect();
    for at in &open {
        foreground[*at] = false;
    }
    while let Some(at) = open.pop() {
        let (x, y) = (at % w, at / w);
        let neighbours = [
            (x > 0).then(|| at - 1),
            (x + 1 < w).then(|| at + 1),
            (y > 0).then(|| at - w),
            (y + 1 < h).then(|| at + w),
        ];
        for next in neighbours.into_iter().flatten() {
            if foreground[next] && is_like(next) {
                foreground[next] = false;
                open.push(next);
            }
        }
    }
    foreground
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attributes::Attribute;
    use crate::color_words::ColorWord;

    const WHITE: [u8; 3] = [255; 3];

    /// A figure of 12×30 pixels in the middle of 40×40 white ones: a column for each region's colour.
    fn standing(colors: [[u8; 3]; 4]) -> Rgb8 {
        let mut picture = Rgb8::filled(40, 40, WHITE);
        for (region, color) in Region::ALL.into_iter().zip(colors) {
            let (top, bottom, _) = region.extent();
            for row in 0..30 {
                let down = (row as f32 + 0.5) / 30.0;
                if down >= top && down < bottom {
                    picture.paste(&Rgb8::filled(12, 1, color), 14, 5 + row);
                }
            }
        }
        picture
    }

    fn share(picture: &Rgb8, region: Region, color: &str) -> f64 {
        let (color, _) =
            ColorWord::at_start(&color.split(' ').collect::<Vec<_>>()).expect("a known word");
        let shares = Figure::find(picture).shares(&Vocabulary::new());
        shares.of(Attribute { region, color })
    }

    #[test]
    fn each_region_has_its_own_colour() {
        let picture = standing([[200, 8, 8], [8, 8, 240], [8, 136, 8], [104, 8, 8]]);
        for (region, color) in Region::ALL
            .into_iter()
            .zip(["red", "blue", "green", "dark red"])
        {
            assert_eq!(share(&picture, region, color), 1.0, "{region:?}");
            assert_eq!(share(&picture, region, "cyan"), 0.0, "{region:?}");
        }
        // The figure's place and size are no matter.
        let large = standing([[200, 8, 8]; 4]).magnify(3);
        assert_eq!(share(&large, Region::Feet, "red"), 1.0);
    }

    #[test]
    fn white_inside_an_outline_is_no_background() {
        let mut picture = standing([[0; 3]; 4]);
        picture.paste(&Rgb8::filled(10, 6, WHITE), 15, 16);
        assert_eq!(share(&picture, Region::Torso, "white"), 1.0);
        let figure = Figure::find(&picture);
        assert!(figure.is_foreground(20, 18));
        assert!(!figure.is_foreground(2, 2) && !figure.is_foreground(99, 2));
    }

    #[test]
    fn a_weapon_at_the_side_moves_no_region() {
        let mut picture = standing([[200, 8, 8], [8, 8, 240], [8, 136, 8], [104, 8, 8]]);
        picture.paste(&Rgb8::filled(1, 30, [8, 216, 216]), 4, 5);
        assert_eq!(share(&picture, Region::Torso, "blue"), 1.0);
    }

    #[test]
    fn an_empty_picture_shows_nothing() {
        let picture = Rgb8::filled(8, 8, WHITE);
        assert_eq!(share(&picture, Region::Head, "white"), 0.0);
    }
}
