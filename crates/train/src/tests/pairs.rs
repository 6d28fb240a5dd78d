//! What a micro-batch holds.

use std::collections::BTreeSet;

use super::support::World;

/// Text tokens of each sample tell its caption apart, latents its image.
fn fingerprints(batch: &engine::MicroBatch) -> Vec<(Vec<u32>, Vec<u32>)> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    let per_sample = |values: &[f32]| -> Vec<Vec<u32>> {
        values
            .chunks(values.len() / batch.len())
            .map(bits)
            .collect()
    };
    per_sample(&batch.model_input)
        .into_iter()
        .zip(per_sample(&batch.noise))
        .collect()
}

#[test]
fn a_batch_is_the_same_however_it_is_cut() {
    let world = World::new(6);
    let data = world.data(3);
    let whole = fingerprints(&data.batch(4, 5).expect("readable"));
    let mut parts = fingerprints(&data.batch(4, 2).expect("readable"));
    parts.extend(fingerprints(&data.batch(6, 3).expect("readable")));
    assert_eq!(whole, parts);
}

#[test]
fn an_epoch_uses_every_caption_as_often_as_it_has_images() {
    let world = World::new(6);
    let data = world.data(3);
    let batch = data.batch(0, 6).expect("readable");
    let width = batch.prompt_embeds.len() / 6;
    let mut texts: Vec<Vec<u32>> = batch
        .prompt_embeds
        .chunks(width)
        .map(|text| text.iter().map(|v| v.to_bits()).collect())
        .collect();
    texts.sort();
    let distinct: BTreeSet<_> = texts.iter().cloned().collect();
    assert_eq!(distinct.len(), 3, "three captions, two images each");
    assert!(texts.chunks(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn the_next_epoch_has_another_order_and_other_noise() {
    let world = World::new(6);
    let data = world.data(3);
    let first = data.batch(0, 6).expect("readable");
    let second = data.batch(6, 6).expect("readable");
    assert_ne!(first.points, second.points);
    let noises = |batch| fingerprints(batch).into_iter().map(|(_, noise)| noise);
    let all: BTreeSet<_> = noises(&first).chain(noises(&second)).collect();
    assert_eq!(all.len(), 12, "no noise comes twice");
}

#[test]
fn another_seed_draws_everything_anew() {
    let world = World::new(4);
    let one = world.data(1).batch(0, 4).expect("readable");
    let other = world.data(2).batch(0, 4).expect("readable");
    assert_ne!(one.points, other.points);
    assert_ne!(one.noise, other.noise);
}

#[test]
fn a_latent_meets_its_own_images_caption() {
    // Posterior means differ by image; with the mean far from the others' a latent tells whose it is.
    let world = World::new(6);
    let data = world.data(5);
    let batch = data.batch(0, 6).expect("readable");
    let [channels, height, width] = data.latent_shape();
    let count = channels * height * width;
    let text = batch.prompt_embeds.len() / 6;
    for sample in 0..6 {
        let latent = &batch.model_input[sample * count..][..count];
        let distance = |image: usize, view: u32| -> f32 {
            let cache = artifacts::LatentCache::open(&world.path("cache-latents")).expect("there");
            let mean = cache
                .get(&world.sample_id(image), view)
                .expect("there")
                .mean;
            let expected = mean.iter().map(|z| (z - 0.1) * 0.5);
            latent
                .iter()
                .zip(expected)
                .map(|(x, e)| (x - e).powi(2))
                .sum()
        };
        let (image, _) = (0..6)
            .flat_map(|image| [0, 1].map(|view| (image, view)))
            .min_by(|a, b| distance(a.0, a.1).total_cmp(&distance(b.0, b.1)))
            .expect("twelve views");
        let table = artifacts::TextEmbeddings::open(
            &world.path("embed-text").join(pipeline::files::EMBEDDINGS),
        )
        .expect("there");
        let hash = artifacts::captions::caption_hash(&world.caption(image));
        let t5 = table.get(&hash).expect("readable").expect("there").t5;
        let t5: Vec<f32> = t5.iter().map(|v| v.to_f32()).collect();
        assert_eq!(batch.prompt_embeds[sample * text..][..text], t5);
    }
}
