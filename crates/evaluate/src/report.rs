//! Everything that was measured, as one typed document and as a page for people.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::loss::HeldOutLoss;
use crate::pixels::PixelFigures;
use crate::visibility::Visibility;

/// Version of the report's layout.
pub const REPORT_VERSION: u32 = 1;

/// Which pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupKind {
    /// Drawn with the recipe's LoRAs.
    WithLoras,
    /// Drawn by the base alone.
    Base,
    /// The held-out sprites themselves: what can be reached.
    RealSprites,
}

impl GroupKind {
    /// In words.
    pub fn title(self) -> &'static str {
        match self {
            Self::WithLoras => "with LoRA",
            Self::Base => "base alone",
            Self::RealSprites => "real held-out sprites",
        }
    }
}

/// The figures of a group of pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Which pictures.
    pub kind: GroupKind,
    /// Whether they show the colours that their prompts name; absent if that is off or prompts name none.
    pub attributes: Option<Visibility>,
    /// Whether they look like pixel art.
    pub pixels: PixelFigures,
}

/// `report.json`. Nothing in it depends on time or place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this layout.
    pub report_version: u32,
    /// Name of the recipe.
    pub recipe: String,
    /// Whether the base's weights are random, so that its pictures are noise.
    pub untrained_base: bool,
    /// Share of a region from which on a colour counts as visible.
    pub visible_share: f64,
    /// Random reassignments of prompts.
    pub permutations: u32,
    /// The loss on held-out pictures; absent if the recipe holds none out.
    pub held_out: Option<HeldOutLoss>,
    /// The pictures, group by group.
    pub groups: Vec<Group>,
}

impl Report {
    /// A group's figures.
    pub fn group(&self, kind: GroupKind) -> Option<&Group> {
        self.groups.iter().find(|group| group.kind == kind)
    }

    /// What a person wants to know first, a sentence each.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(loss) = &self.held_out {
            notes.push(format!(
                "held-out loss {:.4} -> {:.4} ({}, 95 % interval {} to {}), lower on {} of {} pictures",
                loss.base.mean,
                loss.lora.mean,
                signed_percent(loss.change),
                signed_percent(loss.interval.low),
                signed_percent(loss.interval.high),
                loss.num_improved,
                loss.pictures.len()
            ));
        }
        let groups: Vec<String> = self
            .groups
            .iter()
            .filter_map(|group| {
                let rate = &group.attributes.as_ref()?.hit_rate;
                Some(format!(
                    "{} {} against {} by chance (p = {})",
                    group.kind.title(),
                    percent(rate.found),
                    percent(rate.by_chance),
                    short_p(rate.p)
                ))
            })
            .collect();
        if !groups.is_empty() {
            notes.push(format!("attributes visible: {}", groups.join("; ")));
        }
        notes
    }

    /// The page for people, in Markdown.
    pub fn to_markdown(&self) -> String {
        let mut page = format!("# Evaluation of `{}`\n", self.recipe);
        if self.untrained_base {
            page.push_str("\nThe base is untrained: its pictures are noise.\n");
        }
        if let Some(loss) = &self.held_out {
            held_out_section(&mut page, loss);
        }
        self.attribute_section(&mut page);
        self.pixel_section(&mut page);
        page
    }

    fn attribute_section(&self, page: &mut String) {
        let groups: Vec<(&Group, &Visibility)> = self
            .groups
            .iter()
            .filter_map(|group| Some((group, group.attributes.as_ref()?)))
            .collect();
        if groups.is_empty() {
            return;
        }
        let _ = write!(
            page,
            "\n## Colours that prompts name\n\nVisible: the colour covers at least {} of its region (outlines left \
             out). Chance: prompts exchanged among the pictures of a seed, {} times; p: how often that gives as much.\n\n\
             | pictures | attributes | visible | by chance | p | mean share | by chance | p |\n\
             |---|---|---|---|---|---|---|---|\n",
            percent(self.visible_share),
            self.permutations
        );
        for (group, figures) in &groups {
            let _ = writeln!(
                page,
                "| {} ({}) | {} | {} | {} | {} | {} | {} | {} |",
                group.kind.title(),
                figures.pictures,
                figures.attributes,
                percent(figures.hit_rate.found),
                percent(figures.hit_rate.by_chance),
                short_p(figures.hit_rate.p),
                percent(figures.mean_share.found),
                percent(figures.mean_share.by_chance),
                short_p(figures.mean_share.p)
            );
        }
        page.push_str(
            "\n| pictures | region | attributes | visible | by chance |\n|---|---|---|---|---|\n",
        );
        for (group, figures) in &groups {
            for region in &figures.regions {
                let name = format!("{:?}", region.region).to_lowercase();
                let _ = writeln!(
                    page,
                    "| {} | {name} | {} | {} | {} |",
                    group.kind.title(),
                    region.attributes,
                    percent(region.hit_rate),
                    percent(region.by_chance)
                );
            }
        }
    }

    fn pixel_section(&self, page: &mut String) {
        if self.groups.is_empty() {
            return;
        }
        page.push_str(
            "\n## Pixels\n\nFlat squares: of the squares that a sprite pixel would be, the share of one colour.\n\n\
             | pictures | flat squares | colours |\n|---|---|---|\n",
        );
        for group in &self.groups {
            let pixels = &group.pixels;
            let _ = writeln!(
                page,
                "| {} ({}) | {} | {:.0} |",
                group.kind.title(),
                pixels.pictures,
                pixels.flat_squares.map_or("-".to_owned(), percent),
                pixels.num_colors
            );
        }
    }
}

fn held_out_section(page: &mut String, loss: &HeldOutLoss) {
    let _ = write!(
        page,
        "\n## Loss on held-out pictures\n\nMean squared error of the velocity over {} pictures, {} at each noise \
         level; the same noises with and without the LoRA.\n\n\
         | noise level | base | with LoRA | change |\n|---|---|---|---|\n",
        loss.pictures.len(),
        match loss.draws {
            1 => "one noise".to_owned(),
            draws => format!("{draws} noises"),
        }
    );
    let rows = loss.base.by_sigma.iter().zip(&loss.lora.by_sigma);
    for (sigma, (base, lora)) in loss.sigmas.iter().zip(rows) {
        let change = signed_percent(lora / base - 1.0);
        let _ = writeln!(page, "| {sigma} | {base:.4} | {lora:.4} | {change} |");
    }
    let _ = writeln!(
        page,
        "| mean | {:.4} | {:.4} | {} (95 % interval {} to {}) |",
        loss.base.mean,
        loss.lora.mean,
        signed_percent(loss.change),
        signed_percent(loss.interval.low),
        signed_percent(loss.interval.high)
    );
    let _ = writeln!(
        page,
        "\nLower with the LoRA on {} of {} pictures.",
        loss.num_improved,
        loss.pictures.len()
    );
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

fn signed_percent(change: f64) -> String {
    format!("{:+.1} %", 100.0 * change)
}

/// p to its first digit that counts, never as 0.
fn short_p(p: f64) -> String {
    if p >= 0.1 {
        format!("{p:.2}")
    } else if p >= 0.001 {
        format!("{p:.3}")
    } else {
        format!("{p:.1e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figure::Region;
    use crate::interval::Interval;
    use crate::loss::{MeanLoss, PictureLoss};
    use crate::visibility::{AgainstChance, RegionFigures};

    fn report() -> Report {
        let against = |found, by_chance, p| AgainstChance {
            found,
            by_chance,
            p,
        };
        Report {
            report_version: REPORT_VERSION,
            recipe: "demo".into(),
            untrained_base: false,
            visible_share: 0.15,
            permutations: 1999,
            held_out: Some(HeldOutLoss {
                sigmas: vec![0.5],
                draws: 1,
                base: MeanLoss {
                    mean: 2.0,
                    by_sigma: vec![2.0],
                },
                lora: MeanLoss {
                    mean: 1.5,
                    by_sigma: vec![1.5],
                },
                change: -0.25,
                interval: Interval {
                    low: -0.3,
                    high: -0.2,
                    resamples: 100,
                },
                num_improved: 1,
                pictures: vec![PictureLoss {
                    sample_id: "00".into(),
                    source_file: "a.png".into(),
                    base: vec![2.0],
                    lora: vec![1.5],
                }],
            }),
            groups: vec![Group {
                kind: GroupKind::WithLoras,
                attributes: Some(Visibility {
                    pictures: 8,
                    attributes: 20,
                    visible: 14,
                    hit_rate: against(0.7, 0.3, 0.0005),
                    mean_share: against(0.4, 0.1, 0.002),
                    regions: vec![RegionFigures {
                        region: Region::Head,
                        attributes: 20,
                        hit_rate: 0.7,
                        by_chance: 0.3,
                    }],
                }),
                pixels: PixelFigures {
                    pictures: 8,
                    flat_squares: Some(0.5),
                    num_colors: 20.4,
                },
            }],
        }
    }

    #[test]
    fn the_notes_hold_the_essentials() {
        assert_eq!(
            report().notes(),
            [
                "held-out loss 2.0000 -> 1.5000 (-25.0 %, 95 % interval -30.0 % to -20.0 %), lower on 1 of 1 pictures",
                "attributes visible: with LoRA 70 % against 30 % by chance (p = 5.0e-4)"
            ]
        );
    }

    #[test]
    fn the_page_has_a_row_for_each_figure() {
        let page = report().to_markdown();
        for row in [
            "| 0.5 | 2.0000 | 1.5000 | -25.0 % |",
            "| mean | 2.0000 | 1.5000 | -25.0 % (95 % interval -30.0 % to -20.0 %) |",
            "| with LoRA (8) | 20 | 70 % | 30 % | 5.0e-4 | 40 % | 10 % | 0.002 |",
            "| with LoRA | head | 20 | 70 % | 30 % |",
            "| with LoRA (8) | 50 % | 20 |",
        ] {
            assert!(page.lines().any(|line| line == row), "{row} not in {page}");
        }
    }

    #[test]
    fn what_was_not_measured_is_not_on_the_page() {
        let mut report = report();
        report.held_out = None;
        report.groups[0].attributes = None;
        let page = report.to_markdown();
        assert!(
            !page.contains("Loss") && !page.contains("Colours that"),
            "{page}"
        );
        assert!(report.notes().is_empty());
    }

    #[test]
    fn the_report_is_read_back_the_same() {
        let json = serde_json::to_string(&report()).expect("written");
        assert_eq!(
            serde_json::from_str::<Report>(&json).expect("read"),
            report()
        );
    }
}
