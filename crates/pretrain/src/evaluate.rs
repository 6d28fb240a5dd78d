//! What a trained base is measured by: pictures through the autoencoder and back, text against shuffled text, a sheet.

use autoencoder::{Autoencoder, pixels};
use burn::tensor::Distribution;
use burn::tensor::backend::Backend as _;
use flow_matching::noise::{Purpose, Stream};
use mmdit::{Rope, patchify, unpatchify};
use pixel_art::{Rgb8, Rgba8, SheetEntry, SheetStyle, contact_sheet};
use serde_json::{Value, json};
use tensor::{Backend, Device, Precision, Tensor, to_f32};

use crate::PretrainError;
use crate::augment::BACKGROUND;
use crate::base_phase::{BaseConfigs, CaptionIds, Latents, Models, Tokenizers, noised, shifted};
use crate::run::Run;
use crate::vae_phase::to_tensor;

/// Pictures that go through a network at once.
const BATCH: usize = 32;

/// Noise levels at which right and shuffled captions are compared, and draws of noise at each.
const SIGMAS: [f32; 4] = [0.5, 0.7, 0.85, 0.95];
const DRAWS: usize = 2;

/// The autoencoder on held-out pictures and on characters.
pub(crate) fn autoencoder(run: &Run<'_>, vae: &Autoencoder) -> Result<Value, PretrainError> {
    let held_out: Vec<Rgb8> = run
        .corpus
        .held_out_pictures()
        .into_iter()
        .map(|place| run.corpus.pictures[place].over(BACKGROUND))
        .collect();
    let mut measured = json!({
        "held_out_pictures": held_out.len(),
        "held_out_psnr_db": mean_psnr(&held_out, &there_and_back(vae, &held_out, &run.device)),
    });
    let sprites = &run.corpus.characters;
    if !sprites.is_empty() {
        let side_px = run.recipe.corpus.resolution_px;
        let large: Vec<Rgb8> = sprites
            .iter()
            .map(|sprite| on_canvas(sprite, side_px))
            .collect();
        let decoded = there_and_back(vae, &large, &run.device);
        let (mut right, mut all) = (0u64, 0u64);
        for (sprite, decoded) in sprites.iter().zip(&decoded) {
            let (r, a) = own_palette_pixels(sprite, decoded);
            right += r;
            all += a;
        }
        let factors = sprites
            .iter()
            .map(|sprite| Fit::new(sprite, side_px).factor);
        measured["characters"] = json!(large.len());
        measured["characters_psnr_db"] = json!(mean_psnr(&large, &decoded));
        // Of all characters the one that is magnified least.
        measured["characters_magnified"] = json!(factors.min());
        measured["native_pixels_nearest_own_color"] = json!(right as f64 / all.max(1) as f64);
    }
    Ok(measured)
}

/// Pictures as the decoder gives them back from their posterior's mean.
fn there_and_back(vae: &Autoencoder, pictures: &[Rgb8], device: &Device) -> Vec<Rgb8> {
    pictures
        .chunks(BATCH)
        .flat_map(|chunk| {
            let (w, h) = (chunk[0].width_px, chunk[0].height_px);
            let decoded = vae.decode(vae.encode(to_tensor(chunk, device)).mean);
            pixels::to_rgb8(&decoded)
                .into_iter()
                .map(move |rgb| Rgb8::new(w, h, rgb))
        })
        .collect()
}

/// Peak signal-to-noise ratio of each picture, 8-bit, averaged in decibels. Exact pictures count as 60 dB.
fn mean_psnr(pictures: &[Rgb8], decoded: &[Rgb8]) -> f64 {
    let psnr = |a: &Rgb8, b: &Rgb8| {
        let squares: f64 = a
            .pixels
            .iter()
            .zip(&b.pixels)
            .map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2))
            .sum();
        let mean = squares / a.pixels.len() as f64;
        (10.0 * (255.0 * 255.0 / mean).log10()).min(60.0)
    };
    let sum: f64 = pictures.iter().zip(decoded).map(|(a, b)| psnr(a, b)).sum();
    sum / pictures.len().max(1) as f64
}

/// How a sprite lies on a square canvas: magnified by a whole factor, as large as fits, in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fit {
    factor: u32,
    left_px: u32,
    top_px: u32,
}

impl Fit {
    /// # Panics
    ///
    /// If the sprite is larger than the canvas.
    fn new(sprite: &Rgba8, side_px: u32) -> Self {
        let longer_px = sprite.width_px.max(sprite.height_px);
        assert!(
            longer_px <= side_px,
            "a sprite of {longer_px} px is larger than {side_px} px"
        );
        let factor = side_px / longer_px;
        Self {
            factor,
            left_px: (side_px - factor * sprite.width_px) / 2,
            top_px: (side_px - factor * sprite.height_px) / 2,
        }
    }
}

/// A sprite on its canvas.
fn on_canvas(sprite: &Rgba8, side_px: u32) -> Rgb8 {
    let fit = Fit::new(sprite, side_px);
    let large = sprite.over(BACKGROUND).magnify(fit.factor);
    let mut canvas = Rgb8::filled(side_px, side_px, BACKGROUND);
    canvas.paste(&large, fit.left_px, fit.top_px);
    canvas
}

/// Of a sprite's visible pixels: how many blocks of the decoded picture are, on average, nearer to their own colour
/// than to any other colour of the sprite or the ground; and how many there are.
fn own_palette_pixels(sprite: &Rgba8, decoded: &Rgb8) -> (u64, u64) {
    let Fit {
        factor,
        left_px,
        top_px,
    } = Fit::new(sprite, decoded.width_px);
    let flat = sprite.over(BACKGROUND);
    let mut palette: Vec<[u8; 3]> = flat
        .pixels
        .chunks_exact(3)
        .map(|p| [p[0], p[1], p[2]])
        .collect();
    palette.push(BACKGROUND);
    palette.sort_unstable();
    palette.dedup();
    let (mut right, mut all) = (0, 0);
    for y in 0..sprite.height_px {
        for x in 0..sprite.width_px {
            if sprite.pixels[((y * sprite.width_px + x) * 4 + 3) as usize] == 0 {
                continue;
            }
            let mut mean = [0.0f64; 3];
            for dy in 0..factor {
                for dx in 0..factor {
                    let pixel = decoded.pixel(left_px + x * factor + dx, top_px + y * factor + dy);
                    for (sum, value) in mean.iter_mut().zip(pixel) {
                        *sum += f64::from(value) / f64::from(factor * factor);
                    }
                }
            }
            let distance = |color: &[u8; 3]| -> f64 {
                color
                    .iter()
                    .zip(mean)
                    .map(|(&c, m)| (f64::from(c) - m).powi(2))
                    .sum()
            };
            let nearest = palette
                .iter()
                .min_by(|a, b| distance(a).total_cmp(&distance(b)))
                .expect("the ground is in the palette");
            all += 1;
            right += u64::from(*nearest == flat.pixel(x, y));
        }
    }
    (right, all)
}

/// Velocity losses of held-out pairs with their own and with another pair's caption, same noise.
pub(crate) fn text_following(
    run: &Run<'_>,
    vae: &Autoencoder,
    models: &Models,
    configs: &BaseConfigs,
) -> Result<Value, PretrainError> {
    let tokenizers = Tokenizers::open(run.recipe)?;
    let mut pairs = run.corpus.held_out.clone();
    Stream::new(run.recipe.seed, Purpose::Order, 0, "pretrain/held-out").shuffle(&mut pairs);
    pairs.truncate(run.recipe.evaluate.num_pairs);
    if pairs.len() < 2 {
        return Ok(Value::Null);
    }
    let ids: Vec<CaptionIds> = pairs
        .iter()
        .map(|pair| tokenizers.ids(&pair.caption))
        .collect::<Result<_, _>>()?;
    // The next pair that has other words: pairs are in random order.
    let other: Vec<usize> = (0..pairs.len())
        .map(|i| {
            (1..pairs.len())
                .map(|step| (i + step) % pairs.len())
                .find(|&j| pairs[j].caption != pairs[i].caption)
                .unwrap_or(i)
        })
        .collect();
    let empty = tokenizers.ids("")?;
    let latents = Latents::encode(vae, pairs.len(), &run.device, |index| {
        run.corpus.pictures[pairs[index].picture].over(BACKGROUND)
    });
    let [_, h, w] = latents.shape;
    let rope = Rope::for_latent(
        &configs.transformer,
        run.recipe.base.t5_tokens,
        [h, w],
        &run.device,
    );
    let mut sums = vec![[0.0f64; 3]; pairs.len()];
    for start in (0..pairs.len()).step_by(BATCH) {
        let range = start..(start + BATCH).min(pairs.len());
        for (level, &sigma) in SIGMAS.iter().enumerate() {
            for draw in 0..DRAWS {
                let number = (start * SIGMAS.len() + level) * DRAWS + draw;
                Backend::seed(&run.device, run.recipe.seed ^ ((number as u64) << 8) ^ 2);
                let places = range.clone().map(|place| place as i32).collect();
                let clean = latents.draw(places, vae.config());
                let noise =
                    Tensor::<4>::random(clean.dims(), Distribution::Normal(0.0, 1.0), &run.device);
                let sigmas = vec![sigma; range.len()];
                let (noisy, target) = noised(clean, noise, &sigmas);
                let losses = |captions: Vec<&CaptionIds>| {
                    let velocity = models.velocity(noisy.clone(), &captions, &sigmas, &rope);
                    let [b, n, c] = velocity.dims();
                    let error = (velocity - target.clone())
                        .powi_scalar(2)
                        .reshape([b, n * c]);
                    to_f32(&error.mean_dim(1))
                };
                let right = losses(range.clone().map(|i| &ids[i]).collect());
                let shuffled = losses(range.clone().map(|i| &ids[other[i]]).collect());
                let none = losses(range.clone().map(|_| &empty).collect());
                for (k, i) in range.clone().enumerate() {
                    for (sum, value) in sums[i].iter_mut().zip([right[k], shuffled[k], none[k]]) {
                        *sum += f64::from(value) / (SIGMAS.len() * DRAWS) as f64;
                    }
                }
            }
        }
    }
    let mean = |column: usize| sums.iter().map(|s| s[column]).sum::<f64>() / sums.len() as f64;
    let lower = sums.iter().filter(|s| s[0] < s[1]).count();
    Ok(json!({
        "held_out_pairs": sums.len(),
        "velocity_loss_right_caption": mean(0),
        "velocity_loss_shuffled_caption": mean(1),
        "velocity_loss_no_caption": mean(2),
        "share_right_below_shuffled": lower as f64 / sums.len() as f64,
        "sigmas": SIGMAS, "draws": DRAWS,
    }))
}

/// Draws held-out captions, each caption once, and puts them on a sheet.
pub(crate) fn sheet(
    run: &Run<'_>,
    vae: &Autoencoder,
    models: &Models,
    configs: &BaseConfigs,
) -> Result<Option<Rgb8>, PretrainError> {
    let mut captions: Vec<String> = run
        .corpus
        .held_out
        .iter()
        .map(|pair| pair.caption.clone())
        .collect();
    captions.sort_unstable();
    captions.dedup();
    Stream::new(run.recipe.seed, Purpose::Order, 1, "pretrain/sheet").shuffle(&mut captions);
    captions.truncate(run.recipe.evaluate.num_samples);
    if captions.is_empty() {
        return Ok(None);
    }
    let mut pictures = Vec::new();
    for (number, chunk) in captions.chunks(BATCH).enumerate() {
        pictures.extend(draw(run, vae, models, configs, chunk, number as u64)?);
    }
    let pictures: Vec<Rgba8> = pictures.into_iter().map(Rgb8::into_rgba).collect();
    let entries: Vec<SheetEntry<'_>> = pictures
        .iter()
        .zip(&captions)
        .map(|(picture, label)| SheetEntry { picture, label })
        .collect();
    let style = SheetStyle {
        columns: 8,
        magnify: 1,
        gap_px: 8,
        label_lines: 4,
        background: BACKGROUND,
        ink: [0, 0, 0],
    };
    Ok(Some(contact_sheet(&entries, &style)))
}

/// Pictures of captions by Euler steps with classifier-free guidance.
fn draw(
    run: &Run<'_>,
    vae: &Autoencoder,
    models: &Models,
    configs: &BaseConfigs,
    captions: &[String],
    number: u64,
) -> Result<Vec<Rgb8>, PretrainError> {
    let recipe = &run.recipe.evaluate;
    let tokenizers = Tokenizers::open(run.recipe)?;
    let ids: Vec<CaptionIds> = captions
        .iter()
        .map(|caption| tokenizers.ids(caption))
        .collect::<Result<_, _>>()?;
    let empty = tokenizers.ids("")?;
    let b = captions.len();
    let both: Vec<&CaptionIds> = ids.iter().chain(std::iter::repeat_n(&empty, b)).collect();
    let side_px = run.recipe.corpus.resolution_px as usize;
    let side = side_px / vae.config().scale_factor_px();
    let rope = Rope::for_latent(
        &configs.transformer,
        run.recipe.base.t5_tokens,
        [side; 2],
        &run.device,
    );
    Backend::seed(&run.device, run.recipe.seed ^ (number << 8) ^ 3);
    let shape = [b, vae.config().latent_channels, side, side];
    let mut tokens = patchify(Tensor::<4>::random(
        shape,
        Distribution::Normal(0.0, 1.0),
        &run.device,
    ));
    let [_, n, c] = tokens.dims();
    let sigmas: Vec<f64> = (0..=recipe.sample_steps)
        .map(|step| {
            shifted(
                1.0 - step as f64 / recipe.sample_steps as f64,
                run.recipe.base.shift_mu,
            )
        })
        .collect();
    for step in sigmas.windows(2) {
        let doubled = Tensor::cat(vec![tokens.clone(), tokens.clone()], 0);
        let velocity = models.velocity(doubled, &both, &vec![step[0] as f32; 2 * b], &rope);
        let with = velocity.clone().slice([0..b, 0..n, 0..c]);
        let without = velocity.slice([b..2 * b, 0..n, 0..c]);
        let guided = without.clone() + (with - without) * recipe.true_cfg_scale;
        tokens = tokens + guided * (step[1] - step[0]);
    }
    let latents = vae.config().from_model(unpatchify(tokens, side, side));
    Ok(pixels::to_rgb8(&vae.decode(latents))
        .into_iter()
        .map(|rgb| Rgb8::new(side_px as u32, side_px as u32, rgb))
        .collect())
}

/// What evaluation computes in: half precision would hide what is measured.
pub(crate) const PRECISION: Precision = Precision::F32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_counts_for_the_colour_that_it_is_nearest_to() {
        let sprite = Rgba8::new(2, 1, vec![200, 0, 0, 255, 0, 0, 0, 0]);
        let red = Rgb8::filled(4, 4, [190, 10, 10]);
        assert_eq!(own_palette_pixels(&sprite, &red), (1, 1));
        let white = Rgb8::filled(4, 4, [250, 240, 240]);
        assert_eq!(own_palette_pixels(&sprite, &white), (0, 1));
    }

    #[test]
    fn a_sprite_of_any_shape_lies_magnified_in_the_middle() {
        let sprite = Rgba8::new(2, 1, vec![200, 0, 0, 255, 0, 9, 0, 255]);
        let canvas = on_canvas(&sprite, 5);
        let fit = Fit {
            factor: 2,
            left_px: 0,
            top_px: 1,
        };
        assert_eq!(Fit::new(&sprite, 5), fit);
        assert_eq!(canvas.pixel(0, 0), BACKGROUND);
        assert_eq!(canvas.pixel(1, 2), [200, 0, 0]);
        assert_eq!(canvas.pixel(2, 1), [0, 9, 0]);
        assert_eq!(canvas.pixel(4, 2), BACKGROUND);
        assert_eq!(own_palette_pixels(&sprite, &canvas), (2, 2));
    }

    #[test]
    fn psnr_of_an_error_of_one_everywhere_is_48_db() {
        let picture = |value| vec![Rgb8::filled(2, 2, [value; 3])];
        let psnr = mean_psnr(&picture(10), &picture(11));
        assert!((psnr - 48.13).abs() < 0.01, "{psnr}");
    }
}
