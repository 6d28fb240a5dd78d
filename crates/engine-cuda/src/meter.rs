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
    /// To and from memory, per second.
    pub bytes: f64,
    /// What a launch in a graph costs besides.
    pub launch_s: f64,
}

impl Rates {
    /// Assumed of an H100 SXM (80 GB): about what cuBLASLt, this crate's attention and its memory-bound kernels reach there
    /// at FLUX.1-dev's shapes. `benches/flux.rs` measures a step against them.
    pub const H100: Self = Self {
        product_flops: 620e12,
        attention_flops: 400e12,
        bytes: 2.4e12,
        launch_s: 1.5e-6,
    };

    pub(crate) fn seconds(&self, work: Work, flops: f64, bytes: f64) -> f64 {
        let arithmetic = match work {
            Work::Attention => flops / self.attention_flops,
            _ => flops / self.product_flops,
        };
        // Attention's operands are small beside its arithmetic, and views of them overlap.
        let memory = match work {
            Work::Attention => 0.0,
            _ => bytes / self.bytes,
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
        assert_eq!(rates.seconds(Work::Product, 620e12, 1.0), 1.0);
        assert_eq!(rates.seconds(Work::Product, 1.0, 2.4e12), 1.0);
        // Attention's views overlap: its bytes say nothing.
        assert_eq!(rates.seconds(Work::Attention, 400e12, 1e15), 1.0);
    }

    #[test]
    fn files_of_kernels_tell_the_kind_of_work() {
        let kinds = ["product_nf4", "attention_sm90", "nf4", "norm"].map(Work::of_module);
        assert_eq!(kinds, Work::ALL);
    }
}
