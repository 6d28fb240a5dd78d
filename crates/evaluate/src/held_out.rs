//! The held-out set, found to be held out and to suit the transformer before any weights are loaded.

use std::collections::BTreeMap;
use std::path::PathBuf;

use artifacts::{CaptionRow, Latent, LatentCache, SampleRow, TextEmbeddings};
use mmdit::MmditConfig;
use mmdit::patches::PATCH_CELLS;
use pipeline::{Stage, StageContext, WeightPart, files};

use crate::error::EvaluateError;

/// The view of each picture that is measured: the first one.
const VIEW: u32 = 0;

/// A held-out picture with its caption.
#[derive(Clone, Debug)]
pub struct HeldOutPicture {
    /// Its row in `samples.parquet`.
    pub sample: SampleRow,
    /// BLAKE3 of the caption.
    pub caption_hash: String,
    /// The caption.
    pub caption: String,
}

/// All held-out pictures with their latents and embeddings.
pub struct HeldOut {
    /// The pictures in the order of their ids.
    pub pictures: Vec<HeldOutPicture>,
    embeddings: TextEmbeddings,
    embeddings_path: PathBuf,
    latents: LatentCache,
    latents_dir: PathBuf,
}

/// A caption's embedding, on the host.
#[derive(Clone, Debug)]
pub struct Text {
    /// T5's states, `tokens × width`.
    pub prompt_embeds: Vec<f32>,
    /// Tokens and their width.
    pub shape: [usize; 2],
    /// CLIP's pooled vector.
    pub pooled: Vec<f32>,
}

impl HeldOut {
    /// Opens what the pipeline made of the held-out pictures.
    ///
    /// # Errors
    ///
    /// If a picture is also trained on, the embeddings or latents are incomplete or not of the transformer's sizes, or
    /// a file cannot be read.
    pub fn open(context: &StageContext, config: &MmditConfig) -> Result<Self, EvaluateError> {
        let table =
            |stage: &pipeline::Artifact| artifacts::samples::read(&stage.path(files::SAMPLES));
        let ingest = context.held_out_input(Stage::Ingest);
        let samples = table(ingest)?;
        let trained = table(context.input(Stage::Ingest))?;
        check_disjoint(&samples, &trained)?;
        let samples: BTreeMap<String, SampleRow> = samples
            .into_iter()
            .map(|sample| (sample.sample_id.clone(), sample))
            .collect();
        let mut captions = artifacts::captions::read(&ingest.path(files::CAPTIONS))?;
        captions.sort_by(|a, b| a.sample_id.cmp(&b.sample_id));
        let pictures = captions
            .into_iter()
            .filter_map(|row: CaptionRow| {
                Some(HeldOutPicture {
                    sample: samples.get(&row.sample_id)?.clone(),
                    caption_hash: row.caption_hash,
                    caption: row.caption,
                })
            })
            .collect();

        let embeddings_path = context
            .held_out_input(Stage::EmbedText)
            .path(files::EMBEDDINGS);
        let latents_dir = context.held_out_input(Stage::CacheLatents).dir.clone();
        let latents = LatentCache::open(&latents_dir)?;
        latents.check_vae(
            context
                .weights_digest(WeightPart::Vae)
                .parse()
                .expect("the pipeline's digests are BLAKE3 in hexadecimal"),
        )?;
        let held_out = Self {
            pictures,
            embeddings: TextEmbeddings::open(&embeddings_path)?,
            embeddings_path,
            latents,
            latents_dir,
        };
        held_out.check_texts(config)?;
        for picture in &held_out.pictures {
            held_out.check_latent(picture, config)?;
        }
        Ok(held_out)
    }

    /// The latent of a picture.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn latent(&self, picture: &HeldOutPicture) -> Result<Latent, EvaluateError> {
        Ok(self.latents.get(&picture.sample.sample_id, VIEW)?)
    }

    /// The embedding of a picture's caption.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn text(&self, picture: &HeldOutPicture) -> Result<Text, EvaluateError> {
        let header = self.embeddings.header();
        let shape = [header.t5_tokens, header.t5_width];
        let embedding = self
            .embeddings
            .get(&picture.caption_hash)?
            .ok_or_else(|| self.no_embedding(&picture.caption))?;
        Ok(Text {
            prompt_embeds: embedding.t5.iter().map(|v| v.to_f32()).collect(),
            shape,
            pooled: embedding.pooled.iter().map(|v| v.to_f32()).collect(),
        })
    }

    fn no_embedding(&self, caption: &str) -> EvaluateError {
        EvaluateError::Embeddings {
            path: self.embeddings_path.clone(),
            problem: format!("it has none of {caption:?}"),
        }
    }

    fn check_texts(&self, config: &MmditConfig) -> Result<(), EvaluateError> {
        let header = self.embeddings.header();
        for (what, expected, found) in [
            ("text tokens", config.joint_attention_dim, header.t5_width),
            (
                "pooled captions",
                config.pooled_projection_dim,
                header.pooled_width,
            ),
        ] {
            if expected != found {
                return Err(EvaluateError::Embeddings {
                    path: self.embeddings_path.clone(),
                    problem: format!(
                        "its {what} are {found} wide, the transformer takes {expected}"
                    ),
                });
            }
        }
        let missing = self
            .pictures
            .iter()
            .find(|picture| !self.embeddings.contains(&picture.caption_hash));
        missing.map_or(Ok(()), |picture| Err(self.no_embedding(&picture.caption)))
    }

    fn check_latent(
        &self,
        picture: &HeldOutPicture,
        config: &MmditConfig,
    ) -> Result<(), EvaluateError> {
        let wrong = |problem: String| EvaluateError::Latents {
            dir: self.latents_dir.clone(),
            problem,
        };
        let id = &picture.sample.sample_id;
        let Some(row) = self
            .latents
            .rows()
            .iter()
            .find(|row| row.sample_id == *id && row.view == VIEW)
        else {
            let file = location(&picture.sample);
            return Err(wrong(format!("it has none of {file}")));
        };
        let [c, h, w] = [row.channels, row.height, row.width].map(|size| size as usize);
        if c * PATCH_CELLS * PATCH_CELLS != config.in_channels
            || h == 0
            || w == 0
            || h % PATCH_CELLS != 0
            || w % PATCH_CELLS != 0
        {
            return Err(wrong(format!(
                "its latents are {c}×{h}×{w}, the transformer takes tokens of {} channels from 2×2 cells",
                config.in_channels
            )));
        }
        Ok(())
    }
}

/// A sample's file, and row if it is a table.
pub(crate) fn location(sample: &SampleRow) -> String {
    match sample.source_row {
        None => sample.source_file.clone(),
        Some(row) => format!("{}, row {row}", sample.source_file),
    }
}

fn check_disjoint(held_out: &[SampleRow], trained: &[SampleRow]) -> Result<(), EvaluateError> {
    let trained: BTreeMap<&str, &SampleRow> = trained
        .iter()
        .map(|sample| (sample.sample_id.as_str(), sample))
        .collect();
    for sample in held_out {
        if let Some(same) = trained.get(sample.sample_id.as_str()) {
            return Err(EvaluateError::TrainedOn {
                held_out: location(sample),
                training: location(same),
                sample_id: sample.sample_id.clone(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: &str, file: &str, row: Option<u32>) -> SampleRow {
        SampleRow {
            sample_id: id.to_owned(),
            compat_sha256: String::new(),
            compat_sha256_oriented: String::new(),
            width_px: 32,
            height_px: 32,
            has_alpha: true,
            num_colors: 3,
            source_file: file.to_owned(),
            source_row: row,
        }
    }

    #[test]
    fn a_picture_in_both_sets_is_named_by_both_its_files() {
        let trained = [sample("1", "a.png", None), sample("2", "b.png", None)];
        check_disjoint(&[sample("3", "c.png", None)], &trained).expect("no picture in common");
        let leaked = [
            sample("3", "c.png", None),
            sample("2", "t.parquet", Some(7)),
        ];
        let message = check_disjoint(&leaked, &trained)
            .expect_err("one in common")
            .to_string();
        assert!(
            message.contains("t.parquet, row 7") && message.contains("b.png"),
            "{message}"
        );
    }
}
