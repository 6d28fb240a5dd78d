//! Data and recipes that cannot be trained on, each with its own message and exit code 2.

use artifacts::{CaptionRow, Footer, captions, digest_bytes};
use pipeline::{FailureKind, StageError, files};

use super::support::{LATENT_SHAPE, T5_TOKENS, World, recipe, vae_digest};
use crate::run;

/// The message and the advice of a run that must be refused.
fn refusal(world: &World) -> String {
    let context = world.context("train", recipe());
    let error = run(&context).expect_err("it cannot be trained on");
    assert_eq!(error.kind(), FailureKind::BadInput);
    assert!(error.help().is_some(), "no advice: {error}");
    assert!(!context.path(files::LORA).exists());
    error.to_string()
}

#[test]
fn latents_of_another_vae() {
    let world = World::new(2);
    let other = digest_bytes(b"another VAE");
    world.write_latents(0..2, LATENT_SHAPE, other);
    let message = refusal(&world);
    for digest in [vae_digest(), other] {
        assert!(message.contains(&digest.to_string()[..16]), "{message}");
    }
}

#[test]
fn an_image_without_a_latent() {
    let world = World::new(3);
    world.write_latents([0, 2], LATENT_SHAPE, vae_digest());
    let message = refusal(&world);
    assert!(
        message.contains("knight_1.png") && message.contains(&world.sample_id(1)),
        "{message}"
    );
}

#[test]
fn latents_of_a_size_that_is_no_whole_number_of_tokens() {
    let world = World::new(2);
    world.write_latents(0..2, [2, 4, 3], vae_digest());
    assert!(refusal(&world).contains("[2, 4, 3]"));
}

#[test]
fn latents_with_other_channels_than_the_transformer_takes() {
    let world = World::new(2);
    world.write_latents(0..2, [3, 4, 4], vae_digest());
    assert!(refusal(&world).contains("2 channels, a quarter of a token's"));
}

#[test]
fn embeddings_of_another_length() {
    let world = World::new(2);
    world.write_embeddings(T5_TOKENS + 2, 6);
    let message = refusal(&world);
    assert!(
        message.contains("texts of 5") && message.contains("wants 3"),
        "{message}"
    );
}

#[test]
fn embeddings_of_another_width() {
    let world = World::new(2);
    world.write_embeddings(T5_TOKENS, 8);
    let message = refusal(&world);
    assert!(
        message.contains("text tokens of 8") && message.contains("wants 6"),
        "{message}"
    );
}

#[test]
fn a_caption_that_was_not_embedded() {
    let world = World::new(2);
    let caption = "a caption that came later".to_owned();
    let row = CaptionRow {
        sample_id: world.sample_id(1),
        caption_hash: captions::caption_hash(&caption),
        caption: caption.clone(),
    };
    let path = world.path("ingest").join(files::CAPTIONS);
    captions::write(&path, &[row], &Footer::new()).expect("written");
    let message = refusal(&world);
    assert!(
        message.contains(&caption) && message.contains("knight_1.png"),
        "{message}"
    );
}

#[test]
fn a_caption_of_an_image_that_is_not_there() {
    let world = World::new(2);
    let caption = world.caption(0);
    let row = CaptionRow {
        sample_id: "0".repeat(64),
        caption_hash: captions::caption_hash(&caption),
        caption,
    };
    let path = world.path("ingest").join(files::CAPTIONS);
    captions::write(&path, &[row], &Footer::new()).expect("written");
    assert!(refusal(&world).contains(&"0".repeat(64)));
}

#[test]
fn no_captions_at_all() {
    let world = World::new(2);
    let path = world.path("ingest").join(files::CAPTIONS);
    captions::write(&path, &[], &Footer::new()).expect("written");
    assert!(refusal(&world).contains("pairs no image with a caption"));
}
