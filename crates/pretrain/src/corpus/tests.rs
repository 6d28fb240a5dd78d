//! Corpora from every kind of source: what is taken, what the digest is made of, and what a person is told.

use std::path::{Path, PathBuf};

use pipeline::Failure;
use pixel_art::{encode_png_rgba, identity};
use tempfile::TempDir;

use super::*;
use crate::tests::tiny_recipe;

fn picture(shade: u8) -> Rgba8 {
    Rgba8::new(2, 1, vec![shade, 0, 0, 255, 0, shade, 0, 255])
}

fn png(shade: u8) -> Vec<u8> {
    encode_png_rgba(&picture(shade), &[]).expect("encodable")
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, bytes) in files {
        fs_err::write(dir.path().join(name), bytes).expect("written");
    }
    dir
}

/// Two pictures with captions, in files of their own.
fn captioned_folder() -> TempDir {
    folder(&[
        ("b.png", &png(20)),
        ("b.txt", b"a bee\n"),
        ("a.png", &png(10)),
        ("a.txt", b"an ant"),
    ])
}

/// Three rows: two pictures, and the first with its caption once more.
fn parquet() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../ingest/tests/fixtures/shards/train-00000-of-00002.parquet")
}

fn recipe(captioned: &[&Path], textures: &[&Path]) -> PretrainRecipe {
    let owned = |paths: &[&Path]| paths.iter().map(|path| path.to_path_buf()).collect();
    let mut recipe = tiny_recipe();
    recipe.corpus.captioned = owned(captioned);
    recipe.corpus.textures = owned(textures);
    recipe.corpus.held_out_share = 0.0;
    recipe
}

fn captions(corpus: &Corpus) -> Vec<(usize, &str)> {
    let pairs = corpus.pairs.iter();
    pairs
        .map(|pair| (pair.picture, pair.caption.as_str()))
        .collect()
}

/// Message and advice.
fn refused(recipe: &PretrainRecipe) -> String {
    let failure = Failure::from(Corpus::read(recipe).map(|_| ()).expect_err("bad input"));
    assert_eq!(failure.kind().exit_code(), 2, "{failure}");
    let help = failure.help().unwrap_or_default().to_owned();
    format!("{}\n{help}", failure.messages().join(": "))
}

#[test]
fn folders_and_tables_are_read_in_the_order_of_the_recipe_and_of_their_names() {
    let dir = captioned_folder();
    let corpus = Corpus::read(&recipe(&[dir.path(), &parquet()], &[])).expect("sound");
    assert_eq!((corpus.pictures.len(), corpus.pairs.len()), (4, 5));
    let pairs = captions(&corpus);
    assert_eq!(pairs[..2], [(0, "an ant"), (1, "a bee")]);
    assert_eq!((pairs[2].0, pairs[3].0), (2, 3));
    assert_eq!(pairs[4], pairs[2]);
}

#[test]
fn a_picture_under_two_captions_is_one_picture_and_two_pairs() {
    let metadata = b"file_name,text\na.png,an ant\nb.png,a bee\na.png,an insect\n";
    let dir = folder(&[
        ("a.png", &png(10)),
        ("b.png", &png(20)),
        ("metadata.csv", metadata),
    ]);
    let corpus = Corpus::read(&recipe(&[dir.path()], &[])).expect("sound");
    assert_eq!(corpus.pictures.len(), 2);
    assert_eq!(
        captions(&corpus),
        [(0, "an ant"), (1, "a bee"), (0, "an insect")]
    );
}

#[test]
fn the_digest_is_over_identities_and_captions_in_order_and_then_the_textures_pixels() {
    let dir = captioned_folder();
    let textures = folder(&[("t.png", &png(30))]);
    let corpus = Corpus::read(&recipe(&[dir.path()], &[textures.path()])).expect("sound");
    let mut bytes = Vec::new();
    for (shade, caption) in [(10, "an ant"), (20, "a bee")] {
        bytes.extend(identity(&picture(shade)).into_bytes());
        bytes.extend(caption.as_bytes());
    }
    bytes.extend([30, 0, 0, 255, 0, 30, 0, 255]);
    assert_eq!(corpus.digest, digest_bytes(&bytes));

    // As it was when corpora were Parquet files only: checkpoints of then must go on.
    let corpus = Corpus::read(&recipe(&[&parquet()], &[&parquet()])).expect("sound");
    let expected = "db6b2d11b3d81ca8f47a487bf0451a8dade5696efc6c7ae26520e6e0984140c6";
    assert_eq!(corpus.digest.to_string(), expected);
}

#[test]
fn textures_and_characters_need_no_captions() {
    let dir = captioned_folder();
    let bare = folder(&[("x.png", &png(30)), ("y.png", &png(40))]);
    let mut recipe = recipe(&[dir.path()], &[bare.path(), &parquet()]);
    recipe.corpus.caption_column = "no such column".to_owned();
    recipe.corpus.synthetic_textures = 0;
    recipe.evaluate.characters = bare.path().to_owned();
    recipe.evaluate.num_characters = 1;
    let corpus = Corpus::read(&recipe).expect("no captions are needed");
    assert_eq!(corpus.textures.len(), 5);
    assert_eq!(corpus.characters, [picture(30)]);
}

#[test]
fn pictures_and_captions_that_cannot_be_used_are_named_with_reasons() {
    let dir = captioned_folder();
    for (name, bytes) in [("c.png", &b""[..]), ("c.txt", b"x"), ("d.png", &png(40))] {
        fs_err::write(dir.path().join(name), bytes).expect("written");
    }
    let text = refused(&recipe(&[dir.path()], &[]));
    for said in [
        "2 images of corpus.captioned ",
        "- c.png: the file is empty (0 bytes) (zero-bytes)",
        "- d.png: there is no d.txt beside it (missing-caption)",
        "zero-bytes: fetch the file again",
        "missing-caption: give each image a caption",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    let second = parquet().with_file_name("train-00001-of-00002.parquet");
    let text = refused(&recipe(&[&second], &[]));
    assert!(
        text.contains("train-00001-of-00002.parquet row 1: its caption is null"),
        "{text}"
    );
}

#[test]
fn a_source_that_cannot_be_read_is_named_by_its_key() {
    let dir = captioned_folder();
    let absent = dir.path().join("absent");
    let text = refused(&recipe(&[&absent], &[]));
    assert!(
        text.starts_with("corpus.captioned is ") && text.contains("absent, which does not exist"),
        "{text}"
    );
    let text = refused(&recipe(&[dir.path()], &[&absent]));
    assert!(text.starts_with("corpus.textures is "), "{text}");
    let mut columns = recipe(&[&parquet()], &[]);
    columns.corpus.caption_column = "words".to_owned();
    let text = refused(&columns);
    assert!(
        text.contains("no column \"words\"") && text.contains("set corpus.caption_column"),
        "{text}"
    );
    let mut large = recipe(&[dir.path()], &[]);
    let wide = encode_png_rgba(&picture(1).magnify(9), &[]).expect("encodable");
    let characters = folder(&[("wide.png", &wide)]);
    large.evaluate.characters = characters.path().to_owned();
    let text = refused(&large);
    assert!(
        text.contains("evaluate.characters") && text.contains("wide.png: it is 18×9 px"),
        "{text}"
    );
}
