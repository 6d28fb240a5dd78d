//! Files of every format and every defect, written by hand.

use artifacts::{TensorToWrite, write_safetensors};

use super::*;

const WIDTH: usize = 2;

fn targets() -> Vec<Target> {
    let attention = ["to_q", "to_k", "to_v"];
    let double = attention
        .map(|name| Target::new(format!("transformer_blocks.0.attn.{name}"), WIDTH, WIDTH));
    let single = attention.map(|name| {
        Target::new(
            format!("single_transformer_blocks.0.attn.{name}"),
            WIDTH,
            WIDTH,
        )
    });
    let others = [
        Target::new("single_transformer_blocks.0.proj_mlp", WIDTH, 4),
        Target::new("norm_out.linear", WIDTH, 4),
    ];
    double.into_iter().chain(single).chain(others).collect()
}

/// Writes tensors given as (key, shape, values), reads the file and returns the outcome.
fn read(
    tensors: &[(&str, &[usize], &[f32])],
    metadata: &[(&str, &str)],
) -> Result<LoraFile, LoraError> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("x.safetensors");
    let tensors: Vec<TensorToWrite<'_>> = tensors
        .iter()
        .map(|(key, shape, values)| TensorToWrite::f32(key, shape, values))
        .collect();
    let metadata = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    write_safetensors(&path, &tensors, &metadata).expect("a writable directory");
    LoraFile::read(&path, &targets())
}

const Q_A: (&str, &[usize], &[f32]) = (
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    &[1, 2],
    &[1.0, 2.0],
);
const Q_B: (&str, &[usize], &[f32]) = (
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
    &[2, 1],
    &[3.0, 4.0],
);
const Q: &str = "transformer_blocks.0.attn.to_q";

#[test]
fn without_any_alpha_it_is_the_rank_and_that_is_told() {
    let file = read(&[Q_A, Q_B], &[("format", "pt"), ("author", "me")]).expect("a LoRA");
    assert_eq!(file.alpha_source, AlphaSource::AssumedRank);
    assert_eq!(
        file.modules[Q],
        LoraModule::new(1.0, 2, 2, vec![1.0, 2.0], vec![3.0, 4.0])
    );
    assert_eq!(
        file.metadata,
        BTreeMap::from([("author".to_owned(), "me".to_owned())])
    );
}

#[test]
fn alpha_comes_from_the_header_or_from_a_tensor_but_not_from_both() {
    let header = (
        "lora_adapter_metadata",
        r#"{"transformer.r": 1, "transformer.lora_alpha": 8}"#,
    );
    let alpha = (
        "transformer.transformer_blocks.0.attn.to_q.alpha",
        &[][..],
        &[0.5][..],
    );
    let from_header = read(&[Q_A, Q_B], &[header]).expect("a LoRA");
    assert_eq!(
        (from_header.modules[Q].alpha, from_header.alpha_source),
        (8.0, AlphaSource::Metadata)
    );
    let from_tensor = read(&[Q_A, Q_B, alpha], &[]).expect("a LoRA");
    assert_eq!(
        (from_tensor.modules[Q].alpha, from_tensor.alpha_source),
        (0.5, AlphaSource::Tensors)
    );
    let error = read(&[Q_A, Q_B, alpha], &[header]).expect_err("two alphas");
    assert!(
        matches!(
            error,
            LoraError::AlphaConflict {
                metadata: 8.0,
                tensor: 0.5,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn one_module_without_an_alpha_is_told_wherever_it_stands() {
    const K_A: &str = "transformer.transformer_blocks.0.attn.to_k.lora_A.weight";
    const K_B: &str = "transformer.transformer_blocks.0.attn.to_k.lora_B.weight";
    let k = [(K_A, Q_A.1, Q_A.2), (K_B, Q_B.1, Q_B.2)];
    for with_alpha in ["to_k", "to_q"] {
        let key = format!("transformer.transformer_blocks.0.attn.{with_alpha}.alpha");
        let alpha = (key.as_str(), &[][..], &[0.5][..]);
        let file = read(&[k[0], k[1], Q_A, Q_B, alpha], &[]).expect("a LoRA");
        assert_eq!(file.alpha_source, AlphaSource::AssumedRank, "{with_alpha}");
    }
}

#[test]
fn a_header_with_another_rank_is_refused() {
    let header = (
        "lora_adapter_metadata",
        r#"{"transformer.r": 4, "transformer.lora_alpha": 8}"#,
    );
    let error = read(&[Q_A, Q_B], &[header]).expect_err("rank 1, not 4");
    assert!(
        matches!(
            error,
            LoraError::MetadataRank {
                expected: 4,
                found: 1,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_fused_layer_with_zero_mlp_rows_becomes_three_modules() {
    let mut up = vec![0.0; 10 * 3];
    for row in 0..6 {
        up[row * 3 + row / 2] = (row + 1) as f32;
    }
    let file = read(
        &[
            (
                "lora_unet_single_blocks_0_linear1.lora_down.weight",
                &[3, 2],
                &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            ),
            (
                "lora_unet_single_blocks_0_linear1.lora_up.weight",
                &[10, 3],
                &up,
            ),
            ("lora_unet_single_blocks_0_linear1.alpha", &[], &[6.0]),
        ],
        &[],
    )
    .expect("a LoRA");
    assert_eq!(file.modules.len(), 3);
    let expected = LoraModule::new(2.0, 2, 2, vec![3.0, 4.0], vec![3.0, 4.0]);
    assert_eq!(
        file.modules["single_transformer_blocks.0.attn.to_k"],
        expected
    );
}

#[test]
fn a_fused_layer_with_mlp_rows_becomes_four_modules() {
    let up: Vec<f32> = (1..=10).map(|row| row as f32).collect();
    let file = read(
        &[
            (
                "diffusion_model.single_blocks.0.linear1.lora_A.weight",
                &[1, 2],
                &[1.0, 2.0],
            ),
            (
                "diffusion_model.single_blocks.0.linear1.lora_B.weight",
                &[10, 1],
                &up,
            ),
        ],
        &[],
    )
    .expect("a LoRA");
    let mlp = &file.modules["single_transformer_blocks.0.proj_mlp"];
    assert_eq!(
        (file.modules.len(), &mlp.b[..]),
        (4, &[7.0, 8.0, 9.0, 10.0][..])
    );
}

#[test]
fn the_final_modulation_has_its_halves_exchanged() {
    let file = read(
        &[
            (
                "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight",
                &[1, 2],
                &[1.0, 2.0],
            ),
            (
                "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight",
                &[4, 1],
                &[1.0, 2.0, 3.0, 4.0],
            ),
        ],
        &[],
    )
    .expect("a LoRA");
    assert_eq!(file.modules["norm_out.linear"].b, [3.0, 4.0, 1.0, 2.0]);
}

#[test]
fn unknown_keys_are_listed_with_their_neighbours() {
    let error = read(
        &[
            Q_A,
            Q_B,
            (
                "transformer.transformer_blocks.7.attn.to_q.lora_A.weight",
                &[1, 2],
                &[0.0; 2],
            ),
            ("junk", &[1], &[0.0]),
        ],
        &[],
    )
    .expect_err("two unknown keys");
    let text = error.to_string();
    assert!(text.starts_with("2 keys of "), "{text}");
    assert!(
        text.contains(
            "transformer_blocks.7.attn.to_q.lora_A.weight (nearest: transformer_blocks.0.attn.to_q,"
        ),
        "{text}"
    );
    assert!(text.contains("\n  junk\n"), "{text}");
}

#[test]
fn every_defect_has_its_own_error() {
    assert!(matches!(
        read(&[Q_A], &[]).expect_err("half"),
        LoraError::MissingHalf { missing, .. } if missing == Q_B.0
    ));
    assert!(matches!(
        read(&[Q_A, (Q_B.0, &[2, 2], &[0.0; 4])], &[]).expect_err("ranks"),
        LoraError::Rank {
            rank_a: 1,
            rank_b: 2,
            ..
        }
    ));
    assert!(matches!(
        read(&[(Q_A.0, &[1, 3], &[0.0; 3]), Q_B], &[]).expect_err("width"),
        LoraError::Shape { expected, found, .. } if expected == "[rank, 2]" && found == [1, 3]
    ));
    assert!(matches!(
        read(&[Q_A, (Q_B.0, &[2], &[0.0; 2])], &[]).expect_err("axes"),
        LoraError::Shape { expected, found, .. } if expected == "[2, rank]" && found == [2]
    ));
    assert!(matches!(
        read(&[Q_A, (Q_B.0, &[2, 1], &[0.0, f32::NAN])], &[]).expect_err("NaN"),
        LoraError::NotFinite { key, .. } if key == Q_B.0
    ));
    assert!(matches!(
        read(&[], &[]).expect_err("empty"),
        LoraError::Empty { .. }
    ));
    let other = "transformer_blocks.0.attn.to_q.lora_A.weight";
    let other_b = "transformer_blocks.0.attn.to_q.lora_B.weight";
    assert!(matches!(
        read(&[Q_A, Q_B, (other, Q_A.1, Q_A.2), (other_b, Q_B.1, Q_B.2)], &[]).expect_err("twice"),
        LoraError::Duplicate { module, .. } if module == Q
    ));
    assert!(matches!(
        read(
            &[
                Q_A,
                Q_B,
                ("lora_te1_text_model_x.lora_down.weight", &[1, 1], &[0.0])
            ],
            &[]
        )
        .expect_err("text encoder"),
        LoraError::Unsupported {
            kind: "LoRA on a text encoder",
            ..
        }
    ));
    assert!(matches!(
        read(
            &[
                Q_A,
                Q_B,
                ("transformer.x.lora_magnitude_vector", &[1], &[0.0])
            ],
            &[]
        )
        .expect_err("DoRA"),
        LoraError::Unsupported { kind: "DoRA", .. }
    ));
}
