// Softmax attention without a mask, forward and backward, for Hopper (sm_90a): o = softmax(q·kᵀ·scale)·v.
// Sources: Dao, FlashAttention-2 (2023), for the algorithm; Shah et al., FlashAttention-3 (2024), sections 3.1 and 3.2,
// for how warps share the work: one warp loads tiles with the copy engine, two warpgroups compute, and each of them
// has its next products under way while it computes exponentials of the last.
//
// As in attention_sm80.cu the backward never adds from several blocks: blocks that own 128 keys give dk and dv, blocks
// that own 128 queries give dq from recomputed probabilities. Both kinds run in one launch, the longer first, so that
// the last wave is full. Every sum has a fixed order: the same input gives the same bits.
//
// Defines: HEAD_DIM (64 or 128), T_BF16 or T_F16. A tile is HEAD_DIM / 64 slices of rows × 64 values; a slice's rows
// are 128 bytes and its 16-byte pieces lie at piece ^ (row % 8): the 128-byte swizzle of the tensor maps and of wgmma.
// Tensor maps have the axes (d, token, head, batch), boxes of 64 values × rows of one head; tokens past n read as zero.
// Strides of what is written are in elements and multiples of 8, pointers 16-byte aligned.
//
// Accumulators of wgmma, 64 rows × N: warp w of the warpgroup has rows 16·w .. 16·w + 16; with g = lane / 4 and
// t = lane % 4, element i is row g + 8·(i / 2 % 2), column 8·(i / 4) + 2·t + i % 2. Packed to 16 bits in the same order,
// eight columns beside eight, they are the left operand of a further product: probabilities never go to memory.

typedef unsigned short half_bits;

constexpr int SLICES = HEAD_DIM / 64;
constexpr int R_D = HEAD_DIM / 2;           // accumulator registers of 64 × HEAD_DIM
constexpr int OWN_ROWS = 128;               // queries (or keys) of a block, 64 for each computing warpgroup
constexpr int THREADS = 384;                // one loading warpgroup, two computing
constexpr int WARPS = 8;                     // that compute
#define FORWARD_KEYS 128                    // keys of a tile in the forward pass
constexpr int FORWARD_STAGES = 2;
constexpr int BACKWARD_ROWS = 64;           // rows of a streamed tile in the backward pass
#ifndef BACKWARD_STAGES
#define BACKWARD_STAGES (HEAD_DIM == 64 ? 6 : 4)
#endif
constexpr int OWN_BYTES = OWN_ROWS * HEAD_DIM * 2;
constexpr int KEYS_BYTES = FORWARD_KEYS * HEAD_DIM * 2;
constexpr int STREAM_BYTES = BACKWARD_ROWS * HEAD_DIM * 2;
constexpr int STATISTICS_BYTES = 2 * BACKWARD_ROWS * 4;
constexpr int BARRIER_BYTES = 256;
// What a launch must ask for; 1024 more than is used, to align the tiles.
[[maybe_unused]] constexpr int FORWARD_SHARED = 1024 + OWN_BYTES + 2 * FORWARD_STAGES * KEYS_BYTES + BARRIER_BYTES;
[[maybe_unused]] constexpr int BACKWARD_SHARED = 1024 + 2 * OWN_BYTES + BACKWARD_STAGES * (2 * STREAM_BYTES + STATISTICS_BYTES) + BARRIER_BYTES;

// ---- instructions
struct __align__(128) TensorMap {
    unsigned long long x[16];
};
#ifdef T_BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif
extern __shared__ __align__(1024) unsigned char shared_memory[];
__device__ __forceinline__ unsigned shared_base() { return (unsigned)__cvta_generic_to_shared(shared_memory); }
__device__ __forceinline__ unsigned pack2(float low, float high) {
    unsigned y;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// The same in every lane, and the compiler may know it.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
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
__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity; the first phase is 0.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}
__device__ __forceinline__ void tma_load(unsigned to, const TensorMap& map, unsigned barrier, int d, int token, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(d), "r"(token), "r"(head), "r"(batch) : "memory");
}
__device__ __forceinline__ void bulk_load(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
template <int N>
__device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// The compiler knows nothing of a product under way: this keeps its uses of the registers on their side of a wait.
template <int N>
__device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(unsigned (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

// Registers of an instruction: names %0 … and operands.
#define N32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define N64 N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define N88 N64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87"
#define O8(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define O24(c, d, i) O8(c, d, i), O8(c, d, i + 8), O8(c, d, i + 16)
#define O32(c, d, i) O24(c, d, i), O8(c, d, i + 24)
#define O32_OF(c, d) O32(c, d, 0)
#define O64_OF(c, d) O32(c, d, 0), O32(c, d, 32)
#define O88_OF(c, d) O32(c, d, 0), O32(c, d, 32), O24(c, d, 64)
#define UPDATED "+f"
#define WRITTEN "=f"
// d (64 × N) += a (64 × 16, shared) · b (N × 16, shared, rows of 16 in sequence)ᵀ; `_first` sets d. That one must not name
// d as an input: the values that the registers had would count as written while other products are under way, and the
// assembler would then wait for every product at once.
#define WGMMA_SHARED(R, N, NAMES, A, B)                                                                                      \
    __device__ __forceinline__ void wgmma_shared_first(float (&d)[R], unsigned long long a, unsigned long long b) {          \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE      \
                     " {" NAMES "}, " A ", " B ", p, 1, 1, 0, 0; }" : O##R##_OF(WRITTEN, d) : "l"(a), "l"(b));                \
    }                                                                                                                        \
    __device__ __forceinline__ void wgmma_shared(float (&d)[R], unsigned long long a, unsigned long long b) {                \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B                 \
                     ", 1, 1, 1, 0, 0;" : O##R##_OF(UPDATED, d) : "l"(a), "l"(b));                                            \
    }
WGMMA_SHARED(32, "64", N32, "%32", "%33")
WGMMA_SHARED(64, "128", N64, "%64", "%65")
WGMMA_SHARED(88, "176", N88, "%88", "%89")
// d (64 × N) += a (64 × 16, registers) · b (16 × N, shared, rows of N in sequence).
#define WGMMA_REGISTERS(R, N, NAMES, A, B)                                                                                   \
    __device__ __forceinline__ void wgmma_registers(float (&d)[R], const unsigned* a, unsigned long long b) {                \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, {" A "}, " B               \
                     ", 1, 1, 1, 1;" : O##R##_OF(UPDATED, d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));            \
    }
WGMMA_REGISTERS(32, "64", N32, "%32,%33,%34,%35", "%36")
WGMMA_REGISTERS(64, "128", N64, "%64,%65,%66,%67", "%68")
// d (64 × 64) += a (64 × 16, registers) · b (64 × 16, shared, rows of 16 in sequence)ᵀ; `_first` sets d, as above.
__device__ __forceinline__ void wgmma_rows_first(float (&d)[32], const unsigned* a, unsigned long long b) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" N32
                 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0; }" : O32_OF(WRITTEN, d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_rows(float (&d)[32], const unsigned* a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" N32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                 : O32_OF(UPDATED, d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Four 8×8 blocks of 16-bit values, a row of one from each lane's address.
__device__ __forceinline__ void load_matrices(unsigned* r, unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
// ---- end of instructions

constexpr float LOG2_E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7f800000)

// Shared-memory descriptor of an operand with the 128-byte swizzle: `across` is the step from 64 columns to the next 64
// (only where rows are summed over); from eight rows to the next eight it is always 8 · 128 bytes. `offset` is a constant
// added to the address, and no address of shared memory leaves the field.
__device__ __forceinline__ unsigned long long descriptor(unsigned at, unsigned across, unsigned offset) {
    const unsigned low = (at >> 4 | across >> 4 << 16) + (offset >> 4);
    return (unsigned long long)(1u << 30 | 1024 >> 4) << 32 | low;
}

// d (64 × N) = rows `left` · rows `right`ᵀ over HEAD_DIM. Slices of the two tiles are left_slice and right_slice bytes apart.
template <int R>
__device__ __forceinline__ void product(float (&d)[R], unsigned left, unsigned left_slice, unsigned right, unsigned right_slice) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        const unsigned in_slice = (k % 4) * 32;
        const unsigned long long a = descriptor(left, 16, (k / 4) * left_slice + in_slice);
        const unsigned long long b = descriptor(right, 16, (k / 4) * right_slice + in_slice);
        if (k == 0) wgmma_shared_first(d, a, b);
        else wgmma_shared(d, a, b);
    }
}

// d (64 × HEAD_DIM) += p (64 × 4·P, packed) · the tile `right` of as many rows.
template <int P>
__device__ __forceinline__ void weighted_sum(float (&d)[R_D], const unsigned (&p)[P], unsigned right, unsigned right_slice) {
#pragma unroll
    for (int k = 0; k < P / 4; k++) wgmma_registers(d, p + 4 * k, descriptor(right, right_slice, k * 2048));
}

template <int N>
__device__ __forceinline__ void clear(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) c[i] = 0.0f;
}

template <int P>
__device__ __forceinline__ void pack(unsigned (&p)[P], const float (&s)[2 * P]) {
#pragma unroll
    for (int i = 0; i < P; i++) p[i] = pack2(s[2 * i], s[2 * i + 1]);
}

// As `product`, with left rows from registers (see `load_rows`).
__device__ __forceinline__ void product_rows(float (&d)[32], const unsigned (&left)[R_D / 2], unsigned right, unsigned right_slice) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        const unsigned long long b = descriptor(right, 16, (k / 4) * right_slice + (k % 4) * 32);
        if (k == 0) wgmma_rows_first(d, left, b);
        else wgmma_rows(d, left + 4 * k, b);
    }
}

// A warpgroup's 64 rows of a tile as left operands.
__device__ __forceinline__ void load_rows(unsigned (&r)[R_D / 2], unsigned tile, int warp, int lane) {
    const int row = warp * 16 + (lane & 15);
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
        load_matrices(r + 4 * k, tile + (k / 4) * (OWN_ROWS * 128) + row * 128 + (((2 * (k % 4) + (lane >> 4)) ^ (row & 7)) << 4));
}

// Writes a warpgroup's 64 rows, times a factor for rows g and g + 8 of each warp, through its own 64 rows of a tile.
__device__ __forceinline__ void store_rows(half_bits* head, long long token_stride, int first, int n, const float (&c)[R_D],
                                           float factor0, float factor1, unsigned tile, int warp, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++) {
        const unsigned at = tile + (j / 8) * (OWN_ROWS * 128) + (warp * 16 + g) * 128 + (((j & 7) ^ g) << 4) + 4 * t;
        shared_store(at, pack2(c[4 * j] * factor0, c[4 * j + 1] * factor0));
        shared_store(at + 8 * 128, pack2(c[4 * j + 2] * factor1, c[4 * j + 3] * factor1));
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * HEAD_DIM / 8; i += 32) {
        const int row = warp * 16 + i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8);
        const uint4 x = shared_load16(tile + (piece / 8) * (OWN_ROWS * 128) + row * 128 + (((piece & 7) ^ (row & 7)) << 4));
        if (first + row < n) *(uint4*)(head + (first + row) * token_stride + piece * 8) = x;
    }
}

// One tile of `rows` tokens, slice by slice.
__device__ __forceinline__ void load_tile(unsigned to, const TensorMap& map, unsigned barrier, int box_rows, int boxes, int token,
                                          int head, int batch) {
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++)
        for (int box = 0; box < boxes; box++)
            tma_load(to + (slice * boxes + box) * box_rows * 128, map, barrier, slice * 64, token + box * box_rows, head, batch);
}

// Barriers of a ring of tiles: `full` is completed by the copy engine, `empty` by the computing threads that give a stage back: one
// lane of each of the eight warps where only products read it, every lane where lanes read statistics of it themselves.
struct Ring {
    unsigned full, empty;
    int stages;
    __device__ __forceinline__ void init(int givers) const {
        for (int i = 0; i < stages; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, givers);
        }
    }
    __device__ __forceinline__ void wait_full(int i) const { barrier_wait(full + 8 * (i % stages), (i / stages) & 1); }
    __device__ __forceinline__ void wait_empty(int i) const {
        if (i >= stages) barrier_wait(empty + 8 * (i % stages), ((i / stages) & 1) ^ 1);
    }
    __device__ __forceinline__ void release(int i, int lane) const {
        if (lane == 0) release_for_itself(i);
    }
    __device__ __forceinline__ void release_for_itself(int i) const { barrier_arrive(empty + 8 * (i % stages)); }
};

// Grid (⌈n / 128⌉, h, b), FORWARD_SHARED bytes. Boxes: q 128 rows, k and v FORWARD_KEYS rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward(
    half_bits* o, long long o_token, long long o_head, long long o_batch, float* lse, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, int n, float scale) {
    const unsigned q_tile = (shared_base() + 1023) & ~1023u, k_tiles = q_tile + OWN_BYTES,
                   v_tiles = k_tiles + FORWARD_STAGES * KEYS_BYTES, barriers = v_tiles + FORWARD_STAGES * KEYS_BYTES;
    const unsigned q_full = barriers;
    const Ring k_ring = {barriers + 8, barriers + 40, FORWARD_STAGES}, v_ring = {barriers + 72, barriers + 104, FORWARD_STAGES};
    const int group = uniform(threadIdx.x >> 7), lane = threadIdx.x & 31;
    const int tiles = (n + FORWARD_KEYS - 1) / FORWARD_KEYS;
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        k_ring.init(WARPS);
        v_ring.init(WARPS);
        barrier_init_done();
    }
    __syncthreads();

    if (group == 0) {
        registers_down<24>();
        if (threadIdx.x == 0) {
            for (int i = 0; i < tiles; i++) {  // from the last tile to the first: only the last may be cut off by n
                const int token = (tiles - 1 - i) * FORWARD_KEYS, stage = i % FORWARD_STAGES;
                k_ring.wait_empty(i);
                barrier_expect(k_ring.full + 8 * stage, KEYS_BYTES);
                load_tile(k_tiles + stage * KEYS_BYTES, k, k_ring.full + 8 * stage, FORWARD_KEYS, 1, token, blockIdx.y, blockIdx.z);
                if (i == 0) {
                    barrier_expect(q_full, OWN_BYTES);
                    load_tile(q_tile, q, q_full, OWN_ROWS, 1, blockIdx.x * OWN_ROWS, blockIdx.y, blockIdx.z);
                }
                v_ring.wait_empty(i);
                barrier_expect(v_ring.full + 8 * stage, KEYS_BYTES);
                load_tile(v_tiles + stage * KEYS_BYTES, v, v_ring.full + 8 * stage, FORWARD_KEYS, 1, token, blockIdx.y, blockIdx.z);
            }
        }
    } else {
        registers_up<240>();
        const int warp = (threadIdx.x >> 5) & 3;
        const unsigned own = q_tile + (group - 1) * 64 * 128;
        const float scale2 = scale * LOG2_E;
        float s[FORWARD_KEYS / 2], acc[R_D], max0 = -INFINITE, max1 = -INFINITE, sum0 = 0.0f, sum1 = 0.0f, fade0, fade1;
        unsigned p[FORWARD_KEYS / 4];

        // Turns scores into probabilities relative to the running maximum; `fade` is what older sums must be multiplied by.
        auto soften = [&]() {
            float new0 = max0, new1 = max1;
#pragma unroll
            for (int i = 0; i < FORWARD_KEYS / 2; i += 4) {
                new0 = fmaxf(new0, fmaxf(s[i], s[i + 1]));
                new1 = fmaxf(new1, fmaxf(s[i + 2], s[i + 3]));
            }
            new0 = fmaxf(new0, shuffle_xor(new0, 1));
            new1 = fmaxf(new1, shuffle_xor(new1, 1));
            new0 = fmaxf(new0, shuffle_xor(new0, 2));
            new1 = fmaxf(new1, shuffle_xor(new1, 2));
            fade0 = exp2_fast((max0 - new0) * scale2);
            fade1 = exp2_fast((max1 - new1) * scale2);
            max0 = new0;
            max1 = new1;
            const float shift0 = max0 * scale2, shift1 = max1 * scale2;
            float part0 = 0.0f, part1 = 0.0f;
#pragma unroll
            for (int i = 0; i < FORWARD_KEYS / 2; i += 4) {
                s[i] = exp2_fast(s[i] * scale2 - shift0);
                s[i + 1] = exp2_fast(s[i + 1] * scale2 - shift0);
                s[i + 2] = exp2_fast(s[i + 2] * scale2 - shift1);
                s[i + 3] = exp2_fast(s[i + 3] * scale2 - shift1);
                part0 += s[i] + s[i + 1];
                part1 += s[i + 2] + s[i + 3];
            }
            sum0 = sum0 * fade0 + part0;
            sum1 = sum1 * fade1 + part1;
        };

        clear(acc);
        barrier_wait(q_full, 0);
        k_ring.wait_full(0);
        wgmma_fence();
        product(s, own, OWN_ROWS * 128, k_tiles, FORWARD_KEYS * 128);
        wgmma_commit();
        wgmma_wait<0>();
        hold(s);
        k_ring.release(0, lane);
        if (tiles * FORWARD_KEYS > n) {
            const int keys = n - (tiles - 1) * FORWARD_KEYS - 2 * (lane & 3);  // that exist, from this thread's first on
#pragma unroll
            for (int i = 0; i < FORWARD_KEYS / 2; i += 4) {
                if (2 * i >= keys) s[i] = s[i + 2] = -INFINITE;
                if (2 * i + 1 >= keys) s[i + 1] = s[i + 3] = -INFINITE;
            }
        }
        soften();
        pack(p, s);

        // The two warpgroups take turns to issue products, so that one computes exponentials while the other's run.
        v_ring.wait_full(0);
        if (group == 2 && tiles > 1) named_arrive(1, 256);
        for (int i = 1; i < tiles; i++) {
            k_ring.wait_full(i);
            named_sync(group, 256);
            hold(s);
            hold(acc);
            hold(p);
            wgmma_fence();
            product(s, own, OWN_ROWS * 128, k_tiles + (i % FORWARD_STAGES) * KEYS_BYTES, FORWARD_KEYS * 128);
            wgmma_commit();
            weighted_sum(acc, p, v_tiles + ((i - 1) % FORWARD_STAGES) * KEYS_BYTES, FORWARD_KEYS * 128);
            wgmma_commit();
            if (group == 1 || i + 1 < tiles) named_arrive(3 - group, 256);
            wgmma_wait<1>();
            hold(s);
            k_ring.release(i, lane);
            soften();
            hold(s);
            v_ring.wait_full(i);  // for the next round; here, because the assembler would otherwise wait for the products
            wgmma_wait<0>();      // first and compute the exponentials after that, with nothing to hide behind
            hold(acc);
            hold(p);
            v_ring.release(i - 1, lane);
#pragma unroll
            for (int j = 0; j < R_D; j += 4) {
                acc[j] *= fade0;
                acc[j + 1] *= fade0;
                acc[j + 2] *= fade1;
                acc[j + 3] *= fade1;
            }
            pack(p, s);
        }
        hold(acc);
        hold(p);
        wgmma_fence();
        weighted_sum(acc, p, v_tiles + ((tiles - 1) % FORWARD_STAGES) * KEYS_BYTES, FORWARD_KEYS * 128);
        wgmma_commit();
        sum0 += shuffle_xor(sum0, 1);
        sum1 += shuffle_xor(sum1, 1);
        sum0 += shuffle_xor(sum0, 2);
        sum1 += shuffle_xor(sum1, 2);
        wgmma_wait<0>();
        hold(acc);
        named_sync(2 + group, 128);  // all four warps are done with the queries: their place takes the output
        const int first = blockIdx.x * OWN_ROWS + (group - 1) * 64;
        store_rows(o + blockIdx.z * o_batch + blockIdx.y * o_head, o_token, first, n, acc, 1.0f / sum0, 1.0f / sum1, own, warp, lane);
        if ((lane & 3) == 0) {
            lse += ((long long)blockIdx.z * gridDim.y + blockIdx.y) * n;
            const int token = first + warp * 16 + (lane >> 2);
            if (token < n) lse[token] = max0 * scale + logf(sum0);
            if (token + 8 < n) lse[token + 8] = max1 * scale + logf(sum1);
        }
    }
}

// What the computing warpgroups of a backward block know.
struct Backward {
    unsigned own1, own2;         // this warpgroup's 64 rows of (k, v) or (q, do)
    unsigned stream, statistics;  // stages of pairs of tiles of (q, do) or (k, v); of (delta, lse2) where queries stream
    unsigned own_full;
    Ring ring;
    int tiles, n, warp, lane;
    float scale2;

    __device__ __forceinline__ unsigned tile(int i) const { return stream + (i % BACKWARD_STAGES) * (2 * STREAM_BYTES); }
    // Scores and the products of do and v, for tile i: two groups of products.
    __device__ __forceinline__ void issue_scores(float (&s)[32], float (&dp)[32], int i) const {
        product(s, own1, OWN_ROWS * 128, tile(i), BACKWARD_ROWS * 128);
        wgmma_commit();
        product(dp, own2, OWN_ROWS * 128, tile(i) + STREAM_BYTES, BACKWARD_ROWS * 128);
        wgmma_commit();
    }
};

// Rows are keys, columns queries: dk += dsᵀ·q and dv += pᵀ·do.
__device__ __forceinline__ void keys_gradient(const Backward& block, float (&dk)[R_D], float (&dv)[R_D]) {
    float s[32], dp[32];
    unsigned p[16], ds[16];
    clear(dk);
    clear(dv);
    hold(dk);
    hold(dv);
    barrier_wait(block.own_full, 0);
    block.ring.wait_full(0);
    wgmma_fence();
    block.issue_scores(s, dp, 0);
    for (int i = 0;; i++) {
        const unsigned statistics = block.statistics + (i % BACKWARD_STAGES) * STATISTICS_BYTES + 8 * (block.lane & 3);
        wgmma_wait<1>();  // scores, and everything of the tile before
        hold(s);
        hold(dk);
        hold(dv);
        hold(ds);
        if (i > 0) block.ring.release_for_itself(i - 1);  // a lane 0 that did it for all could come before another's reads
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 l = shared_load_float2(statistics + BACKWARD_ROWS * 4 + 32 * j);
            s[4 * j] = exp2_fast(s[4 * j] * block.scale2 - l.x);
            s[4 * j + 1] = exp2_fast(s[4 * j + 1] * block.scale2 - l.y);
            s[4 * j + 2] = exp2_fast(s[4 * j + 2] * block.scale2 - l.x);
            s[4 * j + 3] = exp2_fast(s[4 * j + 3] * block.scale2 - l.y);
        }
        pack(p, s);
        hold(p);
        wgmma_fence();
        weighted_sum(dv, p, block.tile(i) + STREAM_BYTES, BACKWARD_ROWS * 128);
        wgmma_commit();
        wgmma_wait<1>();
        hold(dp);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 d = shared_load_float2(statistics + 32 * j);
            dp[4 * j] = s[4 * j] * (dp[4 * j] - d.x);
            dp[4 * j + 1] = s[4 * j + 1] * (dp[4 * j + 1] - d.y);
            dp[4 * j + 2] = s[4 * j + 2] * (dp[4 * j + 2] - d.x);
            dp[4 * j + 3] = s[4 * j + 3] * (dp[4 * j + 3] - d.y);
        }
        pack(ds, dp);
        hold(ds);
        hold(dp);
        wgmma_fence();
        weighted_sum(dk, ds, block.tile(i), BACKWARD_ROWS * 128);
        wgmma_commit();
        wgmma_wait<1>();  // dv: without the registers of p there is room for the next scores
        hold(p);
        if (i + 1 == block.tiles) break;
        block.ring.wait_full(i + 1);
        wgmma_fence();
        block.issue_scores(s, dp, i + 1);
    }
    wgmma_wait<0>();
    hold(dk);
    hold(dv);
}

// Rows are queries, columns keys: dq += ds·k.
__device__ __forceinline__ void queries_gradient(const Backward& block, float (&dq)[R_D], float delta0, float delta1, float lse0,
                                                 float lse1) {
    float s[32], dp[32];
    unsigned ds[16];
    clear(dq);
    hold(dq);
    unsigned q[R_D / 2], d_o[R_D / 2];  // in registers: the streamed tiles alone keep shared memory busy enough
    auto issue_scores = [&](int i) {
        product_rows(s, q, block.tile(i), BACKWARD_ROWS * 128);
        wgmma_commit();
        product_rows(dp, d_o, block.tile(i) + STREAM_BYTES, BACKWARD_ROWS * 128);
        wgmma_commit();
    };
    barrier_wait(block.own_full, 0);
    load_rows(q, block.own1, block.warp, block.lane);
    load_rows(d_o, block.own2, block.warp, block.lane);
    block.ring.wait_full(0);
    hold(q);
    hold(d_o);
    wgmma_fence();
    issue_scores(0);
    for (int i = 0;; i++) {
        wgmma_wait<1>();  // scores, and everything of the tile before
        hold(s);
        hold(dq);
        hold(ds);
        if (i > 0) block.ring.release(i - 1, block.lane);
        if ((i + 1) * BACKWARD_ROWS > block.n) {
            const int keys = block.n - i * BACKWARD_ROWS - 2 * (block.lane & 3);  // that exist, from this thread's first on
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (8 * j >= keys) s[4 * j] = s[4 * j + 2] = -INFINITE;
                if (8 * j + 1 >= keys) s[4 * j + 1] = s[4 * j + 3] = -INFINITE;
            }
        }
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
            s[j] = exp2_fast(s[j] * block.scale2 - lse0);
            s[j + 1] = exp2_fast(s[j + 1] * block.scale2 - lse0);
            s[j + 2] = exp2_fast(s[j + 2] * block.scale2 - lse1);
            s[j + 3] = exp2_fast(s[j + 3] * block.scale2 - lse1);
        }
        hold(s);
        const bool last = i + 1 == block.tiles;
        if (!last) block.ring.wait_full(i + 1);  // here for the same reason as in the forward pass
        wgmma_wait<0>();
        hold(dp);
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
            dp[j] = s[j] * (dp[j] - delta0);
            dp[j + 1] = s[j + 1] * (dp[j + 1] - delta0);
            dp[j + 2] = s[j + 2] * (dp[j + 2] - delta1);
            dp[j + 3] = s[j + 3] * (dp[j + 3] - delta1);
        }
        pack(ds, dp);
        hold(ds);
        hold(s);
        hold(dp);
        wgmma_fence();
        weighted_sum(dq, ds, block.tile(i), BACKWARD_ROWS * 128);
        wgmma_commit();
        if (last) break;
        wgmma_fence();
        issue_scores(i + 1);
    }
    wgmma_wait<0>();
    hold(dq);
}

// dk and dv in the first ⌈n / 128⌉·h·b blocks, dq in as many more. BACKWARD_SHARED bytes. All boxes: 64 rows.
// scratch: see attention_delta.cu.
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward(
    half_bits* dq, long long dq_token, long long dq_head, long long dq_batch,
    half_bits* dk, long long dk_token, long long dk_head, long long dk_batch,
    half_bits* dv, long long dv_token, long long dv_head, long long dv_batch,
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
    const __grid_constant__ TensorMap d_o, const float* scratch, int b, int h, int n, int n_pad, float scale) {
    const unsigned own1 = (shared_base() + 1023) & ~1023u, own2 = own1 + OWN_BYTES, stream = own2 + OWN_BYTES,
                   statistics = stream + BACKWARD_STAGES * 2 * STREAM_BYTES, own_full = statistics + BACKWARD_STAGES * STATISTICS_BYTES;
    const Ring ring = {own_full + 8, own_full + 72, BACKWARD_STAGES};
    const int group = uniform(threadIdx.x >> 7), lane = threadIdx.x & 31;
    const int own_tiles = (n + OWN_ROWS - 1) / OWN_ROWS, tiles = (n + BACKWARD_ROWS - 1) / BACKWARD_ROWS;
    const bool keys = blockIdx.x < own_tiles * h * b;
    const int index = blockIdx.x - (keys ? 0 : own_tiles * h * b);
    const int first = index % own_tiles * OWN_ROWS, head = index / own_tiles % h, batch = index / own_tiles / h;
    const float* delta = scratch + ((long long)batch * h + head) * n_pad;
    const float* lse2 = delta + (long long)h * b * n_pad;
    if (threadIdx.x == 0) {
        barrier_init(own_full, 1);
        ring.init(keys ? 32 * WARPS : WARPS);
        barrier_init_done();
    }
    __syncthreads();

    if (group == 0) {
        registers_down<24>();
        if (threadIdx.x == 0) {
            const TensorMap &map1 = keys ? k : q, &map2 = keys ? v : d_o, &stream1 = keys ? q : k, &stream2 = keys ? d_o : v;
            barrier_expect(own_full, 2 * OWN_BYTES);
            load_tile(own1, map1, own_full, BACKWARD_ROWS, 2, first, head, batch);
            load_tile(own2, map2, own_full, BACKWARD_ROWS, 2, first, head, batch);
            for (int i = 0; i < tiles; i++) {
                const int stage = i % BACKWARD_STAGES;
                const unsigned full = ring.full + 8 * stage, to = stream + stage * 2 * STREAM_BYTES;
                ring.wait_empty(i);
                barrier_expect(full, 2 * STREAM_BYTES + (keys ? STATISTICS_BYTES : 0));
                load_tile(to, stream1, full, BACKWARD_ROWS, 1, i * BACKWARD_ROWS, head, batch);
                load_tile(to + STREAM_BYTES, stream2, full, BACKWARD_ROWS, 1, i * BACKWARD_ROWS, head, batch);
                if (keys) {
                    const unsigned at = statistics + stage * STATISTICS_BYTES;
                    bulk_load(at, delta + i * BACKWARD_ROWS, BACKWARD_ROWS * 4, full);
                    bulk_load(at + BACKWARD_ROWS * 4, lse2 + i * BACKWARD_ROWS, BACKWARD_ROWS * 4, full);
                }
            }
        }
    } else {
        registers_up<240>();
        const unsigned rows = (group - 1) * 64 * 128;
        const int warp = (threadIdx.x >> 5) & 3, own_first = first + (group - 1) * 64;
        const Backward block = {own1 + rows, own2 + rows, stream, statistics, own_full, ring, tiles, n, warp, lane, scale * LOG2_E};
        if (keys) {
            float dk_acc[R_D], dv_acc[R_D];
            keys_gradient(block, dk_acc, dv_acc);
            named_sync(group, 128);  // all four warps are done with the own rows: their place takes the output
            store_rows(dk + batch * dk_batch + head * dk_head, dk_token, own_first, n, dk_acc, scale, scale, own1 + rows, warp, lane);
            store_rows(dv + batch * dv_batch + head * dv_head, dv_token, own_first, n, dv_acc, 1.0f, 1.0f, own2 + rows, warp, lane);
        } else {
            const int row = own_first + warp * 16 + (lane >> 2);
            float dq_acc[R_D];
            queries_gradient(block, dq_acc, delta[row], delta[row + 8], lse2[row], lse2[row + 8]);
            named_sync(group, 128);
            store_rows(dq + batch * dq_batch + head * dq_head, dq_token, own_first, n, dq_acc, scale, scale, own1 + rows, warp, lane);
        }
    }
}
