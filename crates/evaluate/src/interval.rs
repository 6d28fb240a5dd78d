//! How sure a relative change is: a paired bootstrap.
//!
//! Each resample draws as many pictures as there are, with repetition, and takes the change of their summed losses. The
//! interval is between the 2.5th and the 97.5th percentile of all resamples (Efron and Tibshirani 1993, §13.3). A
//! picture's losses before and after stay together, so that some pictures being hard does not widen it.

use flow_matching::{Purpose, Stream};
use serde::{Deserialize, Serialize};

/// An interval that holds the change in 95 of 100 repetitions with other pictures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// 2.5th percentile.
    pub low: f64,
    /// 97.5th percentile.
    pub high: f64,
    /// Resamples drawn.
    pub resamples: u32,
}

/// `Σ after / Σ before − 1` of pairs `[before, after]`; 0 if there is nothing before.
pub fn relative_change(pairs: &[[f64; 2]]) -> f64 {
    let before: f64 = pairs.iter().map(|pair| pair[0]).sum();
    let after: f64 = pairs.iter().map(|pair| pair[1]).sum();
    if before == 0.0 {
        return 0.0;
    }
    after / before - 1.0
}

impl Interval {
    /// The interval of [`relative_change`].
    ///
    /// # Panics
    ///
    /// If there are no pairs or no resamples.
    pub fn bootstrap(pairs: &[[f64; 2]], seed: u64, resamples: u32) -> Self {
        assert!(
            !pairs.is_empty() && resamples > 0,
            "{resamples} resamples of {} pairs",
            pairs.len()
        );
        let mut changes: Vec<f64> = (0..u64::from(resamples))
            .map(|number| {
                let mut stream = Stream::new(seed, Purpose::Resample, number, "");
                let drawn: Vec<[f64; 2]> = pairs
                    .iter()
                    .map(|_| {
                        let index = stream.below(pairs.len() as u64);
                        pairs[usize::try_from(index).expect("less than the number of pairs")]
                    })
                    .collect();
                relative_change(&drawn)
            })
            .collect();
        changes.sort_by(f64::total_cmp);
        let percentile = |part: f64| {
            let rank = (part * changes.len() as f64).floor() as usize;
            changes[rank.min(changes.len() - 1)]
        };
        Self {
            low: percentile(0.025),
            high: percentile(0.975),
            resamples,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_change_is_that_of_the_sums() {
        assert_eq!(relative_change(&[[1.0, 1.0], [3.0, 1.0]]), -0.5);
        assert_eq!(relative_change(&[[0.0, 1.0]]), 0.0);
    }

    #[test]
    fn pairs_that_all_change_alike_leave_no_doubt() {
        let pairs = [[1.0, 0.75], [8.0, 6.0], [100.0, 75.0]];
        let interval = Interval::bootstrap(&pairs, 1, 200);
        assert_eq!((interval.low, interval.high), (-0.25, -0.25));
    }

    #[test]
    fn the_interval_is_as_wide_as_the_theory_says() {
        // 100 pairs, half falling by 10 % and half rising by 10 %: the mean of 100 signs has deviation 0.1 · 0.1.
        let pairs: Vec<[f64; 2]> = (0..100)
            .map(|i| [1.0, if i % 2 == 0 { 0.9 } else { 1.1 }])
            .collect();
        let interval = Interval::bootstrap(&pairs, 3, 4000);
        assert!((interval.low + 0.0196).abs() < 0.003, "{interval:?}");
        assert!((interval.high - 0.0196).abs() < 0.003, "{interval:?}");
        assert_eq!(interval, Interval::bootstrap(&pairs, 3, 4000));
        assert_ne!(interval, Interval::bootstrap(&pairs, 4, 4000));
    }
}
