//! Latents to tokens and back, and where each token stands.
//!
//! The transformer sees a latent as 2×2 patches, one token each. Positions are three numbers: 0, row, column for
//! image tokens, and 0, 0, 0 for text tokens.

use tensor::Tensor;

/// Rows and columns of latent cells in one token.
pub const PATCH_CELLS: usize = 2;

/// Cuts a latent into 2×2 patches, one token each: `(b, c, h, w)` → `(b, n, 4c)`.
///
/// A token lists its patch channel by channel, `(c ph pw)`.
///
/// Source: `FluxPipeline._pack_latents`, diffusers 0.42.
///
/// # Panics
///
/// If `h` or `w` is odd.
pub fn patchify(latent: Tensor<4>) -> Tensor<3> {
    let [b, c, h, w] = latent.dims();
    assert!(
        h % 2 == 0 && w % 2 == 0,
        "a latent of {h}×{w} has no 2×2 patches"
    );
    latent
        .reshape([b, c, h / 2, 2, w / 2, 2]) // b c h/2 ph w/2 pw
        .permute([0, 2, 4, 1, 3, 5]) // b h/2 w/2 c ph pw
        .reshape([b, (h / 2) * (w / 2), 4 * c]) // b n (c ph pw)
}

/// Puts tokens back into a latent of `h`×`w` cells: `(b, n, 4c)` → `(b, c, h, w)`. The inverse of [`patchify`].
///
/// Source: `FluxPipeline._unpack_latents`, diffusers 0.42.
///
/// # Panics
///
/// If there are not (h/2)·(w/2) tokens, or their channels are not divisible by 4.
pub fn unpatchify(tokens: Tensor<3>, h: usize, w: usize) -> Tensor<4> {
    let [b, n, channels] = tokens.dims();
    assert!(
        [h, w].iter().all(|side| side.is_multiple_of(2))
            && n == (h / 2) * (w / 2)
            && channels.is_multiple_of(4),
        "{n} tokens of {channels} channels are no latent of {h}×{w}"
    );
    let c = channels / 4;
    tokens
        .reshape([b, h / 2, w / 2, c, 2, 2]) // b h/2 w/2 c ph pw
        .permute([0, 3, 1, 4, 2, 5]) // b c h/2 ph w/2 pw
        .reshape([b, c, h, w])
}

/// Positions of the tokens of a latent of `h`×`w` cells, row by row: `[0, row, column]`.
///
/// Source: `FluxPipeline._prepare_latent_image_ids`, diffusers 0.42.
pub fn image_ids(h: usize, w: usize) -> Vec<[f32; 3]> {
    (0..h / PATCH_CELLS)
        .flat_map(|row| (0..w / PATCH_CELLS).map(move |column| [0.0, row as f32, column as f32]))
        .collect()
}

/// Positions of `num_tokens` text tokens: all at the origin.
pub fn text_ids(num_tokens: usize) -> Vec<[f32; 3]> {
    vec![[0.0; 3]; num_tokens]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;
    use tensor::{from_f32, to_f32};

    #[test]
    fn a_token_lists_its_patch_channel_by_channel() {
        // Two channels of 2×4 cells: the first token holds columns 0 and 1 of both.
        let values = (0..16).map(|i| i as f32).collect();
        let tokens = patchify(from_f32(values, [1, 2, 2, 4], &cpu()));
        assert_eq!(tokens.dims(), [1, 2, 8]);
        assert_eq!(
            to_f32(&tokens),
            [
                0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 12.0, 13.0, //
                2.0, 3.0, 6.0, 7.0, 10.0, 11.0, 14.0, 15.0
            ]
        );
    }

    #[test]
    fn unpatchify_undoes_patchify() {
        let values: Vec<f32> = (0..2 * 3 * 4 * 6).map(|i| i as f32).collect();
        let latent = from_f32(values.clone(), [2, 3, 4, 6], &cpu());
        assert_eq!(to_f32(&unpatchify(patchify(latent), 4, 6)), values);
    }

    #[test]
    fn the_row_is_the_second_number_and_the_column_the_third() {
        assert_eq!(
            image_ids(4, 6),
            [
                [0.0, 0.0, 0.0],
                [0.0, 0.0, 1.0],
                [0.0, 0.0, 2.0],
                [0.0, 1.0, 0.0],
                [0.0, 1.0, 1.0],
                [0.0, 1.0, 2.0]
            ]
        );
    }
}
