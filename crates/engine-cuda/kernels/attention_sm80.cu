// Softmax attention without a mask, forward and backward, for GPUs from sm_80 on: o = softmax(q·kᵀ·scale)·v.
// Source: Dao, FlashAttention-2 (2023): algorithms 1 and 2, with one change: the backward does not add to dq from many
// blocks. One pass owns a block of keys (dk, dv), a second owns a block of queries (dq) and recomputes two of the
// products: 7 products instead of 5, but every sum has a fixed order, so the same input gives the same bits.
//
// Defines: HEAD_DIM (64 or 128), T_BF16 or T_F16. Strides are in elements and multiples of 8, pointers 16-byte aligned.
// A block has 4 warps and 64 rows of the tensor that it owns (queries or keys); a warp owns 16 of them and streams
// tiles of 64 rows of the other side through two shared-memory buffers. All probabilities are powers of two:
// exp(scale·s − lse) = exp2(s·scale·log2 e − lse·log2 e).
//
// Fragments of mma.m16n8k16, with g = lane / 4 and t = lane % 4: an accumulator of 16×8 holds (row g, columns 2t, 2t+1)
// and (row g + 8, same columns); two neighbouring accumulators, packed to 16 bits, are the left operand of 16×16.
// In the pass over keys everything is transposed (rows are keys), so neither pass writes probabilities to memory.

typedef unsigned short half_bits;

constexpr int ROWS = 64;                      // rows of every tile
constexpr int THREADS = 128;
constexpr int CHUNKS = HEAD_DIM / 8;          // 16-byte pieces of a row
constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int TILE_BYTES = ROWS * ROW_BYTES;
constexpr int D16 = HEAD_DIM / 16, D8 = HEAD_DIM / 8;

// ---- instructions
#ifdef T_BF16
#define MMA_TYPES "f32.bf16.bf16.f32"
#define PACK "cvt.rn.bf16x2.f32"
#else
#define MMA_TYPES "f32.f16.f16.f32"
#define PACK "cvt.rn.f16x2.f32"
#endif
extern __shared__ __align__(1024) unsigned char shared_memory[];
__device__ __forceinline__ unsigned shared_base() { return (unsigned)__cvta_generic_to_shared(shared_memory); }
__device__ __forceinline__ unsigned pack2(float low, float high) {
    unsigned y;
    asm(PACK " %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// Copies 16 bytes in the background, or writes 16 zero bytes where `bytes` is 0.
__device__ __forceinline__ void copy16(unsigned to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void shared_store(unsigned at, unsigned x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ uint4 shared_load16(unsigned at) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ float2 shared_load_float2(unsigned at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
// ---- end of instructions

constexpr float LOG2_E = 1.4426950408889634f;

// Eight rows at one column lie in eight different groups of banks.
__device__ __forceinline__ unsigned tile_at(unsigned tile, int row, int chunk) {
    return tile + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// Rows first .. first + 64 of one head; rows from n on become zero.
__device__ __forceinline__ void load_tile(unsigned tile, const half_bits* head, long long token_stride, int first, int n) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS, token = first + row;
        const bool exists = token < n;
        copy16(tile_at(tile, row, chunk), head + (exists ? token : 0) * token_stride + chunk * 8, exists ? 16 : 0);
    }
}

// Left operand: 16×16 at (row, 16·k).
__device__ __forceinline__ void load_left(unsigned (&a)[4], unsigned tile, int row, int k, int lane) {
    load_matrices(a, tile_at(tile, row + (lane & 15), 2 * k + (lane >> 4)));
}
// Right operands of two products with rows of the tile as columns: rows row .. row + 16, k-step k.
__device__ __forceinline__ void load_right(unsigned (&b)[4], unsigned tile, int row, int k, int lane) {
    load_matrices(b, tile_at(tile, row + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
}
// Right operands of two products that sum over rows row .. row + 16 of the tile, columns 16·d .. 16·d + 16.
__device__ __forceinline__ void load_right_transposed(unsigned (&b)[4], unsigned tile, int row, int d, int lane) {
    load_matrices_transposed(b, tile_at(tile, row + (lane & 15), 2 * d + (lane >> 4)));
}

// c (16 × 8·N) += rows [row, row+16) of `left` times rows [first, first + 8·N) of `right`, transposed.
template <int N>
__device__ __forceinline__ void product(float (&c)[N][4], unsigned left, int row, unsigned right, int first, int lane) {
#pragma unroll
    for (int k = 0; k < D16; k++) {
        unsigned a[4];
        load_left(a, left, row, k, lane);
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            unsigned b[4];
            load_right(b, right, first + 8 * j, k, lane);
            mma(c[j], a, b[0], b[1]);
            mma(c[j + 1], a, b[2], b[3]);
        }
    }
}

// c (16 × HEAD_DIM) += p (16 × 8·N, rounded to 16 bits) times rows [first, first + 8·N) of `right`.
template <int N>
__device__ __forceinline__ void weighted_sum(float (&c)[D8][4], const float (&p)[N][4], unsigned right, int first, int lane) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
        const unsigned a[4] = {pack2(p[j][0], p[j][1]), pack2(p[j][2], p[j][3]), pack2(p[j + 1][0], p[j + 1][1]),
                               pack2(p[j + 1][2], p[j + 1][3])};
#pragma unroll
        for (int d = 0; d < D16; d++) {
            unsigned b[4];
            load_right_transposed(b, right, first + 8 * j, d, lane);
            mma(c[2 * d], a, b[0], b[1]);
            mma(c[2 * d + 1], a, b[2], b[3]);
        }
    }
}

// Writes a warp's 16 rows, times a factor for rows g and g + 8, through its own 16 rows of `tile` (no other warp reads
// them any more), so that the writes to `head` are whole rows.
__device__ __forceinline__ void store_rows(half_bits* head, long long token_stride, int first, int n, const float (&c)[D8][4],
                                           float factor0, float factor1, unsigned tile, int row, int lane) {
    const int g = lane >> 2, t = lane & 3;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D8; j++) {
        shared_store(tile_at(tile, row + g, j) + 4 * t, pack2(c[j][0] * factor0, c[j][1] * factor0));
        shared_store(tile_at(tile, row + g + 8, j) + 4 * t, pack2(c[j][2] * factor1, c[j][3] * factor1));
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        const int r = row + i / CHUNKS, chunk = i % CHUNKS, token = first + r;
        const uint4 x = shared_load16(tile_at(tile, r, chunk));
        if (token < n) *(uint4*)(head + token * token_stride + chunk * 8) = x;
    }
}

template <int N>
__device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.0f;
}

// Grid (⌈n / 64⌉, h, b). Shared memory: 5 tiles.
extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(
    half_bits* o, long long o_token, long long o_head, long long o_batch, float* lse,
    const half_bits* q, long long q_token, long long q_head, long long q_batch,
    const half_bits* k, long long k_token, long long k_head, long long k_batch,
    const half_bits* v, long long v_token, long long v_head, long long v_batch, int n, float scale) {
    const unsigned q_tile = shared_base(), k_tiles = q_tile + TILE_BYTES, v_tiles = k_tiles + 2 * TILE_BYTES;
    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16, first = blockIdx.x * ROWS;
    q += blockIdx.z * q_batch + blockIdx.y * q_head;
    k += blockIdx.z * k_batch + blockIdx.y * k_head;
    v += blockIdx.z * v_batch + blockIdx.y * v_head;
    o += blockIdx.z * o_batch + blockIdx.y * o_head;
    const int tiles = (n + ROWS - 1) / ROWS;
    const float scale2 = scale * LOG2_E;

    load_tile(q_tile, q, q_token, first, n);
    load_tile(k_tiles, k, k_token, 0, n);
    copy_commit();
    load_tile(v_tiles, v, v_token, 0, n);
    copy_commit();

    float acc[D8][4], max0 = -1.0f / 0.0f, max1 = -1.0f / 0.0f, sum0 = 0.0f, sum1 = 0.0f;
    clear(acc);
    for (int i = 0; i < tiles; i++) {
        const unsigned buffer = (i & 1) * TILE_BYTES, next = TILE_BYTES - buffer;
        if (i + 1 < tiles) load_tile(k_tiles + next, k, k_token, (i + 1) * ROWS, n);
        copy_commit();
        copy_wait<2>();  // keys of this tile; its values and the next keys may be on their way
        __syncthreads();
        float s[8][4];
        clear(s);
        product(s, q_tile, row, k_tiles + buffer, 0, lane);
        if ((i + 1) * ROWS > n) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int key = i * ROWS + 8 * j + 2 * (lane & 3);
                if (key >= n) s[j][0] = s[j][2] = -1.0f / 0.0f;
                if (key + 1 >= n) s[j][1] = s[j][3] = -1.0f / 0.0f;
            }
        }
        // Every tile has a key that exists, so the maxima are finite from here on.
        float new0 = max0, new1 = max1;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            new0 = fmaxf(new0, fmaxf(s[j][0], s[j][1]));
            new1 = fmaxf(new1, fmaxf(s[j][2], s[j][3]));
        }
        new0 = fmaxf(new0, shuffle_xor(new0, 1));
        new0 = fmaxf(new0, shuffle_xor(new0, 2));
        new1 = fmaxf(new1, shuffle_xor(new1, 1));
        new1 = fmaxf(new1, shuffle_xor(new1, 2));
        const float fade0 = exp2_fast((max0 - new0) * scale2), fade1 = exp2_fast((max1 - new1) * scale2);
        const float shift0 = new0 * scale2, shift1 = new1 * scale2;
        max0 = new0;
        max1 = new1;
        sum0 *= fade0;
        sum1 *= fade1;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            s[j][0] = exp2_fast(s[j][0] * scale2 - shift0);
            s[j][1] = exp2_fast(s[j][1] * scale2 - shift0);
            s[j][2] = exp2_fast(s[j][2] * scale2 - shift1);
            s[j][3] = exp2_fast(s[j][3] * scale2 - shift1);
            sum0 += s[j][0] + s[j][1];
            sum1 += s[j][2] + s[j][3];
        }
#pragma unroll
        for (int j = 0; j < D8; j++) {
            acc[j][0] *= fade0;
            acc[j][1] *= fade0;
            acc[j][2] *= fade1;
            acc[j][3] *= fade1;
        }
        if (i + 1 < tiles) load_tile(v_tiles + next, v, v_token, (i + 1) * ROWS, n);
        copy_commit();
        copy_wait<2>();  // values of this tile
        __syncthreads();
        weighted_sum(acc, s, v_tiles + buffer, 0, lane);
    }
    sum0 += shuffle_xor(sum0, 1);
    sum0 += shuffle_xor(sum0, 2);
    sum1 += shuffle_xor(sum1, 1);
    sum1 += shuffle_xor(sum1, 2);
    store_rows(o, o_token, first, n, acc, 1.0f / sum0, 1.0f / sum1, q_tile, row, lane);
    if ((lane & 3) == 0) {
        lse += ((long long)blockIdx.z * gridDim.y + blockIdx.y) * n;
        const int token = first + row + (lane >> 2);
        if (token < n) lse[token] = max0 * scale + logf(sum0);
        if (token + 8 < n) lse[token + 8] = max1 * scale + logf(sum1);
    }
}

// dk and dv of 64 keys. Grid (⌈n / 64⌉, h, b). Shared memory: 6 tiles and 4 · 64 floats.
// scratch: see attention_delta.cu.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_keys(
    half_bits* dk, long long dk_token, long long dk_head, long long dk_batch,
    half_bits* dv, long long dv_token, long long dv_head, long long dv_batch,
    const half_bits* d_o, long long do_token, long long do_head, long long do_batch,
    const half_bits* q, long long q_token, long long q_head, long long q_batch,
    const half_bits* k, long long k_token, long long k_head, long long k_batch,
    const half_bits* v, long long v_token, long long v_head, long long v_batch,
    const float* scratch, int n, int n_pad, float scale) {
    const unsigned k_tile = shared_base(), v_tile = k_tile + TILE_BYTES, q_tiles = v_tile + TILE_BYTES,
                   do_tiles = q_tiles + 2 * TILE_BYTES, statistics = do_tiles + 2 * TILE_BYTES;
    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16, first = blockIdx.x * ROWS;
    q += blockIdx.z * q_batch + blockIdx.y * q_head;
    d_o += blockIdx.z * do_batch + blockIdx.y * do_head;
    dk += blockIdx.z * dk_batch + blockIdx.y * dk_head;
    dv += blockIdx.z * dv_batch + blockIdx.y * dv_head;
    const long long head = (long long)blockIdx.z * gridDim.y + blockIdx.y;
    const float* delta = scratch + head * n_pad;
    const float* lse2 = delta + (long long)gridDim.y * gridDim.z * n_pad;
    const int tiles = (n + ROWS - 1) / ROWS;
    const float scale2 = scale * LOG2_E;

    auto load_queries = [&](int i) {
        const int buffer = i & 1;
        load_tile(q_tiles + buffer * TILE_BYTES, q, q_token, i * ROWS, n);
        load_tile(do_tiles + buffer * TILE_BYTES, d_o, do_token, i * ROWS, n);
        if (threadIdx.x < 32) {  // 64 floats of each: 16 pieces of 16 bytes
            const int piece = threadIdx.x & 15;
            copy16(statistics + buffer * 512 + threadIdx.x * 16, (threadIdx.x < 16 ? delta : lse2) + i * ROWS + piece * 4, 16);
        }
    };
    load_tile(k_tile, k + blockIdx.z * k_batch + blockIdx.y * k_head, k_token, first, n);
    load_tile(v_tile, v + blockIdx.z * v_batch + blockIdx.y * v_head, v_token, first, n);
    load_queries(0);
    copy_commit();

    float dk_acc[D8][4], dv_acc[D8][4];
    clear(dk_acc);
    clear(dv_acc);
    for (int i = 0; i < tiles; i++) {
        if (i + 1 < tiles) load_queries(i + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const unsigned q_tile = q_tiles + (i & 1) * TILE_BYTES, do_tile = do_tiles + (i & 1) * TILE_BYTES;
#pragma unroll 1
        for (int half = 0; half < ROWS; half += 32) {  // 32 queries at a time: more would not fit the registers
            const unsigned at = statistics + (i & 1) * 512 + (half + 2 * (lane & 3)) * 4;
            float p[4][4], dp[4][4];
            clear(p);
            product(p, k_tile, row, q_tile, half, lane);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 l = shared_load_float2(at + 256 + 32 * j);
                p[j][0] = exp2_fast(p[j][0] * scale2 - l.x);
                p[j][1] = exp2_fast(p[j][1] * scale2 - l.y);
                p[j][2] = exp2_fast(p[j][2] * scale2 - l.x);
                p[j][3] = exp2_fast(p[j][3] * scale2 - l.y);
            }
            weighted_sum(dv_acc, p, do_tile, half, lane);
            clear(dp);
            product(dp, v_tile, row, do_tile, half, lane);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 d = shared_load_float2(at + 32 * j);
                dp[j][0] = p[j][0] * (dp[j][0] - d.x);
                dp[j][1] = p[j][1] * (dp[j][1] - d.y);
                dp[j][2] = p[j][2] * (dp[j][2] - d.x);
                dp[j][3] = p[j][3] * (dp[j][3] - d.y);
            }
            weighted_sum(dk_acc, dp, q_tile, half, lane);
        }
        __syncthreads();  // the next round's loads overwrite this tile
    }
    store_rows(dk, dk_token, first, n, dk_acc, scale, scale, k_tile, row, lane);
    store_rows(dv, dv_token, first, n, dv_acc, 1.0f, 1.0f, v_tile, row, lane);
}

// dq of 64 queries. Grid (⌈n / 64⌉, h, b). Shared memory: 6 tiles.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_queries(
    half_bits* dq, long long dq_token, long long dq_head, long long dq_batch,
    const half_bits* d_o, long long do_token, long long do_head, long long do_batch,
    const half_bits* q, long long q_token, long long q_head, long long q_batch,
    const half_bits* k, long long k_token, long long k_head, long long k_batch,
    const half_bits* v, long long v_token, long long v_head, long long v_batch,
    const float* scratch, int n, int n_pad, float scale) {
    const unsigned q_tile = shared_base(), do_tile = q_tile + TILE_BYTES, k_tiles = do_tile + TILE_BYTES,
                   v_tiles = k_tiles + 2 * TILE_BYTES;
    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16, first = blockIdx.x * ROWS;
    k += blockIdx.z * k_batch + blockIdx.y * k_head;
    v += blockIdx.z * v_batch + blockIdx.y * v_head;
    dq += blockIdx.z * dq_batch + blockIdx.y * dq_head;
    const long long head = (long long)blockIdx.z * gridDim.y + blockIdx.y;
    const float* delta = scratch + head * n_pad + first + row + (lane >> 2);
    const float* lse2 = delta + (long long)gridDim.y * gridDim.z * n_pad;
    const float delta0 = delta[0], delta1 = delta[8], lse0 = lse2[0], lse1 = lse2[8];
    const int tiles = (n + ROWS - 1) / ROWS;
    const float scale2 = scale * LOG2_E;

    auto load_keys = [&](int i) {
        load_tile(k_tiles + (i & 1) * TILE_BYTES, k, k_token, i * ROWS, n);
        load_tile(v_tiles + (i & 1) * TILE_BYTES, v, v_token, i * ROWS, n);
    };
    load_tile(q_tile, q + blockIdx.z * q_batch + blockIdx.y * q_head, q_token, first, n);
    load_tile(do_tile, d_o + blockIdx.z * do_batch + blockIdx.y * do_head, do_token, first, n);
    load_keys(0);
    copy_commit();

    float acc[D8][4];
    clear(acc);
    for (int i = 0; i < tiles; i++) {
        if (i + 1 < tiles) load_keys(i + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const unsigned k_tile = k_tiles + (i & 1) * TILE_BYTES, v_tile = v_tiles + (i & 1) * TILE_BYTES;
        float p[8][4], dp[8][4];
        clear(p);
        clear(dp);
        product(p, q_tile, row, k_tile, 0, lane);
        product(dp, do_tile, row, v_tile, 0, lane);
        if ((i + 1) * ROWS > n) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int key = i * ROWS + 8 * j + 2 * (lane & 3);
                if (key >= n) p[j][0] = p[j][2] = -1.0f / 0.0f;
                if (key + 1 >= n) p[j][1] = p[j][3] = -1.0f / 0.0f;
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            dp[j][0] = exp2_fast(p[j][0] * scale2 - lse0) * (dp[j][0] - delta0);
            dp[j][1] = exp2_fast(p[j][1] * scale2 - lse0) * (dp[j][1] - delta0);
            dp[j][2] = exp2_fast(p[j][2] * scale2 - lse1) * (dp[j][2] - delta1);
            dp[j][3] = exp2_fast(p[j][3] * scale2 - lse1) * (dp[j][3] - delta1);
        }
        weighted_sum(acc, dp, k_tile, 0, lane);
        __syncthreads();  // the next round's loads overwrite this tile
    }
    store_rows(dq, dq_token, first, n, acc, scale, scale, q_tile, row, lane);
}
