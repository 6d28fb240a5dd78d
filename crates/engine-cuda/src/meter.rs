//! What launches are counted as, and how long counted work takes on a device.

/// What a launch is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Work {
    /// Matrix products.
    Product,
    /// Attention, forward and backward.
    Attention,
    /// NF4 to 16 bits.
    Dequantise,
    /// Everything that only reads and writes.
    Elementwise,
}

impl Work {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Product,
        Self::Attention,
        Self::Dequantise,
        Self::Elementwise,
    ];

    pub(crate) fn of_module(name: &str) -> Self {
        if name.starts_with("attention") {
            Self::Attention
        } else if name.starts_with("nf4") {
            Self::Dequantise
        } else if name.starts_with("product") {
            Self::Product
        } else {
            Self::Elementwise
        }
    }
}

/// What was launched: how often, how much arithmetic, how many bytes at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Number of launches.
    pub launches: u64,
    /// Multiplications and additions.
    pub flops: f64,
    /// Bytes of the arguments.
    pub bytes: f64,
    /// What that takes at the rates given.
    pub seconds: f64,
}

/// How fast a device is at each kind of work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Of large products, per second.
    pub product_flops: f64,
    /// Of attention, per second.
    pub attention_flops: f64,
    /// To and from memory, per second; what a launch reads may still be in the cache.
    pub bytes: f64,
    /// As `bytes` where NF4 weights become 16 bits: they are in no cache.
    pub dequantised_bytes: f64,
    /// What a launch in a graph costs besides.
    pub launch_s: f64,
}

impl Rates {
    /// An H100 SXM's (80 GB), so that the parts of twelve ways to train FLUX.1-dev, and whole steps, come out within some
    /// per cent of what was measured there on 2026-11-23 (docs/benchmarks/flux.md).
    pub const H100: Self = Self {
        product_flops: 680e12,
        attention_flops: 420e12,
        bytes: 3.6e12,
        dequantised_bytes: 2.6e12,
        launch_s: 1e-6,
    };

    pub(crate) fn seconds(&self, work: Work, flops: f64, bytes: f64) -> f64 {
        let arithmetic = match work {
            Work::Attention => flops / self.attention_flops,
            _ => flops / self.product_flops,
        };
        // Attention's operands are small beside its arithmetic, and views of them overlap.
        let memory = match work {
            Work::Attention => 0.0,
            Work::Dequantise => bytes / self.dequantised_bytes,
            Work::Product | Work::Elementwise => bytes / self.bytes,
        };
        arithmetic.max(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thin_product_takes_as_long_as_its_bytes() {
        let rates = Rates::H100;
        let of = |flops, bytes| rates.seconds(Work::Product, flops, bytes);
        assert_eq!(of(rates.product_flops, 1.0), 1.0);
        assert_eq!(of(1.0, rates.bytes), 1.0);
        // Attention's views overlap: its bytes say nothing.
        assert_eq!(
            rates.seconds(Work::Attention, rates.attention_flops, 1e15),
            1.0
        );
    }

    #[test]
    fn files_of_kernels_tell_the_kind_of_work() {
        let kinds = ["product_rows", "attention_sm90", "nf4", "norm"].map(Work::of_module);
        assert_eq!(kinds, Work::ALL);
    }
}
