//! Captions through CLIP, then T5, into the table; those that an earlier run encoded are copied.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use artifacts::{TextEmbeddingHeader, TextEmbeddingRow};
use pipeline::recipe::PrecisionChoice;
use pipeline::{StageContext, StageReport, WeightPart};
use tensor::{Device, Precision};
use text_encoders::{ClipTextModel, T5Encoder};

use crate::captions::{Captions, Texts};
use crate::error::EmbedTextError;
use crate::reuse::Earlier;
use crate::table::{Table, to_half};

/// Ids that T5 takes at once unless the run options say how many texts: 4,096 keep an H100 busy and fit a laptop.
const IDS_PER_BATCH: usize = 4096;

/// Fills the table; the report gets the counts.
pub(crate) fn encode(
    context: &StageContext,
    captions: &Captions,
    texts: &Texts,
    header: &TextEmbeddingHeader,
    path: &Path,
    report: StageReport,
) -> Result<(Table, StageReport), EmbedTextError> {
    let earlier = Earlier::open(context, header);
    // After the earlier tables: one of them may be the file that this one replaces.
    let mut table = Table::create(path, header)?;
    let new: Vec<&str> = captions
        .by_hash
        .keys()
        .map(String::as_str)
        .filter(|hash| earlier.find(hash).is_none())
        .collect();
    let mut encoded = Encoded::new(context, texts, header, new.clone())?;
    for (hash, caption) in &captions.by_hash {
        let row = match earlier.find(hash) {
            Some(table) => table
                .row(hash)?
                .expect("the table was chosen because it has this caption"),
            None => {
                let (t5, pooled) = encoded.next();
                TextEmbeddingRow {
                    caption: caption.clone(),
                    num_t5_tokens: texts.tokens[hash].num_t5_tokens,
                    embedding: to_half(caption, &t5, &pooled)?,
                }
            }
        };
        table.push(hash, row)?;
    }
    let num_new = new.len() as u64;
    let report = report
        .count("encoded", num_new)
        .count("reused", captions.by_hash.len() as u64 - num_new);
    Ok((table, report))
}

/// Embeddings of new captions in their order, computed in batches as they are asked for.
struct Encoded<'a> {
    texts: &'a Texts,
    /// Captions that T5 has not seen yet.
    waiting: VecDeque<&'a str>,
    pooled: BTreeMap<&'a str, Vec<f32>>,
    /// Encoded and not yet given away.
    ready: VecDeque<(Vec<f32>, Vec<f32>)>,
    t5: Option<T5Encoder>,
    batch: usize,
    values_per_text: usize,
    job: console::Job,
}

impl<'a> Encoded<'a> {
    /// Runs CLIP over all new captions, frees it and loads T5; loads nothing if there are none.
    fn new(
        context: &StageContext,
        texts: &'a Texts,
        header: &TextEmbeddingHeader,
        new: Vec<&'a str>,
    ) -> Result<Self, EmbedTextError> {
        let batch = context
            .options
            .batch
            .unwrap_or(IDS_PER_BATCH / header.t5_tokens)
            .max(1);
        let (mut pooled, mut t5) = (BTreeMap::new(), None);
        if !new.is_empty() {
            let device = tensor::device::select(&context.options.device)?;
            let precision = precision_of(context.recipe.embed_text.precision);
            pooled = pool(context, texts, &new, batch, &device, precision)?;
            t5 = Some(T5Encoder::open(
                &context.weights_dir(WeightPart::T5),
                &device,
                precision,
            )?);
        }
        let count = new.len() as u64;
        Ok(Self {
            texts,
            waiting: new.into(),
            pooled,
            ready: VecDeque::new(),
            t5,
            batch,
            values_per_text: header.t5_tokens * header.t5_width,
            job: context
                .progress
                .job("encode captions with T5", count, "captions"),
        })
    }

    /// T5 states and pooled vector of the next new caption.
    ///
    /// # Panics
    ///
    /// If all were given away.
    fn next(&mut self) -> (Vec<f32>, Vec<f32>) {
        if self.ready.is_empty() {
            self.encode_batch();
        }
        self.ready
            .pop_front()
            .expect("only as many are asked for as are new")
    }

    fn encode_batch(&mut self) {
        let Some(t5) = &self.t5 else { return };
        let count = self.batch.min(self.waiting.len());
        let hashes: Vec<&str> = self.waiting.drain(..count).collect();
        if hashes.is_empty() {
            return;
        }
        let ids: Vec<Vec<u32>> = hashes
            .iter()
            .map(|&hash| self.texts.tokens[hash].t5.clone())
            .collect();
        let states = tensor::to_f32(&t5.encode(&ids)); // b n d_model
        for (hash, states) in hashes.iter().zip(states.chunks_exact(self.values_per_text)) {
            let pooled = self
                .pooled
                .remove(hash)
                .expect("CLIP has seen every new caption");
            self.ready.push_back((states.to_vec(), pooled));
        }
        self.job.advance(count as u64);
    }
}

/// CLIP's pooled vectors; the model is gone when this returns.
fn pool<'a>(
    context: &StageContext,
    texts: &Texts,
    new: &[&'a str],
    batch: usize,
    device: &Device,
    precision: Precision,
) -> Result<BTreeMap<&'a str, Vec<f32>>, EmbedTextError> {
    let clip = ClipTextModel::open(&context.weights_dir(WeightPart::Clip), device, precision)?;
    let job = context
        .progress
        .job("encode captions with CLIP", new.len() as u64, "captions");
    let width = clip.config().hidden_size;
    let mut pooled = BTreeMap::new();
    for hashes in new.chunks(batch) {
        let ids: Vec<Vec<u32>> = hashes
            .iter()
            .map(|&hash| texts.tokens[hash].clip.clone())
            .collect();
        let vectors = tensor::to_f32(&clip.encode(&ids).pooled); // b width
        for (&hash, vector) in hashes.iter().zip(vectors.chunks_exact(width)) {
            pooled.insert(hash, vector.to_vec());
        }
        job.advance(hashes.len() as u64);
    }
    Ok(pooled)
}

fn precision_of(choice: PrecisionChoice) -> Precision {
    match choice {
        PrecisionChoice::F32 => Precision::F32,
        PrecisionChoice::Bf16 => Precision::Bf16,
        PrecisionChoice::Fp16 => Precision::F16,
    }
}
