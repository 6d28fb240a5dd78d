//! Are the colours that prompts name visible more often than chance? A permutation test.
//!
//! The pictures of one seed (and number) start from the same noise and differ by their prompts alone. If prompts had no
//! effect, any assignment of prompts to the pictures of a seed would be as likely as the true one. So prompts are
//! reassigned at random within each seed, and the statistic is taken again: how often it is at least as large as with the
//! true assignment is the p-value, `(1 + count) / (1 + permutations)`, one-sided.
//!
//! Two statistics over all attributes of all pictures: the hit rate, the share of attributes that are visible (their
//! colour covers at least `visible_share` of its region), and the mean share that the colours cover.

use std::collections::BTreeMap;

use flow_matching::{Purpose, Stream};
use pipeline::recipe::EvaluateRecipe;
use serde::{Deserialize, Serialize};

use crate::attributes::Attribute;
use crate::figure::{Region, RegionShares};

/// Sums of shares in another order may differ by so much.
const ROUNDING: f64 = 1e-9;

/// A picture and what its prompt says.
#[derive(Clone, Debug)]
pub struct Scene {
    /// Which pictures prompts are exchanged with: seed and number.
    pub stratum: (u64, u32),
    /// What the prompt says.
    pub attributes: Vec<Attribute>,
    /// What the picture shows.
    pub shares: RegionShares,
}

/// A figure beside what chance would give.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgainstChance {
    /// With the true prompts.
    pub found: f64,
    /// Mean over all permutations.
    pub by_chance: f64,
    /// Share of assignments (the true one included) that give as much or more.
    pub p: f64,
}

/// The attributes of one region.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegionFigures {
    /// The region.
    pub region: Region,
    /// Attributes that prompts name.
    pub attributes: u64,
    /// Share that is visible.
    pub hit_rate: f64,
    /// The same with exchanged prompts.
    pub by_chance: f64,
}

/// What a group of pictures shows of its prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Visibility {
    /// Pictures.
    pub pictures: u64,
    /// Attributes that their prompts name.
    pub attributes: u64,
    /// How many are visible.
    pub visible: u64,
    /// Share of attributes that are visible.
    pub hit_rate: AgainstChance,
    /// Mean share of its region that an attribute's colour covers.
    pub mean_share: AgainstChance,
    /// The hit rate by region, top to bottom.
    pub regions: Vec<RegionFigures>,
}

/// Both statistics, not yet divided by the number of attributes.
#[derive(Clone, Debug, Default)]
struct Sums {
    hits: [u64; 4],
    shares: f64,
}

impl Sums {
    fn num_hits(&self) -> u64 {
        self.hits.iter().sum()
    }
}

/// Measures a group; `None` if its prompts name nothing.
pub fn measure(scenes: &[Scene], recipe: &EvaluateRecipe) -> Option<Visibility> {
    let mut per_region = [0_u64; 4];
    for attribute in scenes.iter().flat_map(|scene| &scene.attributes) {
        per_region[attribute.region as usize] += 1;
    }
    let num_attributes: u64 = per_region.iter().sum();
    if num_attributes == 0 {
        return None;
    }
    let mut assignment: Vec<usize> = (0..scenes.len()).collect();
    let truth = sums(scenes, &assignment, recipe.visible_share);
    let mut strata: BTreeMap<(u64, u32), Vec<usize>> = BTreeMap::new();
    for (index, scene) in scenes.iter().enumerate() {
        strata.entry(scene.stratum).or_default().push(index);
    }
    let (mut hits_as_many, mut shares_as_large) = (0_u64, 0_u64);
    let mut total = Sums::default();
    for number in 0..u64::from(recipe.permutations) {
        let mut stream = Stream::new(recipe.seed, Purpose::Permutation, number, "");
        for members in strata.values() {
            let mut order = members.clone();
            stream.shuffle(&mut order);
            for (picture, prompt) in members.iter().zip(order) {
                assignment[*picture] = prompt;
            }
        }
        let found = sums(scenes, &assignment, recipe.visible_share);
        hits_as_many += u64::from(found.num_hits() >= truth.num_hits());
        shares_as_large += u64::from(found.shares >= truth.shares - ROUNDING);
        total.shares += found.shares;
        for (sum, hits) in total.hits.iter_mut().zip(found.hits) {
            *sum += hits;
        }
    }
    let permutations = f64::from(recipe.permutations);
    let count = num_attributes as f64;
    let p = |as_much: u64| (1.0 + as_much as f64) / (1.0 + permutations);
    let regions = Region::ALL
        .into_iter()
        .filter(|region| per_region[*region as usize] > 0)
        .map(|region| {
            let at = region as usize;
            let count = per_region[at] as f64;
            RegionFigures {
                region,
                attributes: per_region[at],
                hit_rate: truth.hits[at] as f64 / count,
                by_chance: total.hits[at] as f64 / permutations / count,
            }
        })
        .collect();
    Some(Visibility {
        pictures: scenes.len() as u64,
        attributes: num_attributes,
        visible: truth.num_hits(),
        hit_rate: AgainstChance {
            found: truth.num_hits() as f64 / count,
            by_chance: total.num_hits() as f64 / permutations / count,
            p: p(hits_as_many),
        },
        mean_share: AgainstChance {
            found: truth.shares / count,
            by_chance: total.shares / permutations / count,
            p: p(shares_as_large),
        },
        regions,
    })
}

/// The statistics if picture `i` had been drawn for the prompt of picture `assignment[i]`.
fn sums(scenes: &[Scene], assignment: &[usize], visible_share: f64) -> Sums {
    let mut sums = Sums::default();
    for (picture, prompt) in scenes.iter().zip(assignment) {
        for attribute in &scenes[*prompt].attributes {
            let share = picture.shares.of(*attribute);
            sums.shares += share;
            sums.hits[attribute.region as usize] += u64::from(share >= visible_share);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use pixel_art::Rgb8;

    use super::*;
    use crate::color_words::{ColorWord, Vocabulary};
    use crate::figure::Figure;
    use crate::test_recipe::recipe;

    const COLORS: [(&str, [u8; 3]); 4] = [
        ("red", [200, 8, 8]),
        ("blue", [8, 8, 240]),
        ("green", [8, 136, 8]),
        ("cyan", [8, 216, 216]),
    ];

    /// A figure of one colour, drawn for a prompt that wants one for the head.
    fn scene(seed: u64, shown: [u8; 3], wanted: &str) -> Scene {
        let mut picture = Rgb8::filled(40, 40, [255; 3]);
        picture.paste(&Rgb8::filled(12, 30, shown), 14, 5);
        let (color, _) = ColorWord::at_start(&[wanted]).expect("a known word");
        Scene {
            stratum: (seed, 0),
            attributes: vec![Attribute {
                region: Region::Head,
                color,
            }],
            shares: Figure::find(&picture).shares(&Vocabulary::new()),
        }
    }

    #[test]
    fn pictures_that_obey_are_far_above_chance() {
        let scenes: Vec<Scene> = [1, 2]
            .into_iter()
            .flat_map(|seed| COLORS.map(|(word, color)| scene(seed, color, word)))
            .collect();
        let found = measure(&scenes, &recipe()).expect("there are attributes");
        assert_eq!((found.pictures, found.attributes, found.visible), (8, 8, 8));
        assert_eq!(found.hit_rate.found, 1.0);
        // A random order of four leaves one at its place on average.
        assert!((found.hit_rate.by_chance - 0.25).abs() < 0.03, "{found:?}");
        // The true order of both seeds: (1/24)² of all.
        assert!(found.hit_rate.p < 0.01, "{found:?}");
        assert_eq!(found.mean_share.found, 1.0);
        assert_eq!(found.regions.len(), 1);
        assert_eq!(found.regions[0].region, Region::Head);
    }

    #[test]
    fn pictures_that_ignore_their_prompts_are_at_chance() {
        let scenes = COLORS.map(|(word, _)| scene(1, COLORS[0].1, word));
        let found = measure(&scenes, &recipe()).expect("there are attributes");
        assert_eq!(found.hit_rate.found, 0.25);
        assert_eq!(found.hit_rate.by_chance, 0.25);
        assert_eq!((found.hit_rate.p, found.mean_share.p), (1.0, 1.0));
    }

    #[test]
    fn prompts_are_exchanged_within_a_seed_only() {
        // Each seed has one colour for all its prompts: between seeds the true assignment would look significant.
        let scenes: Vec<Scene> = (0..6)
            .flat_map(|seed| {
                let (word, color) = COLORS[seed % 2];
                [(); 4].map(|()| scene(seed as u64, color, word))
            })
            .collect();
        let found = measure(&scenes, &recipe()).expect("there are attributes");
        assert_eq!(found.hit_rate.found, 1.0);
        assert_eq!(found.hit_rate.p, 1.0);
    }

    #[test]
    fn prompts_that_name_nothing_have_no_figures() {
        let mut silent = scene(1, COLORS[0].1, "red");
        silent.attributes.clear();
        assert_eq!(measure(&[silent], &recipe()), None);
        assert_eq!(measure(&[], &recipe()), None);
    }

    #[test]
    fn equal_requests_give_equal_figures() {
        let scenes = COLORS.map(|(word, color)| scene(1, color, word));
        assert_eq!(measure(&scenes, &recipe()), measure(&scenes, &recipe()));
    }
}
