//! A cache gives back what it was given, for the image it was given for, or says why not.

use super::*;
use crate::digest::digest_bytes;

fn latent(sample: u8, view: u32) -> Latent {
    let first = f32::from(sample) + view as f32 / 8.0;
    Latent {
        sample_id: digest_bytes(&[sample]).to_string(),
        view,
        shape: [2, 1, 3],
        mean: (0..6).map(|i| first + i as f32).collect(),
        logvar: (0..6).map(|i| -first - i as f32).collect(),
        flipped: view == 1,
        crop_x_px: 8,
        crop_y_px: 16,
    }
}

fn vae() -> Digest {
    digest_bytes(b"vae")
}

/// A cache of three images with two views, three latents a shard.
fn cache() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut writer = LatentCacheWriter::create(dir.path(), vae(), "512x512");
    writer.shard_bytes = 3 * 2 * 6 * 4;
    for sample in 0..3 {
        for view in 0..2 {
            writer.push(latent(sample, view)).expect("written");
        }
    }
    assert_eq!(writer.finish().expect("written").len(), 6);
    dir
}

fn replace_shard(dir: &Path, tensors: &[TensorToWrite<'_>], vae: Digest) {
    let metadata = BTreeMap::from([("vae_digest".to_owned(), vae.to_string())]);
    write_safetensors(&dir.join(shard_name(1)), tensors, &metadata).expect("written");
}

#[test]
fn what_was_cached_is_read_for_its_own_image() {
    let dir = cache();
    let cache = LatentCache::open(dir.path()).expect("sound");
    assert_eq!(cache.shards.len(), 2);
    assert_eq!(cache.geometry(), "512x512");
    for sample in (0..3).rev() {
        for view in 0..2 {
            let expected = latent(sample, view);
            assert_eq!(
                cache.get(&expected.sample_id, view).expect("there"),
                expected
            );
        }
    }
}

#[test]
fn an_empty_cache_is_a_cache() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    LatentCacheWriter::create(dir.path(), vae(), "any")
        .finish()
        .expect("written");
    assert!(
        LatentCache::open(dir.path())
            .expect("sound")
            .rows()
            .is_empty()
    );
}

#[test]
fn a_latent_that_is_not_there_is_named() {
    let dir = cache();
    let cache = LatentCache::open(dir.path()).expect("sound");
    let error = cache
        .get(&latent(0, 0).sample_id, 2)
        .expect_err("no such view");
    assert!(matches!(
        error,
        ArtifactError::MissingLatent { view: 2, .. }
    ));
}

#[test]
fn latents_of_another_vae_are_refused() {
    let dir = cache();
    let cache = LatentCache::open(dir.path()).expect("sound");
    cache.check_vae(vae()).expect("the same");
    let other = digest_bytes(b"other");
    assert!(matches!(
        cache.check_vae(other),
        Err(ArtifactError::OtherVae { .. })
    ));
    drop(cache);
    replace_shard(dir.path(), &[], other);
    let text = LatentCache::open(dir.path())
        .err()
        .expect("a shard of another VAE")
        .to_string();
    assert!(
        text.contains("vae_digest") && text.contains(&other.to_string()),
        "{text}"
    );
}

#[test]
fn the_same_latent_twice_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut writer = LatentCacheWriter::create(dir.path(), vae(), "any");
    writer.push(latent(0, 0)).expect("new");
    assert!(matches!(
        writer.push(latent(0, 0)),
        Err(ArtifactError::DuplicateLatent { .. })
    ));
}

#[test]
fn numbers_that_do_not_fill_the_shape_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut writer = LatentCacheWriter::create(dir.path(), vae(), "any");
    let mut short = latent(0, 0);
    short.logvar.pop();
    let error = writer.push(short).expect_err("five of six");
    assert!(matches!(
        error,
        ArtifactError::LatentSize {
            part: "logvar",
            expected: 6,
            found: 5,
            ..
        }
    ));
}

#[test]
fn an_index_and_a_shard_that_disagree_are_refused() {
    let names: Vec<[String; 2]> = [(1, 1), (2, 0), (2, 1)]
        .map(|(s, v)| tensor_names(&latent(s, v).sample_id, v))
        .to_vec();
    let numbers = [0.0f32; 6];
    let all = |shape: &'static [usize]| -> Vec<TensorToWrite<'_>> {
        names
            .iter()
            .flatten()
            .map(|name| TensorToWrite::f32(name, shape, &numbers))
            .collect()
    };

    let dir = cache();
    replace_shard(dir.path(), &all(&[2, 1, 3]), vae());
    LatentCache::open(dir.path()).expect("the same names and shapes");
    replace_shard(dir.path(), &all(&[2, 3, 1]), vae());
    assert!(matches!(
        LatentCache::open(dir.path()),
        Err(ArtifactError::LatentShape { .. })
    ));
    replace_shard(dir.path(), &all(&[2, 1, 3])[1..], vae());
    assert!(matches!(
        LatentCache::open(dir.path()),
        Err(ArtifactError::MissingTensor { .. })
    ));
    let mut more = all(&[2, 1, 3]);
    more.push(TensorToWrite::f32("stray", &[6], &numbers));
    replace_shard(dir.path(), &more, vae());
    assert!(matches!(
        LatentCache::open(dir.path()),
        Err(ArtifactError::LatentShard { .. })
    ));
    std::fs::remove_file(dir.path().join(shard_name(1))).expect("removed");
    assert!(matches!(
        LatentCache::open(dir.path()),
        Err(ArtifactError::Io { .. })
    ));
}

#[test]
fn a_shard_name_that_leaves_the_directory_is_not_opened() {
    for name in ["../x", "/x", "a\\b", "", ".hidden", "c:x"] {
        assert!(!is_plain_file_name(name), "{name:?}");
    }
    assert!(is_plain_file_name("latents-00000.safetensors"));
}

#[test]
fn the_same_latents_give_the_same_bytes() {
    let [first, second] = [cache(), cache()];
    for file in [INDEX_FILE.to_owned(), shard_name(0), shard_name(1)] {
        let read =
            |dir: &tempfile::TempDir| std::fs::read(dir.path().join(&file)).expect("readable");
        assert_eq!(read(&first), read(&second), "{file}");
    }
}
