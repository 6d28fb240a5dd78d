// Layer norm with modulation, alone and with the gated residual before it, and the gradient of the former.
//
//     x' = x + gate·y          n = (x' − μ)/σ          out = n·(1 + scale) + shift
//
// One block per token; the row stays in registers between the passes over it (up to CACHED vectors a thread, which is
// 4096 channels; the rest is read again). Going back, with g = dout·(1 + scale):
//
//     dx = (g − mean(g) − n·mean(g·n))/σ
//
// Modulation vectors are f32, rows of `mod_stride` elements, one row per sample of `tokens` tokens; they need no gradient.

#include "common.cuh"

#define NORM_THREADS 128
#define CACHED 4

// Calls `f(vector index, its bits)` for every vector of the row that is this thread's.
template <typename F>
static __device__ __forceinline__ void each_vector(const uint4 (&cache)[CACHED], const T* row, int vectors, F f) {
#pragma unroll
    for (int k = 0; k < CACHED; ++k) {
        const int i = threadIdx.x + k * NORM_THREADS;
        if (i < vectors) f(i, cache[k]);
    }
    for (int i = threadIdx.x + CACHED * NORM_THREADS; i < vectors; i += NORM_THREADS) f(i, load_bits(row, i));
}

static __device__ __forceinline__ void fill(uint4 (&cache)[CACHED], const T* row, int vectors) {
#pragma unroll
    for (int k = 0; k < CACHED; ++k) {
        const int i = threadIdx.x + k * NORM_THREADS;
        cache[k] = i < vectors ? load_bits(row, i) : make_uint4(0, 0, 0, 0);
    }
}

// Mean and 1/√(variance + eps) of a row.
static __device__ __forceinline__ float2 row_stats(const uint4 (&cache)[CACHED], const T* row, int d, float eps,
                                                   float* scratch) {
    const int vectors = d / 8;
    float sum = 0.0f;
    each_vector(cache, row, vectors, [&](int, uint4 bits) {
        const Vec8 e = unpack8(bits);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += e.v[j];
    });
    const float mean = block_sum<NORM_THREADS>(sum, scratch) / (float)d;
    float squares = 0.0f;
    each_vector(cache, row, vectors, [&](int, uint4 bits) {
        const Vec8 e = unpack8(bits);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float centred = e.v[j] - mean;
            squares = fmaf(centred, centred, squares);
        }
    });
    const float variance = block_sum<NORM_THREADS>(squares, scratch + NORM_THREADS / WARP) / (float)d;
    return make_float2(mean, 1.0f / sqrtf(variance + eps));
}

static __device__ __forceinline__ void modulate(T* out, const uint4 (&cache)[CACHED], const T* row,
                                                const float* shift, const float* scale, float2 stats, int vectors) {
    each_vector(cache, row, vectors, [&](int i, uint4 bits) {
        Vec8 e = unpack8(bits);
        const Vec8 s = load8_f32(scale, i), t = load8_f32(shift, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) e.v[j] = fmaf((e.v[j] - stats.x) * stats.y, 1.0f + s.v[j], t.v[j]);
        store8(out, i, e);
    });
}

// Grid: rows. `stats` may be null.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    ln_modulate(T* out, float2* stats, const T* x, const float* shift, const float* scale, int mod_stride, int rows,
                int tokens, int d, float eps) {
    __shared__ float scratch[2 * NORM_THREADS / WARP];
    const long long row = blockIdx.x, sample = blockIdx.x / tokens;
    uint4 cache[CACHED];
    fill(cache, x + row * d, d / 8);
    const float2 s = row_stats(cache, x + row * d, d, eps, scratch);
    if (stats && threadIdx.x == 0) stats[row] = s;
    modulate(out + row * d, cache, x + row * d, shift + sample * mod_stride, scale + sample * mod_stride, s, d / 8);
}

// Grid: rows. Writes x' = residual + gate·y (clipped to what f16 holds if `clip`), then its modulated norm. The norm
// sees x' as stored, so that this equals gate_residual followed by ln_modulate.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    gate_residual_ln_modulate(T* x_out, T* out, float2* stats, const T* residual, const float* gate, const T* y,
                              const float* shift, const float* scale, int mod_stride, int rows, int tokens, int d, float eps,
                              int clip) {
    __shared__ float scratch[2 * NORM_THREADS / WARP];
    const long long row = blockIdx.x, sample = blockIdx.x / tokens;
    const int vectors = d / 8;
    T* x_row = x_out + row * d;
    const auto updated = [&](int i) {
        Vec8 e = load8(residual + row * d, i);
        const Vec8 g = load8_f32(gate + sample * mod_stride, i), u = load8(y + row * d, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            e.v[j] = fmaf(g.v[j], u.v[j], e.v[j]);
            if (clip) e.v[j] = fminf(fmaxf(e.v[j], -65504.0f), 65504.0f);
        }
        const uint4 bits = pack8(e);
        store_bits(x_row, i, bits);
        return bits;
    };
    uint4 cache[CACHED];
#pragma unroll
    for (int k = 0; k < CACHED; ++k) {
        const int i = threadIdx.x + k * NORM_THREADS;
        cache[k] = i < vectors ? updated(i) : make_uint4(0, 0, 0, 0);
    }
    // What is not cached is read again by the thread that wrote it.
    for (int i = threadIdx.x + CACHED * NORM_THREADS; i < vectors; i += NORM_THREADS) updated(i);
    const float2 s = row_stats(cache, x_row, d, eps, scratch);
    if (stats && threadIdx.x == 0) stats[row] = s;
    modulate(out + row * d, cache, x_row, shift + sample * mod_stride, scale + sample * mod_stride, s, vectors);
}

// Grid: rows. dx (+)= the gradient of ln_modulate. `stats` may be null.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    ln_modulate_backward(T* dx, const T* dy, const T* x, const float2* stats, const float* scale, int mod_stride,
                         int rows, int tokens, int d, float eps, int accumulate) {
    __shared__ float scratch[4 * NORM_THREADS / WARP];
    const long long row = blockIdx.x, sample = blockIdx.x / tokens;
    const int vectors = d / 8;
    x += row * d, dy += row * d, dx += row * d, scale += sample * mod_stride;
    uint4 x_cache[CACHED], dy_cache[CACHED];
    fill(x_cache, x, vectors);
    fill(dy_cache, dy, vectors);
    const float2 s = stats ? stats[row] : row_stats(x_cache, x, d, eps, scratch);

    float sum = 0.0f, product = 0.0f;
    const auto add = [&](int i, uint4 x_bits, uint4 dy_bits) {
        const Vec8 e = unpack8(x_bits), g = unpack8(dy_bits), c = load8_f32(scale, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float dn = g.v[j] * (1.0f + c.v[j]);
            sum += dn;
            product = fmaf(dn, (e.v[j] - s.x) * s.y, product);
        }
    };
#pragma unroll
    for (int k = 0; k < CACHED; ++k) {
        const int i = threadIdx.x + k * NORM_THREADS;
        if (i < vectors) add(i, x_cache[k], dy_cache[k]);
    }
    for (int i = threadIdx.x + CACHED * NORM_THREADS; i < vectors; i += NORM_THREADS)
        add(i, load_bits(x, i), load_bits(dy, i));
    const float mean = block_sum<NORM_THREADS>(sum, scratch + 2 * NORM_THREADS / WARP) / (float)d;
    const float mean_product = block_sum<NORM_THREADS>(product, scratch + 3 * NORM_THREADS / WARP) / (float)d;

    const auto write = [&](int i, uint4 x_bits, uint4 dy_bits) {
        const Vec8 e = unpack8(x_bits), g = unpack8(dy_bits), c = load8_f32(scale, i);
        Vec8 out;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float n = (e.v[j] - s.x) * s.y;
            out.v[j] = s.y * (g.v[j] * (1.0f + c.v[j]) - mean - n * mean_product);
        }
        if (accumulate) {
            const Vec8 before = load8(dx, i);
#pragma unroll
            for (int j = 0; j < 8; ++j) out.v[j] += before.v[j];
        }
        store8(dx, i, out);
    };
#pragma unroll
    for (int k = 0; k < CACHED; ++k) {
        const int i = threadIdx.x + k * NORM_THREADS;
        if (i < vectors) write(i, x_cache[k], dy_cache[k]);
    }
    for (int i = threadIdx.x + CACHED * NORM_THREADS; i < vectors; i += NORM_THREADS)
        write(i, load_bits(x, i), load_bits(dy, i));
}
