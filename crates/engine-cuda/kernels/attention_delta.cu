// What the attention backward needs per query, in one pass over o and do:
//   delta[i] = Σ_d do[i, d] · o[i, d]     and     lse2[i] = lse[i] · log2(e).
// Both go to rows padded to a multiple of 128 queries (delta 0, lse2 +∞ in the pad), so that the backward kernels
// read whole tiles without a bound check: exp2(s − ∞) = 0 is exactly what a query that does not exist contributes.
// Source: Dao, FlashAttention-2 (2023), algorithm 2, line 4.
//
// Defines: HEAD_DIM (64 or 128), T_BF16 or T_F16. Grid: (⌈n_pad / rows per block⌉, h, b), 128 threads.
// scratch is f32 [2][b·h][n_pad]: delta, then lse2.

typedef unsigned short half_bits;

// ---- instructions
#ifdef T_BF16
__device__ __forceinline__ float low_half(unsigned x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
#else
__device__ __forceinline__ float low_half(unsigned x) {
    float y;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ float high_half(unsigned x) {
    float y;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "r"(x));
    return y;
}
#endif
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// ---- end of instructions

constexpr int CHUNKS = HEAD_DIM / 8;       // 16-byte pieces of a row
constexpr int ROWS = 128 / CHUNKS;         // rows of a block: one thread a piece
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float dot2(unsigned a, unsigned b) {
    return low_half(a) * low_half(b) + high_half(a) * high_half(b);
}

extern "C" __global__ void __launch_bounds__(128) attention_delta(
    float* scratch, const half_bits* d_o, long long do_token, long long do_head, long long do_batch,
    const half_bits* o, long long o_token, long long o_head, long long o_batch, const float* lse, int n, int n_pad) {
    const int chunk = threadIdx.x % CHUNKS;
    const int token = blockIdx.x * ROWS + threadIdx.x / CHUNKS;
    const long long head = (long long)blockIdx.z * gridDim.y + blockIdx.y;
    float sum = 0.0f;
    if (token < n) {
        const uint4 a = *(const uint4*)(d_o + blockIdx.z * do_batch + blockIdx.y * do_head + token * do_token + chunk * 8);
        const uint4 b = *(const uint4*)(o + blockIdx.z * o_batch + blockIdx.y * o_head + token * o_token + chunk * 8);
        sum = dot2(a.x, b.x) + dot2(a.y, b.y) + dot2(a.z, b.z) + dot2(a.w, b.w);
    }
#pragma unroll
    for (int mask = CHUNKS / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (chunk == 0 && token < n_pad) {
        const long long heads = (long long)gridDim.y * gridDim.z;
        scratch[head * n_pad + token] = sum;
        scratch[(heads + head) * n_pad + token] = token < n ? lse[head * n + token] * LOG2_E : __int_as_float(0x7f800000);
    }
}
