//! What a prompt says of colours: "long red hair, blue robe" is red in the head and blue in the torso.

use pipeline::recipe::EvaluateRecipe;

use crate::color_words::ColorWord;
use crate::figure::Region;

/// A colour that should be seen in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attribute {
    /// Where.
    pub region: Region,
    /// What.
    pub color: ColorWord,
}

/// The things whose colours are looked for, by region.
#[derive(Clone, Debug)]
pub struct Things<'a> {
    words: [(Region, &'a [String]); 4],
}

impl<'a> Things<'a> {
    /// Those of the recipe.
    pub fn new(recipe: &'a EvaluateRecipe) -> Self {
        Self {
            words: [
                (Region::Head, &recipe.head_words),
                (Region::Torso, &recipe.torso_words),
                (Region::Legs, &recipe.legs_words),
                (Region::Feet, &recipe.feet_words),
            ],
        }
    }

    /// Whether none are named: no attributes are measured then.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|(_, words)| words.is_empty())
    }

    /// What a prompt says, each once, sorted.
    ///
    /// A thing has the colour that stands before it in its phrase (between commas), behind any earlier thing. Things
    /// with no colour or with several ("red and yellow striped pants") say nothing that could be measured.
    pub fn attributes(&self, prompt: &str) -> Vec<Attribute> {
        let prompt = prompt.to_lowercase();
        let mut found = Vec::new();
        for phrase in prompt.split([',', ';', '.']) {
            let words: Vec<&str> = phrase
                .split(|c: char| !c.is_alphanumeric() && c != '-')
                .filter(|word| !word.is_empty())
                .collect();
            let mut colors = Vec::new();
            let mut at = 0;
            while at < words.len() {
                if let Some((color, length)) = ColorWord::at_start(&words[at..]) {
                    colors.push(color);
                    at += length;
                    continue;
                }
                if let Some(region) = self.region_of(words[at]) {
                    if let [color] = colors[..] {
                        found.push(Attribute { region, color });
                    }
                    colors.clear();
                }
                at += 1;
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    fn region_of(&self, word: &str) -> Option<Region> {
        self.words
            .iter()
            .find(|(_, words)| words.iter().any(|known| known == word))
            .map(|(region, _)| *region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(prompt: &str) -> Vec<(Region, &'static str)> {
        let words = |list: &[&str]| -> Vec<String> { list.iter().map(|w| (*w).into()).collect() };
        let [head, torso, legs, feet] = [
            words(&["hair", "hat"]),
            words(&["robe", "armor"]),
            words(&["pants"]),
            words(&["boots"]),
        ];
        let things = Things {
            words: [
                (Region::Head, &head),
                (Region::Torso, &torso),
                (Region::Legs, &legs),
                (Region::Feet, &feet),
            ],
        };
        let attributes = things.attributes(prompt);
        attributes
            .into_iter()
            .map(|attribute| (attribute.region, attribute.color.name()))
            .collect()
    }

    #[test]
    fn a_caption_says_a_colour_for_each_of_its_things() {
        assert_eq!(
            said(
                "pixel art character, vampire woman, long red hair, blue monk robe, orange pants, dark red boots, \
                 no weapon, facing forward"
            ),
            [
                (Region::Head, "red"),
                (Region::Torso, "blue"),
                (Region::Legs, "orange"),
                (Region::Feet, "dark red")
            ]
        );
        assert_eq!(
            said("human man with dark skin, Red hair in a knot"),
            [(Region::Head, "red")]
        );
    }

    #[test]
    fn things_in_one_phrase_keep_their_own_colours() {
        assert_eq!(
            said("a knight with red hair and gray plate armor"),
            [(Region::Head, "red"), (Region::Torso, "gray")]
        );
    }

    #[test]
    fn two_colours_no_colour_and_other_things_say_nothing() {
        assert_eq!(said("red and yellow striped pants, bald, boots"), []);
        assert_eq!(said("gray cloak, golden shield, red"), []);
    }
}
