//! A fused adapter cut into those of its parts, without loss.
//!
//! A fused layer's output rows are those of its parts, one after another. If each part uses only its own, equally wide
//! range of the rank (what fusing separate adapters gives), every part gets that range alone; otherwise every part gets
//! the whole `A` and its rows of `B`. Either way the parts' additions are the fused one's rows, to the bit.

use crate::LoraModule;

/// Cuts `fused` into parts of the given output widths. A last part that is zero and `may_drop_last` is `None`.
///
/// # Panics
///
/// If the widths do not add up to the fused output.
pub(crate) fn split(
    fused: &LoraModule,
    out_features: &[usize],
    may_drop_last: bool,
) -> Vec<Option<LoraModule>> {
    assert_eq!(
        out_features.iter().sum::<usize>(),
        fused.out_features,
        "widths {out_features:?} of the fused output"
    );
    let mut rows = fused.b.as_slice();
    let parts: Vec<&[f32]> = out_features
        .iter()
        .map(|width| {
            let (part, rest) = rows.split_at(width * fused.rank);
            rows = rest;
            part
        })
        .collect();
    let drop_last = may_drop_last
        && parts
            .last()
            .is_some_and(|part| part.iter().all(|value| *value == 0.0));
    let num_kept = parts.len() - usize::from(drop_last);
    let num_ranges = [num_kept, parts.len()]
        .into_iter()
        .find(|ranges| is_block_diagonal(fused, &parts, *ranges));
    parts
        .iter()
        .enumerate()
        .map(|(index, part)| {
            (index < num_kept).then(|| match num_ranges {
                Some(num_ranges) => sub_adapter(fused, part, index, num_ranges),
                None => LoraModule {
                    out_features: part.len() / fused.rank,
                    a: fused.a.clone(),
                    b: part.to_vec(),
                    ..*fused
                },
            })
        })
        .collect()
}

/// Whether part `i` is zero outside the `i`-th of `num_ranges` equal ranges of the rank.
fn is_block_diagonal(fused: &LoraModule, parts: &[&[f32]], num_ranges: usize) -> bool {
    if !fused.rank.is_multiple_of(num_ranges) {
        return false;
    }
    let width = fused.rank / num_ranges;
    parts.iter().enumerate().all(|(index, part)| {
        part.chunks(fused.rank).all(|row| {
            row.iter()
                .enumerate()
                .all(|(column, value)| column / width == index || *value == 0.0)
        })
    })
}

/// The adapter of one part from its range of the rank. The strength `alpha / rank` stays.
fn sub_adapter(fused: &LoraModule, part: &[f32], index: usize, num_ranges: usize) -> LoraModule {
    let rank = fused.rank / num_ranges;
    let a =
        fused.a[index * rank * fused.in_features..(index + 1) * rank * fused.in_features].to_vec();
    let b = part
        .chunks(fused.rank)
        .flat_map(|row| &row[index * rank..(index + 1) * rank])
        .copied()
        .collect();
    LoraModule {
        rank,
        alpha: (f64::from(fused.alpha) / num_ranges as f64) as f32,
        in_features: fused.in_features,
        out_features: part.len() / fused.rank,
        a,
        b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(seed: f32) -> LoraModule {
        LoraModule::new(
            4.0,
            3,
            2,
            (0..6).map(|i| seed + i as f32).collect(),
            vec![seed, 2.0, -3.0, seed],
        )
    }

    /// Rank 2 each, fused to rank 6, with `num_zero` rows of zeros below.
    fn fuse(parts: &[LoraModule; 3], num_zero: usize) -> LoraModule {
        let a = parts.iter().flat_map(|part| part.a.clone()).collect();
        let mut b = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            for row in part.b.chunks(2) {
                let mut wide = [0.0; 6];
                wide[2 * index..2 * index + 2].copy_from_slice(row);
                b.extend(wide);
            }
        }
        b.extend(vec![0.0; 6 * num_zero]);
        LoraModule::new(12.0, 3, 6 + num_zero, a, b)
    }

    #[test]
    fn a_block_diagonal_adapter_gives_back_the_adapters_it_was_made_of() {
        let parts = [part(1.0), part(5.0), part(-2.0)];
        assert_eq!(
            split(&fuse(&parts, 0), &[2, 2, 2], false),
            parts.clone().map(Some)
        );
        let mut expected = parts.clone().map(Some).to_vec();
        expected.push(None);
        assert_eq!(split(&fuse(&parts, 5), &[2, 2, 2, 5], true), expected);
    }

    #[test]
    fn a_dense_adapter_keeps_its_rank_and_every_row() {
        let b: Vec<f32> = (1..=12).map(|i| i as f32).collect();
        let fused = LoraModule::new(2.0, 2, 6, vec![1.0, 2.0, 3.0, 5.0], b);
        let parts: Vec<LoraModule> = split(&fused, &[2, 2, 2], true)
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(parts.len(), 3);
        assert!(parts.iter().all(|part| part.rank == 2 && part.a == fused.a));
        let deltas: Vec<f32> = parts.iter().flat_map(LoraModule::delta).collect();
        assert_eq!(deltas, fused.delta());
    }

    #[test]
    fn a_last_part_with_numbers_is_kept() {
        let mut fused = fuse(&[part(1.0), part(5.0), part(-2.0)], 1);
        *fused.b.last_mut().expect("not empty") = 3.0;
        let parts: Vec<LoraModule> = split(&fused, &[2, 2, 2, 1], true)
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(parts.len(), 4);
        let deltas: Vec<f32> = parts.iter().flat_map(LoraModule::delta).collect();
        assert_eq!(deltas, fused.delta());
    }
}
