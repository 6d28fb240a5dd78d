// 4-bit normal-float weights: quantising, scales in 8 bits, and back. Bit for bit what crates/quant computes.
//
// Blocks of 64 weights share an f32 scale; two codes share a byte, the first in the high half. Doubly quantised scales
// are signed 8-bit dynamic codes in blocks of 256, plus an offset. For quantising, `T` is the type that the weights
// came in; for dequantising, the type that they are wanted in.

#include "common.cuh"

#define NF4_THREADS 256
// The code of 0.0, which fills the last byte of an odd count.
#define ZERO_CODE 7u

// The number of midpoints between neighbouring values that `value` is greater than.
static __device__ __forceinline__ unsigned nf4_code(float value) {
    unsigned code = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i) code += value > (NF4_VALUES[i] + NF4_VALUES[i + 1]) / 2.0f;
    return code;
}

static __device__ __forceinline__ bool is_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

// Eight lanes to a block of 64. Grid: n/2048, rounded up. `load(vector)` gives eight weights.
template <typename Load8, typename Load1>
static __device__ __forceinline__ void quantise(unsigned char* packed, float* absmax, unsigned* not_finite, long long n,
                                                Load8 vector, Load1 scalar) {
    const long long i = (long long)blockIdx.x * NF4_THREADS + threadIdx.x, first = i * 8;
    Vec8 e;
    if (first + 8 <= n) {
        e = vector(i);
    } else {
        for (int j = 0; j < 8; ++j) e.v[j] = first + j < n ? scalar(first + j) : 0.0f;
    }
    float largest = 0.0f;
    unsigned bad = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        largest = fmaxf(largest, fabsf(e.v[j]));
        bad += !is_finite(e.v[j]);
    }
    if (bad) atomicAdd(not_finite, bad);
    largest = group_max<8>(largest);
    if (first >= n) return; // after the shuffles, which need every lane
    const long long block = first / 64;
    const bool full = block * 64 + 64 <= n;
    if (threadIdx.x % 8 == 0) absmax[block] = stored_scale(largest, full);
    const Scaler s = scaler_of(largest, full);
    unsigned word = 0; // the first byte lowest
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const unsigned code = first + j < n ? nf4_code(scaled(s, e.v[j])) : ZERO_CODE;
        word |= code << (8 * (j / 2) + (j % 2 ? 0 : 4));
    }
    if (first + 8 <= n) {
        reinterpret_cast<unsigned*>(packed)[i] = word;
    } else {
        for (int byte = 0; byte < (n - first + 1) / 2; ++byte)
            packed[first / 2 + byte] = (unsigned char)(word >> (8 * byte));
    }
}

// `not_finite` is increased by the number of weights that are infinite or no numbers.
extern "C" __global__ void __launch_bounds__(NF4_THREADS)
    nf4_quantise(unsigned char* packed, float* absmax, unsigned* not_finite, const T* in, long long n) {
    quantise(
        packed, absmax, not_finite, n, [&](long long i) { return load8(in, i); },
        [&](long long i) { return to_f32(in[i]); });
}

extern "C" __global__ void __launch_bounds__(NF4_THREADS)
    nf4_quantise_f32(unsigned char* packed, float* absmax, unsigned* not_finite, const float* in, long long n) {
    quantise(
        packed, absmax, not_finite, n, [&](long long i) { return load8_f32(in, i); },
        [&](long long i) { return in[i]; });
}

// Sums of the scales in f64, one per block of threads. Any grid.
extern "C" __global__ void __launch_bounds__(NF4_THREADS)
    nf4_sum_scales(double* partials, const float* absmax, long long num_blocks) {
    __shared__ double scratch[NF4_THREADS / WARP];
    double sum = 0.0;
    for (long long i = (long long)blockIdx.x * NF4_THREADS + threadIdx.x; i < num_blocks;
         i += (long long)gridDim.x * NF4_THREADS)
        sum += (double)absmax[i];
    sum = block_sum<NF4_THREADS>(sum, scratch);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// offset = the mean of the scales. One thread.
extern "C" __global__ void nf4_offset(float* offset, const double* partials, int num_partials, long long num_blocks) {
    double sum = 0.0;
    for (int i = 0; i < num_partials; ++i) sum += partials[i];
    *offset = (float)(sum / (double)num_blocks);
}

// Signed dynamic codes of the scales less their mean: one block of threads per 256 scales.
extern "C" __global__ void __launch_bounds__(NF4_THREADS)
    nf4_double_quantise(unsigned char* codes, float* nested_absmax, const float* absmax, const float* offset,
                        long long num_blocks) {
    __shared__ float midpoints[256], largest_of_warp[NF4_THREADS / WARP];
    const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    const int t = threadIdx.x;
    midpoints[t] = t < 255 ? (SIGNED_MAP[t] + SIGNED_MAP[t + 1]) / 2.0f : 0.0f;
    const float value = i < num_blocks ? absmax[i] - *offset : 0.0f;
    float largest = group_max<WARP>(fabsf(value));
    if (threadIdx.x % WARP == 0) largest_of_warp[threadIdx.x / WARP] = largest;
    __syncthreads();
    for (int warp = 0; warp < NF4_THREADS / WARP; ++warp) largest = fmaxf(largest, largest_of_warp[warp]);
    const bool full = (long long)blockIdx.x * 256 + 256 <= num_blocks;
    if (threadIdx.x == 0) nested_absmax[blockIdx.x] = stored_scale(largest, full);
    const Scaler s = scaler_of(largest, full);
    if (i < num_blocks) codes[i] = (unsigned char)dynamic_code(midpoints, scaled(s, value));
}

// Vectors of eight weights that a thread dequantises.
#define NF4_VECTORS 4

// Grid: n/8192, rounded up. `scale_of(block)` gives a block's scale.
template <typename Scale>
static __device__ __forceinline__ void dequantise(T* out, const unsigned char* packed, long long n, Scale scale_of) {
    __shared__ float values[16];
    if (threadIdx.x < 16) values[threadIdx.x] = NF4_VALUES[threadIdx.x];
    const long long first = (long long)blockIdx.x * NF4_VECTORS * NF4_THREADS + threadIdx.x, vectors = n / 8;
    unsigned word[NF4_VECTORS];
#pragma unroll
    for (int k = 0; k < NF4_VECTORS; ++k) {
        const long long i = first + k * NF4_THREADS;
        word[k] = i < vectors ? reinterpret_cast<const unsigned*>(packed)[i] : 0u;
    }
    __syncthreads();
    float scale[NF4_VECTORS];
#pragma unroll
    for (int k = 0; k < NF4_VECTORS; ++k) {
        const long long i = first + k * NF4_THREADS;
        scale[k] = i < vectors ? scale_of(i / 8) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < NF4_VECTORS; ++k) {
        const long long i = first + k * NF4_THREADS;
        Vec8 e;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            e.v[j] = __fmul_rn(values[word[k] >> (8 * (j / 2) + (j % 2 ? 0 : 4)) & 15u], scale[k]);
        if (i < vectors) store8(out, i, e);
    }
    const long long i = vectors * 8 + threadIdx.x;
    if (blockIdx.x == 0 && i < n) {
        const unsigned byte = packed[i / 2];
        out[i] = from_f32(__fmul_rn(values[i % 2 ? byte & 15u : byte >> 4], scale_of(i / 64)));
    }
}

extern "C" __global__ void __launch_bounds__(NF4_THREADS)
    nf4_dequantise(T* out, const unsigned char* packed, const float* absmax, long long n) {
    dequantise(out, packed, n, [&](long long block) { return absmax[block]; });
}

extern "C" __global__ void __launch_bounds__(NF4_THREADS)
    nf4_dequantise_double(T* out, const unsigned char* packed, const unsigned char* codes, const float* nested_absmax,
                          const float* offset, long long n) {
    __shared__ float map[256];
    map[threadIdx.x] = SIGNED_MAP[threadIdx.x]; // dequantise has a barrier before the first use
    const float mean = *offset;
    dequantise(out, packed, n, [&](long long block) {
        return nf4_double_scale(map, codes, nested_absmax, mean, block);
    });
}
