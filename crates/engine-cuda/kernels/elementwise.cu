// Passes over whole activations: gate and residual, GELU, SiLU, conversions, sinusoids of times, normal numbers.
//
// Kernels over rows take a grid of (rows, column chunks of COLUMN_CHUNK); flat kernels a grid of chunks of FLAT_CHUNK.

#include "common.cuh"

// Threads of a block, and vectors of eight that each handles: 192 · 2 · 8 = 3072 columns.
#define ROW_THREADS 192
#define ROW_VECTORS 2
#define COLUMN_CHUNK (ROW_THREADS * ROW_VECTORS * 8)

#define FLAT_THREADS 256
#define FLAT_VECTORS 2
#define FLAT_CHUNK (FLAT_THREADS * FLAT_VECTORS * 8)

// Calls `f(vector index within the row)` for this thread's vectors.
template <typename F>
static __device__ __forceinline__ void each_column_vector(int columns, F f) {
#pragma unroll
    for (int k = 0; k < ROW_VECTORS; ++k) {
        const int i = (blockIdx.y * ROW_VECTORS + k) * ROW_THREADS + threadIdx.x;
        if (i < columns / 8) f(i);
    }
}

// out = residual + gate·y, clipped to what f16 holds if `clip`. `out` may be `residual`.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    gate_residual(T* out, const T* residual, const float* gate, int mod_stride, const T* y, int tokens, int d,
                  int clip) {
    const long long row = (long long)blockIdx.x * d, mod = (long long)(blockIdx.x / tokens) * mod_stride;
    each_column_vector(d, [&](int i) {
        Vec8 e = load8(residual + row, i);
        const Vec8 g = load8_f32(gate + mod, i), u = load8(y + row, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            e.v[j] = fmaf(g.v[j], u.v[j], e.v[j]);
            if (clip) e.v[j] = fminf(fmaxf(e.v[j], -65504.0f), 65504.0f);
        }
        store8(out + row, i, e);
    });
}

// dy = gate·dout.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    gate_backward(T* dy, const T* dout, const float* gate, int mod_stride, int tokens, int d) {
    const long long row = (long long)blockIdx.x * d, mod = (long long)(blockIdx.x / tokens) * mod_stride;
    each_column_vector(d, [&](int i) {
        Vec8 e = load8(dout + row, i);
        const Vec8 g = load8_f32(gate + mod, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) e.v[j] *= g.v[j];
        store8(dy + row, i, e);
    });
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    gelu_tanh(T* out, const T* in, int columns, int out_stride, int in_stride) {
    const long long row = blockIdx.x;
    each_column_vector(columns, [&](int i) {
        Vec8 e = load8(in + row * in_stride, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) e.v[j] = gelu(e.v[j]);
        store8(out + row * out_stride, i, e);
    });
}

// dx = dy·gelu′(x). `dx` may be `dy`.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    gelu_tanh_backward(T* dx, const T* dy, const T* x, int columns, int dx_stride, int dy_stride, int x_stride) {
    const long long row = blockIdx.x;
    each_column_vector(columns, [&](int i) {
        Vec8 g = load8(dy + row * dy_stride, i);
        const Vec8 e = load8(x + row * x_stride, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) g.v[j] *= gelu_slope(e.v[j]);
        store8(dx + row * dx_stride, i, g);
    });
}

// Calls `vector(index)` for this thread's full vectors of eight, and `scalar(element)` for the rest at the end.
template <typename V, typename S>
static __device__ __forceinline__ void each_flat(long long n, V vector, S scalar) {
#pragma unroll
    for (int k = 0; k < FLAT_VECTORS; ++k) {
        const long long i = ((long long)blockIdx.x * FLAT_VECTORS + k) * FLAT_THREADS + threadIdx.x;
        if (i < n / 8) vector(i);
    }
    if (blockIdx.x == 0 && threadIdx.x < n % 8) scalar(n - n % 8 + threadIdx.x);
}

// out = x/(1 + e⁻ˣ) in f32, and both rounded to T for the way back. `out` may be `in`.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    silu(float* out, T* out_half, T* in_half, const float* in, long long n) {
    const auto f = [](float x) { return x / (1.0f + expf(-x)); };
    each_flat(
        n,
        [&](long long i) {
            Vec8 e = load8_f32(in, i);
            store8(in_half, i, e);
#pragma unroll
            for (int j = 0; j < 8; ++j) e.v[j] = f(e.v[j]);
            store8(out_half, i, e);
            store8_f32(out, i, e);
        },
        [&](long long i) {
            const float x = in[i], y = f(x);
            in_half[i] = from_f32(x), out_half[i] = from_f32(y), out[i] = y;
        });
}

// dx = dy·silu′(x). `dx` may be `dy`.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS) silu_backward(T* dx, const T* dy, const T* x, long long n) {
    const auto f = [](float g, float e) {
        const float s = 1.0f / (1.0f + expf(-e));
        return g * s * fmaf(e, 1.0f - s, 1.0f);
    };
    each_flat(
        n,
        [&](long long i) {
            Vec8 g = load8(dy, i);
            const Vec8 e = load8(x, i);
#pragma unroll
            for (int j = 0; j < 8; ++j) g.v[j] = f(g.v[j], e.v[j]);
            store8(dx, i, g);
        },
        [&](long long i) { dx[i] = from_f32(f(to_f32(dy[i]), to_f32(x[i]))); });
}

extern "C" __global__ void __launch_bounds__(FLAT_THREADS) cast_to_half(T* out, const float* in, long long n) {
    each_flat(
        n, [&](long long i) { store8(out, i, load8_f32(in, i)); }, [&](long long i) { out[i] = from_f32(in[i]); });
}

extern "C" __global__ void __launch_bounds__(FLAT_THREADS) cast_to_f32(float* out, const T* in, long long n) {
    each_flat(
        n, [&](long long i) { store8_f32(out, i, load8(in, i)); }, [&](long long i) { out[i] = to_f32(in[i]); });
}

// 128 cosines and then 128 sines of time·10⁴^(−i/128): [rows, 256]. Grid: rows, block: 128. The frequency is rounded as
// mmdit's `sinusoids` rounds it; in f32 its last bit moves the angle of a time of 1000 by 1e-4. Written in f32 and in T.
extern "C" __global__ void __launch_bounds__(128) sinusoids(float* out, T* out_half, const float* times) {
    const int i = threadIdx.x;
    const float exponent = __fmul_rn(-9.2103403719761836f, (float)i) / 128.0f; // ln 10⁴
    const float angle = __fmul_rn(times[blockIdx.x], (float)exp((double)exponent));
    const int at = blockIdx.x * 256 + i;
    const float c = cosf(angle), s = sinf(angle);
    out[at] = c, out[at + 128] = s;
    out_half[at] = from_f32(c), out_half[at + 128] = from_f32(s);
}

static __device__ __forceinline__ unsigned long long mix(unsigned long long z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Normal numbers that depend on seed and position alone: SplitMix64 and Box–Muller, a pair of numbers per draw.
// For weights of benchmarks. Grid: chunks of FLAT_CHUNK.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    fill_normal(T* out, long long n, unsigned long long seed, float deviation) {
    const auto pair = [&](long long index) {
        const unsigned long long bits = mix(mix(seed) + 0x9e3779b97f4a7c15ull * (unsigned long long)(index + 1));
        const float u = ((float)(bits >> 40) + 0.5f) * 0x1p-24f, turn = (float)(bits & 0xffffffull) * 0x1p-23f;
        const float radius = deviation * sqrtf(-2.0f * __logf(u));
        float s, c;
        sincospif(turn, &s, &c);
        return make_float2(radius * c, radius * s);
    };
    each_flat(
        n,
        [&](long long i) {
            Vec8 e;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 numbers = pair(4 * i + j);
                e.v[2 * j] = numbers.x, e.v[2 * j + 1] = numbers.y;
            }
            store8(out, i, e);
        },
        [&](long long i) {
            const float2 numbers = pair(i / 2);
            out[i] = from_f32(i % 2 ? numbers.y : numbers.x);
        });
}
