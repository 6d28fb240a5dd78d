//! One typed wrapper per kernel: sizes are asserted, then the kernel is launched.

pub mod attention;
pub mod attention_any;
pub mod average;
pub mod draw;
pub mod elementwise;
mod extent;
pub mod lora;
pub mod loss;
pub mod modulated;
pub mod nf4;
pub mod optimizer;
pub mod product_rows;
pub mod rope;
pub mod sums;
