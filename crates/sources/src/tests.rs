//! What readers share: places, captions and pixels of every layout, and messages in the reader's own words. (What a
//! person is told about each kind of bad input is tested where it is told, in `ingest` and `pretrain`.)

use std::path::Path;

use pipeline::StageError as _;
use pixel_art::{Limits, Rgba8, encode_png_rgba};
use tempfile::TempDir;

use crate::{Source, SourceError, SourceKeys, SourceRecipe};

const KEYS: SourceKeys = SourceKeys {
    source: "corpus.mine",
    image_column: "corpus.image",
    caption_column: "corpus.words",
};

const LIMITS: Limits = Limits { max_pixels: 100 };

fn recipe(path: &Path) -> SourceRecipe<'_> {
    SourceRecipe {
        path,
        image_column: "image",
        caption_column: "text",
        keys: &KEYS,
    }
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, bytes) in files {
        fs_err::write(dir.path().join(name), bytes).expect("written");
    }
    dir
}

fn png(shade: u8) -> Vec<u8> {
    encode_png_rgba(&Rgba8::new(1, 1, vec![shade, 0, 0, 255]), &[]).expect("encodable")
}

/// File, caption or reason, red of the first pixel or reason.
type Seen = (
    String,
    Result<String, &'static str>,
    Result<u8, &'static str>,
);

fn seen(source: &Source) -> Vec<Seen> {
    let seen = source.map(|image| {
        let caption = image.caption().map(str::to_owned);
        let decoded = image.decode(&LIMITS);
        (
            image.file.to_owned(),
            caption.map_err(|problem| problem.reason),
            decoded
                .map(|decoded| decoded.picture.pixels[0])
                .map_err(|problem| problem.reason),
        )
    });
    seen.expect("no table is damaged")
}

const METADATA: &[u8] = b"{\"file_name\": \"b.png\", \"text\": \"bee\"}\n\
    {\"file_name\": \"a.png\", \"text\": \"ay\"}\n\
    {\"file_name\": \"b.png\", \"text\": \"insect\"}\n\
    {\"file_name\": \"absent.png\", \"text\": \"x\"}\n";

#[test]
fn lines_of_metadata_come_as_written_and_may_name_a_picture_twice() {
    let dir = folder(&[
        ("a.png", &png(1)),
        ("b.png", &png(2)),
        ("c.png", b""),
        ("metadata.jsonl", METADATA),
    ]);
    let source = Source::open(&recipe(dir.path())).expect("sound");
    assert_eq!(source.num_images(), 5);
    let row = |file: &str, caption: Result<&str, &'static str>, shade| {
        (file.to_owned(), caption.map(str::to_owned), shade)
    };
    assert_eq!(
        seen(&source),
        [
            row("b.png", Ok("bee"), Ok(2)),
            row("a.png", Ok("ay"), Ok(1)),
            row("b.png", Ok("insect"), Ok(2)),
            row("absent.png", Err("missing-image"), Err("unreadable")),
            row("c.png", Err("missing-caption"), Err("zero-bytes")),
        ]
    );
}

#[test]
fn without_captions_every_picture_comes_once_by_name() {
    let dir = folder(&[
        ("b.png", &png(2)),
        ("a.png", &png(1)),
        ("metadata.jsonl", METADATA),
    ]);
    let source = Source::open_pictures(&recipe(dir.path())).expect("sound");
    let pictures: Vec<_> = seen(&source)
        .into_iter()
        .map(|(file, _, shade)| (file, shade))
        .collect();
    assert_eq!(
        pictures,
        [("a.png".to_owned(), Ok(1)), ("b.png".to_owned(), Ok(2))]
    );
    let dir = folder(&[("metadata.jsonl", METADATA)]);
    assert!(matches!(
        Source::open_pictures(&recipe(dir.path())),
        Err(SourceError::NoImages { .. })
    ));
}

#[test]
fn messages_and_advice_use_the_readers_keys() {
    let told = |path: &Path| {
        let error = Source::open(&recipe(path)).map(|_| ()).expect_err("bad");
        format!("{error}\n{}", error.help().unwrap_or_default())
    };
    let dir = folder(&[("notes.md", b"x")]);
    for (path, said, advised) in [
        (
            dir.path().join("nowhere"),
            "corpus.mine is ",
            "correct corpus.mine",
        ),
        (
            dir.path().join("notes.md"),
            "corpus.mine is the file",
            "set corpus.mine",
        ),
        (dir.path().to_owned(), "corpus.mine ", "images are .png"),
    ] {
        let told = told(&path);
        assert!(told.starts_with(said) && told.contains(advised), "{told}");
        assert!(!told.contains("ingest"), "{told}");
    }
    let dir = folder(&[
        ("a.png", &png(1)),
        ("metadata.csv", b"file_name,words\na.png,x\n"),
    ]);
    let told = told(dir.path());
    assert!(
        told.contains("no column \"text\"") && told.contains("set corpus.words"),
        "{told}"
    );
}

#[test]
fn a_caption_file_may_have_its_ending_in_capitals() {
    let dir = folder(&[
        ("a.png", &png(1)),
        ("a.TXT", b"ay"),
        ("b.png", &png(2)),
        ("b.TXT", b"another"),
        ("b.txt", b"bee"),
    ]);
    let source = Source::open(&recipe(dir.path())).expect("sound");
    let captions: Vec<_> = seen(&source).into_iter().map(|(_, it, _)| it).collect();
    assert_eq!(captions, [Ok("ay".to_owned()), Ok("bee".to_owned())]);
    let notes = source.notes();
    assert!(
        notes[0].contains("1 .txt files") && notes[0].contains("b.TXT"),
        "{notes:?}"
    );
}

#[test]
fn a_name_that_looks_like_a_file_there_is_told_how_it_differs() {
    let dir = folder(&[("Knight.png", &png(1)), ("e\u{301}.png", &png(2))]);
    fs_err::create_dir(dir.path().join("sub")).expect("created");
    fs_err::write(dir.path().join("sub/orc.png"), png(3)).expect("written");
    let names = [
        "knight.png",
        "\u{e9}.png",
        "sub\\\\orc.png",
        " Knight.png",
        "elf.png",
    ];
    let lines = names.map(|name| format!("{{\"file_name\": \"{name}\", \"text\": \"x\"}}\n"));
    fs_err::write(dir.path().join("metadata.jsonl"), lines.concat()).expect("written");
    let source = Source::open(&recipe(dir.path())).expect("sound");
    let details = source.map(|image| image.caption().map_err(|problem| problem.detail).err());
    let details: Vec<String> = details.expect("no table").into_iter().flatten().collect();
    let differences = [
        "no such file (there is Knight.png: letter case counts)",
        "no such file (there is e\u{301}.png: its accented letters are other Unicode characters, as macOS writes them)",
        "no such file (there is sub/orc.png: folders are separated by /)",
        "no such file (there is Knight.png: spaces count)",
        "no such file",
    ];
    for (detail, difference) in details.iter().zip(differences) {
        assert!(detail.ends_with(difference), "{detail}");
    }
    assert_eq!(details.len(), 8); // and three pictures that no line names
}
