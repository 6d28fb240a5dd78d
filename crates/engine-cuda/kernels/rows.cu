// Narrow rows: norm and gate for activations of up to 1024 channels, of which one warp (norm) or one thread a vector
// (gate) is enough. The forms of norm.cu and elementwise.cu give a block to every row.

#include "common.cuh"

#define ROWS_THREADS 256
#define ROWS_WARPS (ROWS_THREADS / WARP)

// out = (x − μ)/σ·(1 + scale) + shift, and (μ, 1/σ) to stats. One warp per row of up to 256·V channels.
template <int V>
static __device__ __forceinline__ void norm_row(T* out, float2* stats, const T* x, const float* shift,
                                                const float* scale, int mod_stride, int rows, int tokens, int d,
                                                float eps) {
    const int lane = threadIdx.x % WARP, vectors = d / 8;
    const int row = blockIdx.x * ROWS_WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const long long at = (long long)row * d, mod = (long long)(row / tokens) * mod_stride;
    Vec8 e[V];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) {
        const int i = lane + k * WARP;
        e[k] = unpack8(i < vectors ? load_bits(x + at, i) : make_uint4(0, 0, 0, 0));
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += e[k].v[j];
    }
    const float mean = group_sum<WARP>(sum) / (float)d;
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) {
        if (lane + k * WARP >= vectors) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            e[k].v[j] -= mean;
            squares = fmaf(e[k].v[j], e[k].v[j], squares);
        }
    }
    const float inverse = 1.0f / sqrtf(group_sum<WARP>(squares) / (float)d + eps);
    if (lane == 0) stats[row] = make_float2(mean, inverse);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        const int i = lane + k * WARP;
        if (i >= vectors) continue;
        const Vec8 s = load8_f32(scale + mod, i), t = load8_f32(shift + mod, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) e[k].v[j] = fmaf(e[k].v[j] * inverse, 1.0f + s.v[j], t.v[j]);
        store8(out + at, i, e[k]);
    }
}

#define NORM_ROWS(V)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS)                                                         \
        norm_rows_##V(T* out, float2* stats, const T* x, const float* shift, const float* scale, int mod_stride,       \
                      int rows, int tokens, int d, float eps) {                                                        \
        norm_row<V>(out, stats, x, shift, scale, mod_stride, rows, tokens, d, eps);                                    \
    }
NORM_ROWS(1)
NORM_ROWS(2)
NORM_ROWS(4)

// out = residual + gate·y, clipped to what f16 holds if `clip`. One thread for eight channels.
extern "C" __global__ void __launch_bounds__(ROWS_THREADS)
    gate_rows(T* out, const T* residual, const float* gate, int mod_stride, const T* y, int rows, int tokens, int d,
              int clip) {
    const int i = blockIdx.x * ROWS_THREADS + threadIdx.x, vectors = d / 8;
    if (i >= rows * vectors) return;
    const int row = i / vectors;
    Vec8 e = load8(residual, i);
    const Vec8 g = load8_f32(gate + (long long)(row / tokens) * mod_stride, i - row * vectors), u = load8(y, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        e.v[j] = fmaf(g.v[j], u.v[j], e.v[j]);
        if (clip) e.v[j] = fminf(fmaxf(e.v[j], -65504.0f), 65504.0f);
    }
    store8(out, i, e);
}
