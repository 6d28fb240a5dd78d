//! Attention over text and image tokens together: from the products' rows to the joined sequence and back.

use crate::error::CudaError;
use crate::model::linear::Cx;
use crate::model::sizes::{Shape, Sizes};
use crate::ops::attention::{self, AttentionShape, Strided};
use crate::ops::attention_any;
use crate::ops::rope::{self, HeadShape};
use crate::stream::Work;
use crate::view::View;
use mmdit::config::NORM_EPSILON;

/// Cosines and sines of all positions, `f32 [tokens, dh]` each.
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// Cosines.
    pub cos: View,
    /// Sines.
    pub sin: View,
}

/// What attention needs besides its operands.
#[derive(Clone, Copy)]
pub struct Joint<'a> {
    /// Sizes of the model.
    pub sizes: &'a Sizes,
    /// Sizes of the batch.
    pub shape: Shape,
    /// Positions.
    pub rope: Rope,
}

/// Queries, keys and values, T `[b, tokens, d]` each.
pub type Qkv = [View; 3];

impl Joint<'_> {
    /// Memory for queries, keys and values.
    pub fn qkv(&self, cx: &Cx<'_>) -> Qkv {
        std::array::from_fn(|_| cx.half(self.shape.all_rows() * self.sizes.d))
    }

    /// `n` tokens of each sample from `offset` of the joined sequence, in rows of `stride` elements.
    fn heads(&self, n: usize, offset: usize, stride: usize) -> HeadShape {
        HeadShape {
            b: self.shape.b,
            n,
            n_total: self.shape.tokens(),
            token_offset: offset,
            h: self.sizes.h,
            dh: self.sizes.dh,
            in_stride: stride,
            out_stride: self.sizes.d,
        }
    }

    /// The part of a double block's stream (0 is text) in the joined sequence.
    pub fn stream(&self, stream: usize) -> HeadShape {
        let Shape { text, .. } = self.shape;
        let (n, offset) = [(text, 0), (self.shape.image(), text)][stream];
        self.heads(n, offset, 3 * self.sizes.d)
    }

    /// The whole sequence, in rows of `stride` elements.
    pub fn whole(&self, stride: usize) -> HeadShape {
        self.heads(self.shape.tokens(), 0, stride)
    }

    /// Normalises and turns queries and keys, copies values.
    pub fn split(
        &self,
        cx: &Cx<'_>,
        [q, k, v]: Qkv,
        input: View,
        [wq, wk]: [View; 2],
        shape: HeadShape,
    ) -> Result<(), CudaError> {
        let Rope { cos, sin } = self.rope;
        let epsilon = NORM_EPSILON as f32;
        rope::qk_norm_rope(
            cx.stream, cx.t, q, k, v, input, wq, wk, cos, sin, shape, epsilon,
        )
    }

    /// Gradient of [`Joint::split`]'s input, and of the norms' weights and the input's bias where there is a place for
    /// them.
    #[allow(clippy::too_many_arguments)] // a kernel's
    pub fn split_backward(
        &self,
        cx: &Cx<'_>,
        dinput: View,
        [dq, dk, dv]: Qkv,
        input: View,
        [wq, wk]: [View; 2],
        gradients: Option<([View; 2], View)>,
        shape: HeadShape,
    ) -> Result<(), CudaError> {
        let Rope { cos, sin } = self.rope;
        let epsilon = NORM_EPSILON as f32;
        if let Some((norm_gradients, bias)) = gradients {
            let mark = cx.arena.mark();
            let partials = cx.f32(rope::sums_len(&shape));
            rope::qk_norm_rope_backward_sums(
                cx.stream,
                cx.t,
                dinput,
                norm_gradients,
                bias,
                [dq, dk, dv],
                input,
                [wq, wk],
                cos,
                sin,
                partials,
                shape,
                epsilon,
            )?;
            cx.arena.release(mark);
            return Ok(());
        }
        rope::qk_norm_rope_backward(
            cx.stream, cx.t, dinput, dq, dk, dv, input, wq, wk, cos, sin, shape, epsilon,
        )
    }

    fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            b: self.shape.b,
            h: self.sizes.h,
            n: self.shape.tokens(),
            dh: self.sizes.dh,
            scale: (self.sizes.dh as f32).sqrt().recip(),
        }
    }

    fn strided(&self, view: View, token: usize) -> Strided {
        Strided {
            view,
            token,
            head: self.sizes.dh,
            batch: self.shape.tokens() * token,
        }
    }

    fn flops(&self, products: f64) -> f64 {
        let AttentionShape { b, h, n, dh, .. } = self.attention_shape();
        products * 2.0 * (b * h) as f64 * (n as f64).powi(2) * dh as f64
    }

    /// `o` (rows `o_stride` elements apart) from queries, keys and values.
    pub fn attend(
        &self,
        cx: &Cx<'_>,
        o: View,
        o_stride: usize,
        sums: View,
        qkv: Qkv,
    ) -> Result<(), CudaError> {
        let [q, k, v] = qkv.map(|x| self.strided(x, self.sizes.d));
        let o = self.strided(o, o_stride);
        let shape = self.attention_shape();
        cx.stream.count_flops(Work::Attention, self.flops(2.0));
        if attention::supports(self.sizes.dh) {
            attention::forward(cx.stream, cx.t, o, sums, q, k, v, shape)
        } else {
            attention_any::forward(cx.stream, cx.t, o, sums, q, k, v, shape)
        }
    }

    /// Gradients of queries, keys and values from that of the output (rows `do_stride` elements apart).
    pub fn attend_backward(
        &self,
        cx: &Cx<'_>,
        gradients: Qkv,
        (d_o, do_stride): (View, usize),
        (o, o_stride): (View, usize),
        sums: View,
        qkv: Qkv,
    ) -> Result<(), CudaError> {
        let [q, k, v] = qkv.map(|x| self.strided(x, self.sizes.d));
        let [dq, dk, dv] = gradients.map(|x| self.strided(x, self.sizes.d));
        let (d_o, o) = (self.strided(d_o, do_stride), self.strided(o, o_stride));
        let shape = self.attention_shape();
        cx.stream.count_flops(Work::Attention, self.flops(5.0));
        let mark = cx.arena.mark();
        let (s, t) = (cx.stream, cx.t);
        if attention::supports(self.sizes.dh) {
            let scratch = cx.arena.take(attention::backward_scratch_bytes(&shape));
            attention::backward(s, t, dq, dk, dv, d_o, o, sums, q, k, v, scratch, shape)?;
        } else {
            let scratch = cx.arena.take(attention_any::backward_scratch_bytes(&shape));
            attention_any::backward(s, t, dq, dk, dv, d_o, o, sums, q, k, v, scratch, shape)?;
        }
        cx.arena.release(mark);
        Ok(())
    }

    /// One stream's rows of a joined tensor, T `[b, tokens, d]`, as rows without gaps: a view where there is one
    /// sample, a copy otherwise.
    pub fn part(&self, cx: &Cx<'_>, joined: View, stream: usize) -> Result<View, CudaError> {
        let room = self.room(cx, joined, stream);
        self.fetch(cx, room, joined, stream)?;
        Ok(room)
    }

    /// As [`Joint::part`], but always a copy, into `room`.
    pub fn fetch_into(
        &self,
        cx: &Cx<'_>,
        room: View,
        joined: View,
        stream: usize,
    ) -> Result<View, CudaError> {
        let (joined, stride, width) = self.rectangle(joined, stream);
        cx.stream
            .copy_rows(room, width, joined, stride, width, self.shape.b)?;
        Ok(room)
    }

    /// Samples, tokens of a sample in a stream, width.
    pub fn samples(&self, stream: usize) -> [usize; 3] {
        let b = self.shape.b;
        [b, self.shape.rows(stream) / b, self.sizes.d]
    }

    /// Memory whose content [`Joint::put`] places into a joined tensor: that tensor's own where there is one sample.
    pub fn room(&self, cx: &Cx<'_>, joined: View, stream: usize) -> View {
        let rows = self.shape.rows(stream);
        if self.shape.b == 1 {
            let row = 2 * self.sizes.d;
            let offset = [0, self.shape.text][stream] * row;
            joined.skip(offset).take(rows * row)
        } else {
            cx.half(rows * self.sizes.d)
        }
    }

    /// Places what lies in [`Joint::room`] into the joined tensor.
    pub fn put(
        &self,
        cx: &Cx<'_>,
        joined: View,
        room: View,
        stream: usize,
    ) -> Result<(), CudaError> {
        if self.shape.b == 1 {
            return Ok(());
        }
        let (joined, stride, width) = self.rectangle(joined, stream);
        cx.stream
            .copy_rows(joined, stride, room, width, width, self.shape.b)
    }

    /// Fetches one stream's rows of the joined tensor into [`Joint::room`].
    pub fn fetch(
        &self,
        cx: &Cx<'_>,
        room: View,
        joined: View,
        stream: usize,
    ) -> Result<(), CudaError> {
        if self.shape.b == 1 {
            return Ok(());
        }
        let (joined, stride, width) = self.rectangle(joined, stream);
        cx.stream
            .copy_rows(room, width, joined, stride, width, self.shape.b)
    }

    /// Where a stream lies in a joined tensor: its first byte, bytes from one sample to the next, bytes of a sample.
    pub fn rectangle(&self, joined: View, stream: usize) -> (View, usize, usize) {
        let row = 2 * self.sizes.d;
        let width = self.shape.rows(stream) / self.shape.b * row;
        let offset = [0, self.shape.text][stream] * row;
        (joined.skip(offset), self.shape.tokens() * row, width)
    }
}
