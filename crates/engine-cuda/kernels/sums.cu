// Sums over rows, for the gradients of biases and of modulation vectors; see crates/engine-cuda/src/ops/sums.rs.
//
//     columns:  Σ x          products:  Σ a·b          norms:  Σ dy  and  Σ dy·(x − μ)/σ
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
    product_sums(float* partials, const T* a, const T* b, int rows, int columns, int splits) {
    partial_sums<1>(partials, rows, columns, splits, [&](long long row, int vector, Vec8* sums) {
        const Vec8 e = load8(a + row * columns, vector), u = load8(b + row * columns, vector);
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[0].v[j] = fmaf(e.v[j], u.v[j], sums[0].v[j]);
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

#define FINISH_ROWS 32

// Adds up the splits of a segment. Block: 32 columns × FINISH_ROWS. Grid: (columns/32, segments, outputs).
template <typename F>
static __device__ __forceinline__ void finish(const float* partials, int splits, int columns, F store) {
    __shared__ float scratch[FINISH_ROWS][WARP + 1];
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    const int outputs = gridDim.z, output = blockIdx.z;
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
    finish_sums_half(T* out_0, T* out_1, const float* partials, int splits, int columns, int out_stride) {
    finish(partials, splits, columns, [&](int output, long long segment, int column, float total) {
        (output ? out_1 : out_0)[segment * out_stride + column] = from_f32(total);
    });
}

extern "C" __global__ void __launch_bounds__(WARP* FINISH_ROWS)
    finish_sums_f32(float* out_0, float* out_1, const float* partials, int splits, int columns, int out_stride) {
    finish(partials, splits, columns, [&](int output, long long segment, int column, float total) {
        (output ? out_1 : out_0)[segment * out_stride + column] = total;
    });
}
