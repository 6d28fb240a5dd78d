// Sums over rows, for the gradients of biases and of modulation vectors; see crates/engine-cuda/src/ops/sums.rs.
//
//     columns:  Σ x          norms:  Σ dy  and  Σ dy·(x − μ)/σ
//
// Where a pass over the same rows is due anyway (gate, GELU, norm going back), the sums are taken in it.
//
// Rows are cut into segments (samples; one for a bias) and each of those into `splits` parts. A block sums one part of
// CHUNK columns, its warps taking rows in turn, and writes partials[segment][split][output][column]; `finish_sums_*`
// adds the parts up. Every order is fixed by the sizes.

#include "common.cuh"

#define SUM_THREADS 256
#define SUM_WARPS (SUM_THREADS / WARP)
#define CHUNK (WARP * 8)

// `term(row, vector index within the row, sums)` adds a row's values of eight columns. Grid: (segments·splits, chunks).
template <int OUTPUTS, typename F>
static __device__ __forceinline__ void partial_sums(float* partials, int rows, int columns, int splits, F term) {
    __shared__ __align__(16) float scratch[SUM_WARPS][OUTPUTS][CHUNK];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, vector = blockIdx.y * WARP + lane;
    const int segment = blockIdx.x / splits, split = blockIdx.x % splits;
    const long long first = (long long)segment * rows;
    const int begin = (int)((long long)rows * split / splits), end = (int)((long long)rows * (split + 1) / splits);
    Vec8 sums[OUTPUTS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[o].v[j] = 0.0f;
    if (vector * 8 < columns) {
#pragma unroll 4
        for (int row = begin + warp; row < end; row += SUM_WARPS) term(first + row, vector, sums);
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) store8_f32(scratch[warp][o], lane, sums[o]);
    __syncthreads();
    const int column = blockIdx.y * CHUNK + threadIdx.x;
    if (column >= columns) return;
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < SUM_WARPS; ++w) total += scratch[w][o][threadIdx.x];
        partials[((long long)blockIdx.x * OUTPUTS + o) * columns + column] = total;
    }
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    column_sums(float* partials, const T* x, int stride, int rows, int columns, int splits) {
    partial_sums<1>(partials, rows, columns, splits, [&](long long row, int vector, Vec8* sums) {
        const Vec8 e = load8(x + row * stride, vector);
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[0].v[j] += e.v[j];
    });
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    norm_sums(float* partials, const T* dy, const T* x, const float2* stats, int rows, int columns, int splits) {
    partial_sums<2>(partials, rows, columns, splits, [&](long long row, int vector, Vec8* sums) {
        const Vec8 g = load8(dy + row * columns, vector), e = load8(x + row * columns, vector);
        const float2 s = stats[row];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sums[0].v[j] += g.v[j];
            sums[1].v[j] = fmaf(g.v[j], (e.v[j] - s.x) * s.y, sums[1].v[j]);
        }
    });
}

// dy = gate·dout, and of every sample Σ dout·y and Σ dout: the gate's gradient, and what a bias behind it is made of.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    gate_backward_sums(float* partials, T* dy, const T* dout, const T* y, const float* gate, int mod_stride, int rows,
                       int columns, int splits) {
    const int column = blockIdx.y * WARP + threadIdx.x % WARP;
    Vec8 g;
    if (column * 8 < columns) g = load8_f32(gate + (long long)(blockIdx.x / splits) * mod_stride, column);
    partial_sums<2>(partials, rows, columns, splits, [&](long long row, int vector, Vec8* sums) {
        const Vec8 e = load8(dout + row * columns, vector), u = load8(y + row * columns, vector);
        Vec8 out;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sums[0].v[j] = fmaf(e.v[j], u.v[j], sums[0].v[j]);
            sums[1].v[j] += e.v[j];
            out.v[j] = g.v[j] * e.v[j];
        }
        store8(dy + row * columns, vector, out);
    });
}

// dx = dy·gelu′(x), and Σ dx. `dx` may be `dy`.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    gelu_backward_sums(float* partials, T* dx, const T* dy, const T* x, int dx_stride, int dy_stride, int x_stride,
                       int rows, int columns, int splits) {
    partial_sums<1>(partials, rows, columns, splits, [&](long long row, int vector, Vec8* sums) {
        Vec8 g = load8(dy + row * dy_stride, vector);
        const Vec8 e = load8(x + row * x_stride, vector);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            g.v[j] *= gelu_slope(e.v[j]);
            sums[0].v[j] += g.v[j];
        }
        store8(dx + row * dx_stride, vector, g);
    });
}

// The gradient of a modulated norm, stored in dx or added to it, and norm_sums in the same pass: one warp per row, V
// vectors a lane, so for d up to 256·V. Grid: segments·splits.
template <int V, int WARPS>
static __device__ __forceinline__ void norm_backward(float* partials, T* dx, const T* dy, const T* x,
                                                     const float2* stats, const float* scale, int mod_stride, int rows,
                                                     int d, int splits, int accumulate) {
    __shared__ __align__(16) float scratch[WARPS][2][V * CHUNK];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, vectors = d / 8;
    const int segment = blockIdx.x / splits, split = blockIdx.x % splits;
    const long long first = (long long)segment * rows;
    const int begin = (int)((long long)rows * split / splits), end = (int)((long long)rows * (split + 1) / splits);
    Vec8 factor[V], sums[2][V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
        const int i = lane + k * WARP;
        if (i < vectors) factor[k] = load8_f32(scale + (long long)segment * mod_stride, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            factor[k].v[j] = i < vectors ? 1.0f + factor[k].v[j] : 0.0f;
            sums[0][k].v[j] = sums[1][k].v[j] = 0.0f;
        }
    }
    for (int local = begin + warp; local < end; local += WARPS) {
        const long long row = first + local, at = row * d;
        const float2 s = stats[row];
        Vec8 g[V], n[V];
        uint4 before[V];
        float sum = 0.0f, product = 0.0f;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const int i = lane + k * WARP;
            const uint4 zero = make_uint4(0, 0, 0, 0);
            const bool here = i < vectors;
            g[k] = unpack8(here ? load_bits(dy + at, i) : zero);
            n[k] = unpack8(here ? load_bits(x + at, i) : zero);
            before[k] = here && accumulate ? load_bits(dx + at, i) : zero;
        }
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                n[k].v[j] = (n[k].v[j] - s.x) * s.y;
                sums[0][k].v[j] += g[k].v[j];
                sums[1][k].v[j] = fmaf(g[k].v[j], n[k].v[j], sums[1][k].v[j]);
                g[k].v[j] *= factor[k].v[j];
                sum += g[k].v[j];
                product = fmaf(g[k].v[j], n[k].v[j], product);
            }
        }
        const float mean = group_sum<WARP>(sum) / (float)d, mean_product = group_sum<WARP>(product) / (float)d;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const int i = lane + k * WARP;
            if (i >= vectors) continue;
            Vec8 out = unpack8(before[k]);
#pragma unroll
            for (int j = 0; j < 8; ++j) out.v[j] += s.y * (g[k].v[j] - mean - n[k].v[j] * mean_product);
            store8(dx + at, i, out);
        }
    }
#pragma unroll
    for (int k = 0; k < V; ++k)
#pragma unroll
        for (int o = 0; o < 2; ++o) store8_f32(scratch[warp][o], lane + k * WARP, sums[o][k]);
    __syncthreads();
    for (int column = threadIdx.x; column < d; column += WARPS * WARP)
#pragma unroll
        for (int o = 0; o < 2; ++o) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total += scratch[w][o][column];
            partials[((long long)blockIdx.x * 2 + o) * d + column] = total;
        }
}

#define NORM_BACKWARD(V, WARPS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP) norm_backward_sums_##V(                                  \
        float* partials, T* dx, const T* dy, const T* x, const float2* stats, const float* scale, int mod_stride,      \
        int accumulate, int rows, int d, int splits) {                                                                 \
        norm_backward<V, WARPS>(partials, dx, dy, x, stats, scale, mod_stride, rows, d, splits, accumulate);           \
    }
NORM_BACKWARD(1, 8)
NORM_BACKWARD(2, 8)
NORM_BACKWARD(4, 4)

#define FINISH_ROWS 32

// Adds up the splits of a segment. Block: 32 columns × FINISH_ROWS. Grid: (columns/32, segments, outputs wanted).
template <typename F>
static __device__ __forceinline__ void finish(const float* partials, int splits, int columns, int outputs, F store) {
    __shared__ float scratch[FINISH_ROWS][WARP + 1];
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    const int output = blockIdx.z;
    const long long first = (long long)blockIdx.y * splits;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 4
        for (int split = part; split < splits; split += FINISH_ROWS)
            sum += partials[((first + split) * outputs + output) * columns + column];
    }
    scratch[part][lane] = sum;
    __syncthreads();
    if (part > 0 || column >= columns) return;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < FINISH_ROWS; ++i) total += scratch[i][lane];
    store(output, (long long)blockIdx.y, column, total);
}

// Of two outputs each has its own place; rows of segments are `out_stride` elements apart.
extern "C" __global__ void __launch_bounds__(WARP* FINISH_ROWS)
    finish_sums_half(T* out_0, T* out_1, const float* partials, int splits, int columns, int outputs,
                     int out_stride) {
    finish(partials, splits, columns, outputs, [&](int output, long long segment, int column, float total) {
        (output ? out_1 : out_0)[segment * out_stride + column] = from_f32(total);
    });
}

extern "C" __global__ void __launch_bounds__(WARP* FINISH_ROWS)
    finish_sums_f32(float* out_0, float* out_1, const float* partials, int splits, int columns, int outputs,
                     int out_stride) {
    finish(partials, splits, columns, outputs, [&](int output, long long segment, int column, float total) {
        (output ? out_1 : out_0)[segment * out_stride + column] = total;
    });
}

// Σ over samples of gate·Σ dout, from the second outputs of gate_backward_sums. Block: 32 columns × FINISH_ROWS.
extern "C" __global__ void __launch_bounds__(WARP* FINISH_ROWS)
    finish_gated(float* out, const float* partials, const float* gate, int mod_stride, int segments, int splits,
                 int columns) {
    __shared__ float scratch[FINISH_ROWS][WARP + 1];
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 2
        for (int segment = part; segment < segments; segment += FINISH_ROWS) {
            float inner = 0.0f;
            for (int split = 0; split < splits; ++split)
                inner += partials[(((long long)segment * splits + split) * 2 + 1) * columns + column];
            sum = fmaf(gate[(long long)segment * mod_stride + column], inner, sum);
        }
    }
    scratch[part][lane] = sum;
    __syncthreads();
    if (part > 0 || column >= columns) return;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < FINISH_ROWS; ++i) total += scratch[i][lane];
    out[column] = total;
}
