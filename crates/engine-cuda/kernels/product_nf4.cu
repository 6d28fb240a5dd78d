// A few rows times NF4 weights that are dequantised on the way: out = x·Wᵀ + bias.
//
// With so few rows all time goes to reading the weights: half a byte each here, five bytes where they are dequantised to
// memory first. Weights are rounded to T as nf4_dequantise does and summed in f32, so that the two differ by the order
// of the sums alone. A lane takes eight neighbouring weights at a time, a warp OUTPUTS rows of W.

#include "common.cuh"

#define PRODUCT_THREADS 256
#define OUTPUTS 2

// Grid: n / (OUTPUTS·warps of a block), rounded up. x: [rows, k], rows ≤ ROWS; W: [n, k], k a multiple of 8; rows of
// `out` are out_stride elements apart. `scale_of(block)` gives the scale of 64 weights.
template <int ROWS, typename Scale>
static __device__ __forceinline__ void product(T* out, const T* x, const unsigned char* packed, const T* bias, int rows,
                                               int n, int k, int out_stride, Scale scale_of) {
    __shared__ float values[16];
    if (threadIdx.x < 16) values[threadIdx.x] = NF4_VALUES[threadIdx.x];
    __syncthreads();
    const int warp = (blockIdx.x * PRODUCT_THREADS + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    const int first = warp * OUTPUTS, vectors = k / 8;
    if (first >= n) return; // a whole warp, after the barrier
    const unsigned* words = reinterpret_cast<const unsigned*>(packed);
    long long start[OUTPUTS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) start[o] = (long long)min(first + o, n - 1) * vectors;
    float sums[OUTPUTS][ROWS] = {};
#pragma unroll 4
    for (int i = lane; i < vectors; i += WARP) {
        unsigned word[OUTPUTS];
        float scale[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) word[o] = words[start[o] + i];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) scale[o] = scale_of((start[o] + i) / 8);
        Vec8 input[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) input[r] = load8(x, (long long)min(r, rows - 1) * vectors + i);
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const unsigned byte = word[o] >> (8 * pair);
                const float2 w = unpack2(pack2(__fmul_rn(values[byte >> 4 & 15u], scale[o]),
                                               __fmul_rn(values[byte & 15u], scale[o])));
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    sums[o][r] = fmaf(w.x, input[r].v[2 * pair], sums[o][r]);
                    sums[o][r] = fmaf(w.y, input[r].v[2 * pair + 1], sums[o][r]);
                }
            }
        }
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float sum = group_sum<WARP>(sums[o][r]);
            if (lane == 0 && first + o < n && r < rows)
                out[(long long)r * out_stride + first + o] = from_f32(sum + to_f32(bias[first + o]));
        }
    }
}

#define PRODUCTS(ROWS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)                                                      \
        product_nf4_##ROWS(T* out, const T* x, const T* bias, int rows, int n, int k, int out_stride,                  \
                           const unsigned char* packed, const float* absmax) {                                         \
        product<ROWS>(out, x, packed, bias, rows, n, k, out_stride, [&](long long block) { return absmax[block]; });   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)                                                      \
        product_nf4_double_##ROWS(T* out, const T* x, const T* bias, int rows, int n, int k, int out_stride,           \
                                  const unsigned char* packed, const unsigned char* codes,                             \
                                  const float* nested_absmax, const float* offset) {                                   \
        __shared__ float map[256];                                                                                     \
        map[threadIdx.x] = SIGNED_MAP[threadIdx.x]; /* product has a barrier before the first use */                   \
        const float mean = *offset;                                                                                    \
        product<ROWS>(out, x, packed, bias, rows, n, k, out_stride, [&](long long block) {                             \
            return nf4_double_scale(map, codes, nested_absmax, mean, block);                                           \
        });                                                                                                            \
    }

PRODUCTS(1)
PRODUCTS(2)
PRODUCTS(4)
