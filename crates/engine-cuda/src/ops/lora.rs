//! LoRA factors between the optimiser's layout (`f32`, tensor after tensor) and the products' (T, stacked and padded).

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::stream::Stream;
use crate::view::View;

static LORA: Module = Module {
    name: "lora",
    source: include_str!("../../kernels/lora.cu"),
};

/// A strided rectangle to be copied, as the kernels read it. Offsets and strides are in elements.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::NoUninit)]
#[repr(C)]
pub struct Rectangle {
    /// Where it begins in the source buffer.
    pub source: i64,
    /// Where it begins in the target buffer.
    pub target: i64,
    /// Its rows.
    pub rows: i32,
    /// Its columns.
    pub columns: i32,
    /// From one row to the next in the source.
    pub source_stride: i32,
    /// From one row to the next in the target.
    pub target_stride: i32,
    /// What every number is multiplied by.
    pub scale: f32,
    /// Makes the size a multiple of 8.
    pub padding: i32,
}

impl Rectangle {
    /// The elements that it reaches in source and target.
    fn reach(&self) -> [usize; 2] {
        [
            (self.source, self.source_stride),
            (self.target, self.target_stride),
        ]
        .map(|(start, stride)| {
            start as usize + (self.rows as usize - 1) * stride as usize + self.columns as usize
        })
    }
}

/// Rectangles on the device.
#[derive(Clone, Copy, Debug)]
pub struct Rectangles {
    view: View,
    count: usize,
    largest: usize,
    reach: [usize; 2],
}

impl Rectangles {
    /// Bytes that a list takes on the device.
    pub fn bytes(count: usize) -> usize {
        count * size_of::<Rectangle>()
    }

    /// Puts a list into `view`.
    ///
    /// # Errors
    ///
    /// If the copy fails.
    pub fn upload(s: &Stream, view: View, list: &[Rectangle]) -> Result<Self, CudaError> {
        s.upload(view, list)?;
        let size = |r: &Rectangle| r.rows as usize * r.columns as usize;
        let reach = |side: usize| list.iter().map(|r| r.reach()[side]).max().unwrap_or(0);
        Ok(Self {
            view,
            count: list.len(),
            largest: list.iter().map(size).max().unwrap_or(0),
            reach: [reach(0), reach(1)],
        })
    }

    fn launch(&self) -> Launch {
        Launch {
            grid: [
                self.largest.div_ceil(1024).clamp(1, 64) as u32,
                self.count as u32,
                1,
            ],
            block: [256, 1, 1],
            shared_bytes: 0,
        }
    }
}

/// `f32` factors into T, scaled.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a rectangle reaches beyond a buffer.
pub fn pack(
    s: &Stream,
    t: Half,
    target: View,
    source: View,
    list: &Rectangles,
) -> Result<(), CudaError> {
    if list.count == 0 {
        return Ok(());
    }
    source.holds(4 * list.reach[0], "factors to be packed");
    target.holds(2 * list.reach[1], "packed factors");
    let args = Args::new().ptr(target).ptr(source).ptr(list.view);
    // SAFETY: the list's reach was compared with both buffers.
    unsafe { s.launch(&LORA, &[t.define()], "lora_pack", list.launch(), args) }
}

/// `f32` gradients of stacked factors into tensor after tensor, scaled.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a rectangle reaches beyond a buffer.
pub fn unpack(
    s: &Stream,
    t: Half,
    target: View,
    source: View,
    list: &Rectangles,
) -> Result<(), CudaError> {
    if list.count == 0 {
        return Ok(());
    }
    source.holds(4 * list.reach[0], "stacked gradients");
    target.holds(4 * list.reach[1], "gradients");
    let args = Args::new().ptr(target).ptr(source).ptr(list.view);
    // SAFETY: the list's reach was compared with both buffers.
    unsafe { s.launch(&LORA, &[t.define()], "lora_unpack", list.launch(), args) }
}
