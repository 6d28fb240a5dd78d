//! The measure of colours held against the shipped sprites, whose captions are known to be true: what it finds in them is
//! what can be reached, and it must be far above chance, also when the pictures are as soft as an autoencoder leaves
//! them.

use std::path::Path;

use evaluate::attributes::Things;
use evaluate::color_words::Vocabulary;
use evaluate::figure::Figure;
use evaluate::visibility::{Scene, Visibility, measure};
use pipeline::recipe::Recipe;
use pixel_art::{Limits, Rgb8, decode};

const WHITE: [u8; 3] = [255; 3];

fn measured(data: &str, change: impl Fn(Rgb8) -> Rgb8) -> Visibility {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let recipe = Recipe::load(&root.join("configs/demo.toml"), &[]).expect("the demo's recipe");
    let dir = root.join("data").join(data);
    let captions = fs_err::read_to_string(dir.join("metadata.jsonl")).expect("captions");
    let (things, vocabulary) = (Things::new(&recipe.evaluate), Vocabulary::new());
    let limits = Limits {
        max_pixels: 1 << 20,
    };
    let scenes: Vec<Scene> = captions
        .lines()
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).expect("a row of JSON");
            let file = row["file_name"].as_str().expect("a file name");
            let bytes = fs_err::read(dir.join(file)).expect("readable");
            let picture = decode(&bytes, &limits).expect("a PNG").picture.over(WHITE);
            Scene {
                stratum: (0, 0),
                attributes: things.attributes(row["text"].as_str().expect("a caption")),
                shares: Figure::find(&change(picture)).shares(&vocabulary),
            }
        })
        .collect();
    measure(&scenes, &recipe.evaluate).expect("captions name colours")
}

/// Every pixel the mean of the square of 5×5 around it.
fn soft(picture: &Rgb8) -> Rgb8 {
    let mut soft = picture.clone();
    for y in 0..picture.height_px {
        for x in 0..picture.width_px {
            let mut sums = [0_u32; 3];
            let mut count = 0;
            for v in y.saturating_sub(2)..(y + 3).min(picture.height_px) {
                for u in x.saturating_sub(2)..(x + 3).min(picture.width_px) {
                    for (sum, channel) in sums.iter_mut().zip(picture.pixel(u, v)) {
                        *sum += u32::from(channel);
                    }
                    count += 1;
                }
            }
            let mean = sums.map(|sum| (sum / count) as u8);
            soft.paste(&Rgb8::filled(1, 1, mean), x, y);
        }
    }
    soft
}

#[test]
fn held_out_sprites_show_what_their_captions_say() {
    let found = measured("characters-held-out", |picture| picture);
    assert_eq!(found.pictures, 24);
    assert!(found.attributes > 80, "{found:?}");
    assert!(found.hit_rate.found > 0.8, "{found:?}");
    assert!(found.hit_rate.by_chance < 0.35, "{found:?}");
    assert!(
        found.hit_rate.p < 0.001 && found.mean_share.p < 0.001,
        "{found:?}"
    );
    for region in &found.regions {
        assert!(region.hit_rate > region.by_chance + 0.2, "{region:?}");
    }
}

#[test]
fn training_sprites_show_what_their_captions_say() {
    let found = measured("characters", |picture| picture);
    assert!(found.hit_rate.found > 0.75, "{found:?}");
    assert!(found.hit_rate.by_chance < 0.35, "{found:?}");
}

#[test]
fn magnified_and_softened_sprites_still_show_it() {
    let sharp = measured("characters-held-out", |picture| picture.magnify(4));
    assert!(sharp.hit_rate.found > 0.8, "{sharp:?}");
    let found = measured("characters-held-out", |picture| soft(&picture.magnify(4)));
    assert!(found.hit_rate.found > 0.6, "{found:?}");
    assert!(found.hit_rate.p < 0.001, "{found:?}");
}
