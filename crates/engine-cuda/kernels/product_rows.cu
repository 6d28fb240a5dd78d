// Rows in f32 times weights of T or NF4: out = x·Wᵀ + bias in f32, stored or added to what is there. For the few rows that
// condition a network, one for each sample: what all tokens share is not rounded on its way to them.
//
// With a few rows all time goes to reading the weights; NF4 is dequantised on the way, half a byte a weight where
// dequantising to memory first costs five. Weights are rounded to T as nf4_dequantise does, sums are f32. A lane takes
// eight neighbouring weights at a time, a warp OUTPUTS rows of W; the order of a sum depends on k alone.

#include "common.cuh"

#define PRODUCT_THREADS 256
#define OUTPUTS 2

// Grid: chunks of ROWS rows, and n / (OUTPUTS·warps of a block), rounded up: blocks that read the same weights follow
// each other. x: [rows, k]; W: [n, k], k a multiple of 8; rows of `out` are out_stride elements apart. `weights(i)` gives
// the i-th eight of W.
template <int ROWS, typename Weights>
static __device__ __forceinline__ void product(float* out, const float* x, const T* bias, int rows, int n, int k,
                                               int out_stride, int accumulate, Weights weights) {
    const int warp = (blockIdx.y * PRODUCT_THREADS + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    const int first = warp * OUTPUTS, vectors = k / 8, first_row = blockIdx.x * ROWS;
    if (first >= n) return; // a whole warp
    long long start[OUTPUTS], row[ROWS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) start[o] = (long long)min(first + o, n - 1) * vectors;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) row[r] = (long long)min(first_row + r, rows - 1) * vectors;
    float sums[OUTPUTS][ROWS] = {};
#pragma unroll 4
    for (int i = lane; i < vectors; i += WARP) {
        Vec8 w[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) w[o] = weights(start[o] + i);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Vec8 e = load8_f32(x, row[r] + i);
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o)
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[o][r] = fmaf(w[o].v[j], e.v[j], sums[o][r]);
        }
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float sum = group_sum<WARP>(sums[o][r]);
            if (lane == 0 && first + o < n && first_row + r < rows) {
                float* to = out + (long long)(first_row + r) * out_stride + first + o;
                const float value = sum + to_f32(bias[first + o]);
                *to = accumulate ? *to + value : value;
            }
        }
    }
}

// Eight weights from their codes.
static __device__ __forceinline__ Vec8 nf4_weights(const float* values, unsigned word, float scale) {
    Vec8 e;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const unsigned byte = word >> (8 * pair);
        const float2 w =
            unpack2(pack2(__fmul_rn(values[byte >> 4 & 15u], scale), __fmul_rn(values[byte & 15u], scale)));
        e.v[2 * pair] = w.x, e.v[2 * pair + 1] = w.y;
    }
    return e;
}

#define PRODUCTS(ROWS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)                                                      \
        product_rows_half_##ROWS(float* out, const float* x, const T* bias, int rows, int n, int k, int out_stride,    \
                                 int accumulate, const T* w) {                                                         \
        product<ROWS>(out, x, bias, rows, n, k, out_stride, accumulate, [&](long long i) { return load8(w, i); });     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)                                                      \
        product_rows_nf4_##ROWS(float* out, const float* x, const T* bias, int rows, int n, int k, int out_stride,     \
                                int accumulate, const unsigned* words, const float* absmax) {                          \
        __shared__ float values[16];                                                                                   \
        if (threadIdx.x < 16) values[threadIdx.x] = NF4_VALUES[threadIdx.x];                                           \
        __syncthreads();                                                                                               \
        product<ROWS>(out, x, bias, rows, n, k, out_stride, accumulate,                                                \
                      [&](long long i) { return nf4_weights(values, words[i], absmax[i / 8]); });                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)                                                      \
        product_rows_double_##ROWS(float* out, const float* x, const T* bias, int rows, int n, int k, int out_stride,  \
                                   int accumulate, const unsigned* words, const unsigned char* codes,                  \
                                   const float* nested_absmax, const float* offset) {                                  \
        __shared__ float map[256], values[16];                                                                         \
        map[threadIdx.x] = SIGNED_MAP[threadIdx.x];                                                                    \
        if (threadIdx.x < 16) values[threadIdx.x] = NF4_VALUES[threadIdx.x];                                           \
        __syncthreads();                                                                                               \
        const float mean = *offset;                                                                                    \
        product<ROWS>(out, x, bias, rows, n, k, out_stride, accumulate, [&](long long i) {                             \
            return nf4_weights(values, words[i], nf4_double_scale(map, codes, nested_absmax, mean, i / 8));            \
        });                                                                                                            \
    }

PRODUCTS(1)
PRODUCTS(2)
PRODUCTS(4)
PRODUCTS(8)

// The same for any k, a weight at a time. Grid: rows, and n / warps of a block, rounded up.
extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)
    product_rows_any(float* out, const float* x, const T* bias, int rows, int n, int k, int out_stride, int accumulate,
                     const T* w) {
    const int column = (blockIdx.y * PRODUCT_THREADS + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (column >= n) return; // a whole warp
    const long long row = blockIdx.x;
    float sum = 0.0f;
    for (int i = lane; i < k; i += WARP) sum = fmaf(to_f32(w[(long long)column * k + i]), x[row * k + i], sum);
    sum = group_sum<WARP>(sum);
    if (lane > 0) return;
    float* to = out + row * out_stride + column;
    const float value = sum + to_f32(bias[column]);
    *to = accumulate ? *to + value : value;
}
