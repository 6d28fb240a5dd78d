//! LoRA factors on the device: `f32` masters tensor after tensor, stacked copies in T for the products, gradients.
//!
//! Tensors lie in the order of their paths, A before B; the optimiser works on that flat layout. The stacked layout is
//! described in [`super::linear`]; two lists of rectangles lead from one to the other.

use std::collections::BTreeMap;

use crate::arena::Arena;
use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::error::ModelError;
use crate::model::linear::Factors;
use crate::model::network::Network;
use crate::ops::lora::{self, Rectangle, Rectangles};
use crate::stream::{Buffer, Stream};
use crate::view::View;

/// Stacked ranks are filled up to a multiple of this: 16 bytes, below which products lose their fast paths.
const RANK_MULTIPLE: usize = 8;

/// The factors of one layer: `y += scale · (x Aᵀ) Bᵀ`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFactors {
    /// The layer's path, e.g. `transformer_blocks.0.attn.to_q`.
    pub path: String,
    /// The rank.
    pub rank: usize,
    /// alpha / rank, times the strength that a person chose.
    pub scale: f32,
    /// `[rank, in]`.
    pub a: Vec<f32>,
    /// `[out, rank]`.
    pub b: Vec<f32>,
}

/// One layer's place in the flat layout, in elements.
#[derive(Clone, Debug, PartialEq)]
struct Place {
    path: String,
    rank: usize,
    scale: f32,
    a: std::ops::Range<usize>,
    b: std::ops::Range<usize>,
}

/// Factors on the device.
pub struct DeviceFactors {
    places: Vec<Place>,
    /// Numbers in all tensors.
    total: usize,
    masters: View,
    gradients: Option<Gradients>,
    packed: View,
    pack: Rectangles,
    slab: Buffer,
}

/// Where gradients are summed up and brought into the flat layout.
#[derive(Clone, Copy, Debug)]
struct Gradients {
    flat: View,
    stacked: View,
    unpack: Rectangles,
}

/// A fused product's share of the stacked layout, in elements.
struct Stack {
    /// Which product, in the order of [`Network::linears`].
    linear: usize,
    rank: usize,
    first_row: usize,
    num_rows: usize,
    in_features: usize,
    /// Where its A begins; its B follows.
    start: usize,
}

impl Stack {
    fn a_len(&self) -> usize {
        self.rank * self.in_features
    }

    fn len(&self) -> usize {
        self.a_len() + self.num_rows * self.rank
    }
}

/// How many elements of T or `f32` keep the next tensor aligned to 16 bytes in both.
const ELEMENT_ALIGNMENT: usize = 128;

impl DeviceFactors {
    /// Puts factors onto the device and into the network's layers (which must have none).
    ///
    /// # Errors
    ///
    /// If a path is no layer, factors have another size, or memory is short.
    pub fn attach(
        stream: &Stream,
        network: &mut Network,
        factors: &[LoraFactors],
        t: Half,
        trained: bool,
    ) -> Result<Self, CudaError> {
        let by_path: BTreeMap<&str, &LoraFactors> =
            factors.iter().map(|f| (f.path.as_str(), f)).collect();
        let mut places: BTreeMap<&str, Place> = BTreeMap::new();
        let mut total = 0;
        for (&path, f) in &by_path {
            let a = total..total + f.a.len();
            let b = a.end..a.end + f.b.len();
            total = b.end;
            let place = Place {
                path: path.to_owned(),
                rank: f.rank,
                scale: f.scale,
                a,
                b,
            };
            places.insert(path, place);
        }
        let (stacks, pack, unpack) = stack(network, &by_path, &places, trained)?;
        let stacked_len = stacks.last().map_or(0, |s| s.start + s.len());

        let arrange = |arena: &Arena| {
            let lists = arena.take(Rectangles::bytes(pack.len() + unpack.len()));
            let masters = arena.take(4 * total);
            let packed = arena.take(2 * stacked_len);
            let gradients = trained.then(|| (arena.take(4 * total), arena.take(4 * stacked_len)));
            (lists, masters, packed, gradients)
        };
        let counting = Arena::counting();
        arrange(&counting);
        let slab = stream.allocate(counting.peak_bytes(), "the LoRA")?;
        let (lists, masters, packed, gradients) = arrange(&Arena::over(slab.view()));
        stream.fill(slab.view(), 0)?;

        let values: Vec<f32> = by_path
            .values()
            .flat_map(|f| f.a.iter().chain(&f.b))
            .copied()
            .collect();
        stream.upload(masters, &values)?;
        let (pack_list, unpack_list) = (
            lists.take(Rectangles::bytes(pack.len())),
            lists.skip(Rectangles::bytes(pack.len())),
        );
        let pack = Rectangles::upload(stream, pack_list, &pack)?;
        let unpack = Rectangles::upload(stream, unpack_list, &unpack)?;
        lora::pack(stream, t, packed, masters, &pack)?;

        let mut linears = network.linears_mut();
        for stack in &stacks {
            let (a, b) = (stack.start, stack.start + stack.a_len());
            let b_len = stack.num_rows * stack.rank;
            linears[stack.linear].factors = Some(Factors {
                rank: stack.rank,
                first_row: stack.first_row,
                num_rows: stack.num_rows,
                a: packed.skip(2 * a).take(2 * stack.a_len()),
                b: packed.skip(2 * b).take(2 * b_len),
                gradients: gradients.map(|(_, stacked)| {
                    [
                        stacked.skip(4 * a).take(4 * stack.a_len()),
                        stacked.skip(4 * b).take(4 * b_len),
                    ]
                }),
            });
        }
        Ok(Self {
            places: places.into_values().collect(),
            total,
            masters,
            gradients: gradients.map(|(flat, stacked)| Gradients {
                flat,
                stacked,
                unpack,
            }),
            packed,
            pack,
            slab,
        })
    }

    /// Takes the factors out of the network's layers.
    pub fn detach(self, network: &mut Network) {
        for linear in network.linears_mut() {
            linear.factors = None;
        }
    }

    /// Device memory in use.
    pub fn num_bytes(&self) -> usize {
        self.slab.view().bytes()
    }

    /// Numbers in all tensors.
    pub fn num_parameters(&self) -> usize {
        self.total
    }

    /// Names (`<path>.lora_A.weight`, `<path>.lora_B.weight`) and places (first element, length) of all tensors in the
    /// flat layout.
    pub fn tensors(&self) -> Vec<(String, std::ops::Range<usize>)> {
        self.places
            .iter()
            .flat_map(|place| {
                [("A", &place.a), ("B", &place.b)].map(|(factor, range)| {
                    (
                        format!("{}.lora_{factor}.weight", place.path),
                        range.clone(),
                    )
                })
            })
            .collect()
    }

    /// The masters, `f32`, flat.
    pub fn masters(&self) -> View {
        self.masters.take(4 * self.total)
    }

    /// The gradients, `f32`, flat: valid after [`DeviceFactors::collect_gradients`].
    ///
    /// # Panics
    ///
    /// If the factors are not trained.
    pub fn gradients(&self) -> View {
        self.trained().flat.take(4 * self.total)
    }

    fn trained(&self) -> &Gradients {
        self.gradients.as_ref().expect("these factors are trained")
    }

    /// Forgets the gradients summed up so far.
    ///
    /// # Errors
    ///
    /// If the launch fails.
    ///
    /// # Panics
    ///
    /// If the factors are not trained.
    pub fn clear_gradients(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.fill(self.trained().stacked, 0)
    }

    /// Brings the gradients into the flat layout.
    ///
    /// # Errors
    ///
    /// If the launch fails.
    ///
    /// # Panics
    ///
    /// If the factors are not trained.
    pub fn collect_gradients(&self, stream: &Stream, t: Half) -> Result<(), CudaError> {
        let Gradients {
            flat,
            stacked,
            unpack,
        } = self.trained();
        lora::unpack(stream, t, *flat, *stacked, unpack)
    }

    /// Brings the masters into the products' layout.
    ///
    /// # Errors
    ///
    /// If the launch fails.
    pub fn pack(&self, stream: &Stream, t: Half) -> Result<(), CudaError> {
        lora::pack(stream, t, self.packed, self.masters, &self.pack)
    }

    /// Replaces the masters' values: all tensors one behind the other, as [`DeviceFactors::tensors`] lists them.
    ///
    /// # Errors
    ///
    /// If a copy or the launch fails.
    ///
    /// # Panics
    ///
    /// If the number of values is another.
    pub fn upload(&self, stream: &Stream, t: Half, values: &[f32]) -> Result<(), CudaError> {
        assert_eq!(values.len(), self.total, "values of all factors");
        stream.upload(self.masters(), values)?;
        self.pack(stream, t)
    }

    /// The masters on the host.
    ///
    /// # Errors
    ///
    /// If the copy fails.
    pub fn download(&self, stream: &Stream) -> Result<Vec<LoraFactors>, CudaError> {
        let values = stream.download::<f32>(self.masters, self.total)?;
        Ok(self
            .places
            .iter()
            .map(|place| LoraFactors {
                path: place.path.clone(),
                rank: place.rank,
                scale: place.scale,
                a: values[place.a.clone()].to_vec(),
                b: values[place.b.clone()].to_vec(),
            })
            .collect())
    }
}

/// Where every fused product's factors lie, and the rectangles that lead there and back.
#[allow(clippy::type_complexity)] // two lists that are made together
fn stack(
    network: &mut Network,
    by_path: &BTreeMap<&str, &LoraFactors>,
    places: &BTreeMap<&str, Place>,
    trained: bool,
) -> Result<(Vec<Stack>, Vec<Rectangle>, Vec<Rectangle>), CudaError> {
    let mut missing: std::collections::BTreeSet<&str> = by_path.keys().copied().collect();
    let (mut stacks, mut pack, mut unpack) = (Vec::new(), Vec::new(), Vec::new());
    let mut start = 0;
    for (index, linear) in network.linears_mut().into_iter().enumerate() {
        let parts: Vec<_> = linear
            .parts
            .iter()
            .filter_map(|part| Some((part, *by_path.get(part.path.as_str())?)))
            .collect();
        let (Some((first, _)), Some((last, _))) = (parts.first(), parts.last()) else {
            continue;
        };
        let in_features = linear.in_features;
        let sum: usize = parts.iter().map(|(_, f)| f.rank).sum();
        let stack = Stack {
            linear: index,
            rank: sum.next_multiple_of(RANK_MULTIPLE),
            first_row: first.row,
            num_rows: last.row + last.rows - first.row,
            in_features,
            start,
        };
        start = (start + stack.len()).next_multiple_of(ELEMENT_ALIGNMENT);
        let mut column = 0;
        for (part, f) in &parts {
            missing.remove(part.path.as_str());
            if f.a.len() != f.rank * in_features || f.b.len() != part.rows * f.rank {
                return Err(ModelError::Misshapen {
                    path: part.path.clone(),
                    a: f.a.len(),
                    b: f.b.len(),
                    rank: f.rank,
                    in_features,
                    out_features: part.rows,
                }
                .into());
            }
            let place = &places[part.path.as_str()];
            let a = Rectangle {
                source: place.a.start as i64,
                target: (stack.start + column * in_features) as i64,
                rows: f.rank as i32,
                columns: in_features as i32,
                source_stride: in_features as i32,
                target_stride: in_features as i32,
                scale: 1.0,
                padding: 0,
            };
            let b_start = stack.start + stack.a_len();
            let b = Rectangle {
                source: place.b.start as i64,
                target: (b_start + (part.row - stack.first_row) * stack.rank + column) as i64,
                rows: part.rows as i32,
                columns: f.rank as i32,
                source_stride: f.rank as i32,
                target_stride: stack.rank as i32,
                scale: f.scale,
                padding: 0,
            };
            for rectangle in [a, b] {
                pack.push(rectangle);
                if trained {
                    unpack.push(reversed(rectangle));
                }
            }
            column += f.rank;
        }
        stacks.push(stack);
    }
    match missing.first() {
        Some(path) => Err(ModelError::NoSuchLayer {
            path: (*path).to_owned(),
        }
        .into()),
        None => Ok((stacks, pack, unpack)),
    }
}

/// The way back. The strength applies again: the stacked B holds `scale·B`, so `∂B = scale·∂(scale·B)`.
fn reversed(r: Rectangle) -> Rectangle {
    Rectangle {
        source: r.target,
        target: r.source,
        source_stride: r.target_stride,
        target_stride: r.source_stride,
        ..r
    }
}
