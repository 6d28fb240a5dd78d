//! Random numbers that depend on what they are for, and on nothing that happened before.
//!
//! A [`Stream`] is named by a seed, a purpose, a step and a key (a sample id, a module path). BLAKE3 turns the name into
//! the key of a ChaCha12 generator. So a run that was interrupted draws what it would have drawn, adding a sample leaves
//! the others' numbers alone, and neither batch size nor thread count matters.
//!
//! The numbers of a name never change: tests hold some of them, and another scheme gets another `DOMAIN`.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use rand_distr::{Distribution as _, StandardNormal};

/// BLAKE3 derivation context: which scheme this is.
const DOMAIN: &str = "spritelora 2026-11-22 random stream v1";

/// What random numbers are for. Purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// First values of the LoRA.
    LoraInit,
    /// Order of samples in an epoch.
    Order,
    /// Which cached view of a sample is used.
    View,
    /// Crops, flips and the like when views are made.
    Augmentation,
    /// The draw from a latent's posterior.
    Posterior,
    /// The noise that is mixed in.
    Noise,
    /// The noise level.
    Timestep,
    /// What sampling starts from.
    InitialLatent,
    /// Which measurements a bootstrap takes.
    Resample,
    /// Which prompt meets which picture in a permutation test.
    Permutation,
}

impl Purpose {
    /// Its part of the stream's name.
    fn name(self) -> &'static str {
        match self {
            Self::LoraInit => "lora-init",
            Self::Order => "order",
            Self::View => "view",
            Self::Augmentation => "augmentation",
            Self::Posterior => "posterior",
            Self::Noise => "noise",
            Self::Timestep => "timestep",
            Self::InitialLatent => "initial-latent",
            Self::Resample => "resample",
            Self::Permutation => "permutation",
        }
    }
}

/// A sequence of random numbers.
#[derive(Clone, Debug)]
pub struct Stream {
    generator: ChaCha12Rng,
}

impl Stream {
    /// The sequence of that name, from its beginning.
    pub fn new(seed: u64, purpose: Purpose, step: u64, key: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(DOMAIN);
        hasher.update(&seed.to_le_bytes());
        hasher.update(&step.to_le_bytes());
        // The purpose's length keeps it apart from the key, which is last and needs none.
        hasher.update(&(purpose.name().len() as u64).to_le_bytes());
        hasher.update(purpose.name().as_bytes());
        hasher.update(key.as_bytes());
        Self {
            generator: ChaCha12Rng::from_seed(*hasher.finalize().as_bytes()),
        }
    }

    /// A standard normal number.
    pub fn normal(&mut self) -> f32 {
        StandardNormal.sample(&mut self.generator)
    }

    /// `count` standard normal numbers.
    pub fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }

    /// A number in [0, 1), a multiple of 2⁻²⁴.
    pub fn uniform(&mut self) -> f32 {
        (self.generator.next_u32() >> 8) as f32 / (1u32 << 24) as f32
    }

    /// A whole number below `bound`, all equally likely.
    ///
    /// # Panics
    ///
    /// If `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "no whole number is below 0");
        // The largest multiple of `bound` that fits; what is above it would favour small numbers.
        let limit = u64::MAX - u64::MAX % bound;
        loop {
            let drawn = self.generator.next_u64();
            if drawn < limit {
                return drawn % bound;
            }
        }
    }

    /// Puts `items` into random order, all orders equally likely.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let chosen = self.below(last as u64 + 1);
            items.swap(last, usize::try_from(chosen).expect("at most `last`"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(seed: u64, purpose: Purpose, step: u64, key: &str) -> Vec<f32> {
        Stream::new(seed, purpose, step, key).normals(4)
    }

    #[test]
    fn the_numbers_of_a_name_never_change() {
        // Drawn once and held: a change of a dependency that moves them would break every saved run.
        let mut stream = Stream::new(0, Purpose::Noise, 0, "");
        assert_eq!(
            stream.normals(4),
            [-1.2556373, -2.6302066, 0.8761644, 0.9533198]
        );
        assert_eq!(
            [stream.uniform(), stream.uniform()],
            [0.8453099, 0.14125997]
        );
        let mut stream = Stream::new(42, Purpose::LoraInit, 7, "transformer_blocks.0.attn.to_q");
        assert_eq!(
            stream.normals(4),
            [0.5061922, 0.9386487, -0.8111585, -0.73917866]
        );
        assert_eq!(
            [stream.uniform(), stream.uniform()],
            [0.65582204, 0.35452765]
        );
        assert_eq!([stream.below(1_000_000), stream.below(3)], [894_840, 1]);
        assert_eq!(stream.normal(), -0.5863959);
        let mut order: Vec<u32> = (0..10).collect();
        Stream::new(1, Purpose::Order, 2, "").shuffle(&mut order);
        assert_eq!(order, [5, 1, 4, 0, 3, 8, 2, 6, 9, 7]);
        // FNV-1a over the bits of enough numbers to meet the distribution's tails.
        let numbers = Stream::new(3, Purpose::InitialLatent, 0, "x").normals(100_000);
        let digest = numbers
            .iter()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, number| {
                (hash ^ u64::from(number.to_bits())).wrapping_mul(0x100_0000_01b3)
            });
        assert_eq!(digest, 0xaef2_0344_189d_1242);
    }

    #[test]
    fn every_part_of_the_name_makes_other_numbers() {
        let numbers = stream(1, Purpose::Noise, 2, "a");
        assert_eq!(numbers, stream(1, Purpose::Noise, 2, "a"));
        assert_ne!(numbers, stream(2, Purpose::Noise, 2, "a"));
        assert_ne!(numbers, stream(1, Purpose::Posterior, 2, "a"));
        assert_ne!(numbers, stream(1, Purpose::Noise, 3, "a"));
        assert_ne!(numbers, stream(1, Purpose::Noise, 2, "b"));
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let numbers = Stream::new(7, Purpose::Noise, 0, "").normals(100_000);
        let mean = numbers.iter().map(|x| f64::from(*x)).sum::<f64>() / 1e5;
        let variance = numbers.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 1e5;
        // Four deviations of the mean (1/√n) and of the mean square (√(2/n)).
        assert!(
            mean.abs() < 0.013 && (variance - 1.0).abs() < 0.018,
            "mean {mean}, variance {variance}"
        );
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval() {
        let mut stream = Stream::new(7, Purpose::Timestep, 0, "");
        let mut counts = [0; 10];
        for _ in 0..10_000 {
            let u = stream.uniform();
            assert!((0.0..1.0).contains(&u));
            counts[(u * 10.0) as usize] += 1;
        }
        assert!(
            counts.iter().all(|count| (850..1150).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn whole_numbers_below_a_bound_all_occur() {
        let mut stream = Stream::new(7, Purpose::Order, 0, "");
        let mut counts = [0; 3];
        for _ in 0..3000 {
            counts[usize::try_from(stream.below(3)).expect("small")] += 1;
        }
        assert!(
            counts.iter().all(|count| (880..1120).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..50).collect();
        Stream::new(7, Purpose::Order, 3, "").shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }
}
