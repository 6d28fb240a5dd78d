//! Sound files are read as written; every kind of damage is told apart.

use super::*;

/// A file with this header and so many zero bytes of data.
fn file_with(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn problem_of(bytes: &[u8]) -> HeaderProblem {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("x.safetensors");
    std::fs::write(&path, bytes).expect("written");
    match SafetensorsFile::open(&path) {
        Err(ArtifactError::SafetensorsHeader { source, .. }) => source,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("the file was believed"),
    }
}

fn written(
    tensors: &[TensorToWrite<'_>],
    metadata: &[(&str, &str)],
) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("x.safetensors");
    let metadata = metadata
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    write_safetensors(&path, tensors, &metadata).expect("written");
    (dir, path)
}

#[test]
fn what_is_written_is_read() {
    let values = [1.0f32, -2.5, 3.25, 0.0, -0.0, 7.0];
    let (_dir, path) = written(
        &[
            TensorToWrite {
                name: "flags",
                dtype: Dtype::U8,
                shape: &[3],
                bytes: &[1, 2, 3],
            },
            TensorToWrite::f32("a.weight", &[2, 3], &values),
            TensorToWrite {
                name: "empty",
                dtype: Dtype::F32,
                shape: &[0, 4],
                bytes: &[],
            },
            TensorToWrite {
                name: "one",
                dtype: Dtype::I32,
                shape: &[],
                bytes: &7i32.to_le_bytes(),
            },
        ],
        &[("alpha", "4"), ("note", "\"quoted\" ü")],
    );
    let file = SafetensorsFile::open(&path).expect("sound");
    assert_eq!(
        file.names().collect::<Vec<_>>(),
        ["a.weight", "empty", "flags", "one"]
    );
    assert_eq!(file.f32("a.weight").expect("f32"), values);
    assert_eq!(file.info("a.weight").expect("there").shape, [2, 3]);
    assert_eq!(file.u8("flags").expect("u8"), [1, 2, 3]);
    assert_eq!(file.i32("one").expect("i32"), [7]);
    assert!(file.f32("empty").expect("f32").is_empty());
    assert_eq!(file.metadata()["note"], "\"quoted\" ü");
}

#[test]
fn the_reference_implementation_reads_what_we_write() {
    let (_dir, path) = written(
        &[
            TensorToWrite {
                name: "bytes",
                dtype: Dtype::U8,
                shape: &[3],
                bytes: &[1, 2, 3],
            },
            TensorToWrite::f32("weight", &[2], &[1.5, -1.5]),
        ],
        &[("k", "v")],
    );
    let bytes = std::fs::read(&path).expect("readable");
    let theirs = safetensors::SafeTensors::deserialize(&bytes).expect("sound to them too");
    assert_eq!(theirs.tensor("bytes").expect("there").data(), [1, 2, 3]);
    assert_eq!(theirs.tensor("weight").expect("there").shape(), [2]);
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("sound");
    assert_eq!(metadata.metadata().as_ref().expect("metadata")["k"], "v");
}

#[test]
fn the_order_given_leaves_no_trace_in_the_bytes() {
    let a = TensorToWrite::f32("a", &[1], &[1.0]);
    let b = TensorToWrite {
        name: "b",
        dtype: Dtype::U8,
        shape: &[1],
        bytes: &[1],
    };
    let c = TensorToWrite::f32("c", &[1], &[2.0]);
    let (_dir1, first) = written(&[a, b, c], &[("x", "1"), ("y", "2")]);
    let (_dir2, second) = written(&[c, b, a], &[("y", "2"), ("x", "1")]);
    let read = |path: &Path| std::fs::read(path).expect("readable");
    assert_eq!(read(&first), read(&second));
}

#[test]
fn every_tensor_is_aligned_to_its_numbers() {
    let (_dir, path) = written(
        &[
            TensorToWrite {
                name: "a",
                dtype: Dtype::U8,
                shape: &[3],
                bytes: &[0; 3],
            },
            TensorToWrite {
                name: "b",
                dtype: Dtype::F16,
                shape: &[1],
                bytes: &[0; 2],
            },
            TensorToWrite::f32("c", &[1], &[2.0]),
        ],
        &[],
    );
    let file = SafetensorsFile::open(&path).expect("sound");
    assert_eq!(file.header.data_start % 8, 0);
    assert_eq!(file.header.tensors["c"].start % 4, 0);
    assert_eq!(file.header.tensors["b"].start % 2, 0);
}

#[test]
fn half_and_double_floats_become_single_ones() {
    let numbers = [1.0f32, -0.5, 65504.0];
    let halves: Vec<u8> = numbers
        .iter()
        .flat_map(|&n| f16::from_f32(n).to_le_bytes())
        .collect();
    let brains: Vec<u8> = [1.0f32, -0.5, 3.0]
        .iter()
        .flat_map(|&n| bf16::from_f32(n).to_le_bytes())
        .collect();
    let doubles: Vec<u8> = numbers
        .iter()
        .flat_map(|&n| f64::from(n).to_le_bytes())
        .collect();
    let (_dir, path) = written(
        &[
            TensorToWrite {
                name: "f16",
                dtype: Dtype::F16,
                shape: &[3],
                bytes: &halves,
            },
            TensorToWrite {
                name: "bf16",
                dtype: Dtype::BF16,
                shape: &[3],
                bytes: &brains,
            },
            TensorToWrite {
                name: "f64",
                dtype: Dtype::F64,
                shape: &[3],
                bytes: &doubles,
            },
        ],
        &[],
    );
    let file = SafetensorsFile::open(&path).expect("sound");
    assert_eq!(file.f32("f16").expect("f16"), numbers);
    assert_eq!(file.f32("bf16").expect("bf16"), [1.0, -0.5, 3.0]);
    assert_eq!(file.f32("f64").expect("f64"), numbers);
}

#[test]
fn unaligned_numbers_are_read_too() {
    let header = r#"{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"h":{"dtype":"F16","shape":[1],"data_offsets":[1,3]},"f":{"dtype":"F32","shape":[1],"data_offsets":[3,7]}}"#;
    let mut bytes = file_with(header, 0);
    bytes.push(9);
    bytes.extend(f16::from_f32(1.5).to_le_bytes());
    bytes.extend(2.5f32.to_le_bytes());
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("x.safetensors");
    std::fs::write(&path, bytes).expect("written");
    let file = SafetensorsFile::open(&path).expect("sound");
    assert_eq!(file.f32("h").expect("f16"), [1.5]);
    assert_eq!(file.f32("f").expect("f32"), [2.5]);
}

#[test]
fn long_integers_are_read_if_they_fit() {
    let fits: Vec<u8> = [1i64, -1, i64::from(i32::MAX)]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    let exceeds = (1i64 << 31).to_le_bytes();
    let (_dir, path) = written(
        &[
            TensorToWrite {
                name: "fits",
                dtype: Dtype::I64,
                shape: &[3],
                bytes: &fits,
            },
            TensorToWrite {
                name: "exceeds",
                dtype: Dtype::I64,
                shape: &[1],
                bytes: &exceeds,
            },
        ],
        &[],
    );
    let file = SafetensorsFile::open(&path).expect("sound");
    assert_eq!(file.i32("fits").expect("they fit"), [1, -1, i32::MAX]);
    assert!(matches!(
        file.i32("exceeds"),
        Err(ArtifactError::ElementRange { index: 0, .. })
    ));
}

#[test]
fn a_missing_tensor_is_named_with_the_nearest() {
    let (_dir, path) = written(
        &[TensorToWrite::f32("block.0.attn.to_q.weight", &[1], &[1.0])],
        &[],
    );
    let file = SafetensorsFile::open(&path).expect("sound");
    let text = file
        .f32("block.0.attn.to_k.weight")
        .expect_err("it is not there")
        .to_string();
    assert!(
        text.contains("to_k") && text.contains("nearest: block.0.attn.to_q.weight"),
        "{text}"
    );
}

#[test]
fn a_tensor_of_another_dtype_is_refused_with_both() {
    let (_dir, path) = written(
        &[TensorToWrite {
            name: "x",
            dtype: Dtype::U8,
            shape: &[1],
            bytes: &[1],
        }],
        &[],
    );
    let file = SafetensorsFile::open(&path).expect("sound");
    let text = file.f32("x").expect_err("not floating-point").to_string();
    assert!(text.contains("U8") && text.contains("F32"), "{text}");
}

#[test]
fn an_empty_or_cut_file_is_too_short() {
    assert!(matches!(
        problem_of(b""),
        HeaderProblem::TooShort { file_bytes: 0 }
    ));
    assert!(matches!(
        problem_of(&[0; 7]),
        HeaderProblem::TooShort { file_bytes: 7 }
    ));
}

#[test]
fn a_header_longer_than_the_file_is_not_allocated() {
    for claimed in [1, 1 << 40, u64::MAX - 7, u64::MAX] {
        let problem = problem_of(&claimed.to_le_bytes());
        assert!(
            matches!(problem, HeaderProblem::HeaderTooLong { header_bytes, .. } if header_bytes == claimed)
        );
    }
}

#[test]
fn a_header_that_is_not_json_is_refused() {
    for header in [
        "",
        "{",
        "[]",
        r#"{"a":1}"#,
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}"#,
        "\u{7f}\u{1}",
    ] {
        assert!(
            matches!(problem_of(&file_with(header, 0)), HeaderProblem::Json(_)),
            "{header}"
        );
    }
}

#[test]
fn each_contradiction_of_header_and_data_has_its_name() {
    let entry = |name: &str, dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let of = |entries: &[String], data_bytes| {
        problem_of(&file_with(
            &format!("{{{}}}", entries.join(",")),
            data_bytes,
        ))
    };

    let problem = of(&[entry("a", "F7", "[1]", 0, 4)], 4);
    assert!(matches!(problem, HeaderProblem::Dtype { .. }), "{problem}");
    let problem = of(&[entry("a", "F32", "[4294967296,4294967296]", 0, 4)], 4);
    assert!(
        matches!(problem, HeaderProblem::ShapeOverflow { .. }),
        "{problem}"
    );
    let problem = of(&[entry("a", "F32", "[0,18446744073709551615,3]", 0, 0)], 0);
    assert!(
        matches!(problem, HeaderProblem::ShapeOverflow { .. }),
        "{problem}"
    );
    let problem = of(&[entry("a", "F32", "[1]", 4, 0)], 4);
    assert!(
        matches!(problem, HeaderProblem::OutOfRange { .. }),
        "{problem}"
    );
    let problem = of(&[entry("a", "F32", "[2]", 0, 8)], 4);
    assert!(
        matches!(problem, HeaderProblem::OutOfRange { .. }),
        "{problem}"
    );
    let problem = of(&[entry("a", "F32", "[1]", u64::MAX - 3, u64::MAX)], 4);
    assert!(
        matches!(problem, HeaderProblem::OutOfRange { .. }),
        "{problem}"
    );
    let problem = of(&[entry("a", "F32", "[2]", 0, 4)], 4);
    assert!(
        matches!(
            problem,
            HeaderProblem::Size {
                expected: 8,
                found: 4,
                ..
            }
        ),
        "{problem}"
    );
    let problem = of(
        &[
            entry("a", "F32", "[1]", 0, 4),
            entry("b", "F32", "[1]", 2, 6),
        ],
        6,
    );
    assert!(
        matches!(problem, HeaderProblem::Overlap { .. }),
        "{problem}"
    );
    let problem = of(
        &[
            entry("a", "F32", "[1]", 0, 4),
            entry("b", "F32", "[1]", 8, 12),
        ],
        12,
    );
    assert!(
        matches!(problem, HeaderProblem::Gap { start: 4, end: 8 }),
        "{problem}"
    );
    let problem = of(&[entry("a", "F32", "[1]", 0, 4)], 9);
    assert!(
        matches!(problem, HeaderProblem::Gap { start: 4, end: 9 }),
        "{problem}"
    );
    let problem = of(
        &[
            entry("a", "F32", "[1]", 0, 4),
            entry("a", "F32", "[1]", 0, 4),
        ],
        4,
    );
    assert!(
        matches!(problem, HeaderProblem::Duplicate { .. }),
        "{problem}"
    );
}

#[test]
fn a_file_cut_or_changed_anywhere_never_panics() {
    let (dir, path) = written(
        &[
            TensorToWrite::f32("a", &[2], &[1.0, 2.0]),
            TensorToWrite {
                name: "b",
                dtype: Dtype::U8,
                shape: &[2],
                bytes: &[1, 2],
            },
        ],
        &[("k", "v")],
    );
    let sound = std::fs::read(&path).expect("readable");
    let damaged = dir.path().join("damaged.safetensors");
    for cut in 0..sound.len() {
        std::fs::write(&damaged, &sound[..cut]).expect("written");
        assert!(SafetensorsFile::open(&damaged).is_err(), "cut to {cut}");
    }
    for place in 0..sound.len() {
        for value in [0, b'9', 0xff, sound[place] ^ 1] {
            let mut bytes = sound.clone();
            bytes[place] = value;
            std::fs::write(&damaged, &bytes).expect("written");
            if let Ok(file) = SafetensorsFile::open(&damaged) {
                for name in file.names() {
                    file.bytes(name).expect("a checked tensor");
                }
            }
        }
    }
}

#[test]
fn tensors_that_make_no_file_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("x.safetensors");
    let a = TensorToWrite::f32("a", &[1], &[1.0]);
    let short = TensorToWrite::f32("b", &[2], &[1.0]);
    let reserved = TensorToWrite::f32("__metadata__", &[1], &[1.0]);
    let endless = TensorToWrite {
        name: "c",
        dtype: Dtype::F32,
        shape: &[usize::MAX, 2],
        bytes: &[],
    };
    for tensors in [&[a, a][..], &[short], &[reserved], &[endless]] {
        let result = write_safetensors(&path, tensors, &BTreeMap::new());
        assert!(matches!(
            result,
            Err(ArtifactError::UnwritableTensor { .. })
        ));
    }
    assert!(!path.exists());
}
