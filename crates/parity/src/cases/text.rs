//! `tokenize`, `clip_text`, `t5_encode_*`: crate `text-encoders`, from the prompt on.

use serde::Deserialize;
use tensor::Precision;
use tensor::device::cpu;
use text_encoders::{ClipTextModel, ClipTokenizer, T5Encoder, T5Tokenizer};

use crate::checker::{CaseError, CaseRun};
use crate::compare::Values;

/// Sentinels `<extra_id_0>` and on that T5's published tokenizer adds to its SentencePiece model.
const NUM_T5_EXTRA_IDS: usize = 100;

#[derive(Deserialize)]
struct TokenizeParams {
    prompts: Vec<String>,
    /// Where plain SentencePiece agrees with the reference: all but literal special tokens.
    t5_equals_spiece_model: Vec<bool>,
}

/// Both tokenizers on every prompt, T5's from both of its file formats.
pub fn tokenize(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: TokenizeParams = run.params()?;
    let (clip_dir, t5_dir) = (
        run.set.tokenizers().join("tokenizer"),
        run.set.tokenizers().join("tokenizer_2"),
    );
    let clip = ClipTokenizer::open(&clip_dir)?;
    let mut rows = Vec::new();
    for prompt in &params.prompts {
        rows.push(clip.encode(prompt)?.ids);
    }
    let (ids, shape) = table(&rows);
    run.output("clip_ids", ids, &shape);

    let t5 = T5Tokenizer::open(&t5_dir)?;
    let pieces_path = t5_dir.join("spiece.model");
    let from_pieces = pieces_path
        .is_file()
        .then(|| T5Tokenizer::from_sentencepiece(&pieces_path, NUM_T5_EXTRA_IDS))
        .transpose()?;
    for output in run.names("out.t5_ids_") {
        let output = &output["out.".len()..];
        let Ok(max_length) = output["t5_ids_".len()..].parse() else {
            continue; // not compared, so it ends as a failure
        };
        let mut rows = Vec::new();
        for prompt in &params.prompts {
            rows.push(t5.encode(prompt, max_length)?.ids);
        }
        let (ids, shape) = table(&rows);
        run.output(output, ids, &shape);

        let Some(from_pieces) = &from_pieces else {
            continue;
        };
        let mut expected = Vec::new();
        let mut found = Vec::new();
        for (index, prompt) in params.prompts.iter().enumerate() {
            if params.t5_equals_spiece_model.get(index) == Some(&true) {
                expected.push(rows[index].clone());
                found.push(from_pieces.encode(prompt, max_length)?.ids);
            }
        }
        let ((expected, shape), (found, found_shape)) = (table(&expected), table(&found));
        let name = format!("{output} (spiece.model)");
        run.against(&name, (&expected, &shape), (&found, &found_shape));
    }
    Ok(())
}

#[derive(Deserialize)]
struct EncodeParams {
    prompts: Vec<String>,
    #[serde(default)]
    max_sequence_length: Option<usize>,
}

/// CLIP: ids of the prompts, pooled vectors of all, states of the first ones.
pub fn clip(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: EncodeParams = run.params()?;
    let tokenizer = ClipTokenizer::open(&run.set.tokenizers().join("tokenizer"))?;
    let mut rows = Vec::new();
    for prompt in &params.prompts {
        rows.push(tokenizer.encode(prompt)?.ids);
    }
    given_ids(run, &rows)?;
    let model = ClipTextModel::open(
        &run.set.model().join("text_encoder"),
        &cpu(),
        Precision::F32,
    )?;
    let output = model.encode(&rows);
    run.output_tensor("pooled", &output.pooled);
    let (_, shape) = run.values("out.last_hidden_state")?;
    let [num_kept, _, _] = run.axes("out.last_hidden_state", shape)?;
    let states = output.last_hidden_state;
    let num_kept = num_kept.min(states.dims()[0]);
    let kept = states.narrow(0, 0, num_kept);
    run.output_tensor("last_hidden_state", &kept);
    Ok(())
}

/// T5: ids of the prompts, all states, padding attended.
pub fn t5(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: EncodeParams = run.params()?;
    let (_, shape) = run.i32("in.ids")?;
    let [_, n] = run.axes("in.ids", shape)?;
    let max_length = params.max_sequence_length.unwrap_or(n);
    let tokenizer = T5Tokenizer::open(&run.set.tokenizers().join("tokenizer_2"))?;
    let mut rows = Vec::new();
    for prompt in &params.prompts {
        rows.push(tokenizer.encode(prompt, max_length)?.ids);
    }
    given_ids(run, &rows)?;
    let model = T5Encoder::open(
        &run.set.model().join("text_encoder_2"),
        &cpu(),
        Precision::F32,
    )?;
    run.output_tensor("states", &model.encode(&rows));
    Ok(())
}

/// Compares tokenised prompts with the ids that the reference was run on.
fn given_ids(run: &mut CaseRun, rows: &[Vec<u32>]) -> Result<(), CaseError> {
    let (expected, expected_shape) = run.values("in.ids")?;
    let (found, shape) = table(rows);
    run.against("ids", (&expected, &expected_shape), (&found, &shape));
    Ok(())
}

/// Rows of ids as one tensor; rows of unequal length make a shape that fits no reference.
fn table(rows: &[Vec<u32>]) -> (Values, [usize; 2]) {
    let ids: Vec<i32> = rows.iter().flatten().map(|&id| id.cast_signed()).collect();
    (
        Values::I32(ids),
        [rows.len(), rows.first().map_or(0, Vec::len)],
    )
}
