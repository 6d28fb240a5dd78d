// From a fused product [rows, q | k | v] to what attention reads: RMSNorm and rotary embedding of every query and key
// head, values copied; and back.
//
//     n = x/√(mean(x²) + eps)·w        out₂ᵢ = n₂ᵢ cosᵢ − n₂ᵢ₊₁ sinᵢ        out₂ᵢ₊₁ = n₂ᵢ₊₁ cosᵢ + n₂ᵢ sinᵢ
//
// Rows of the input are the tokens of one stream, `n` per sample; row t of a sample goes to row token_offset + t of the
// sample's n_total rows, so that two streams are joined in passing. Tables are [n_total, dh], every value twice.
// One block per token, so that its angles are loaded once for all heads. The 64- and 128-wide forms give eight channels
// to a lane; the form for any even width up to 256 gives a warp to a head. A null v_out (dv) leaves values alone.

#include "common.cuh"

#define ROPE_THREADS 128
#define ROPE_WARPS (ROPE_THREADS / WARP)

struct Placement {
    long long in_row;
    long long out_row;
    long long position;
};

static __device__ __forceinline__ Placement place(int n, int n_total, int token_offset) {
    const int sample = blockIdx.x / n, position = token_offset + blockIdx.x % n;
    return Placement{(long long)blockIdx.x, (long long)sample * n_total + position, position};
}

static __device__ __forceinline__ Placement place_row(int row, int n, int n_total, int token_offset) {
    const int sample = row / n, position = token_offset + row % n;
    return Placement{(long long)row, (long long)sample * n_total + position, position};
}

// Cosines and sines of the four pairs of a lane.
struct Angles {
    float cos[4], sin[4];
};

static __device__ __forceinline__ Angles load_angles(const float* cos, const float* sin, long long first) {
    const Vec8 c = load8_f32(cos + first, 0), s = load8_f32(sin + first, 0);
    Angles a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.cos[i] = c.v[2 * i], a.sin[i] = s.v[2 * i];
    return a;
}

template <int LANES>
static __device__ __forceinline__ float inverse_root(const Vec8& x, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(x.v[j], x.v[j], squares);
    return 1.0f / sqrtf(group_sum<LANES>(squares) / (float)(8 * LANES) + eps);
}

template <int LANES>
static __device__ __forceinline__ Vec8 norm_rotate(const Vec8& x, const Vec8& w, const Angles& a, float eps) {
    const float r = inverse_root<LANES>(x, eps);
    Vec8 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float even = x.v[2 * i] * r * w.v[2 * i], odd = x.v[2 * i + 1] * r * w.v[2 * i + 1];
        out.v[2 * i] = even * a.cos[i] - odd * a.sin[i];
        out.v[2 * i + 1] = odd * a.cos[i] + even * a.sin[i];
    }
    return out;
}

template <int LANES>
static __device__ __forceinline__ Vec8 norm_rotate_backward(const Vec8& dout, const Vec8& x, const Vec8& w,
                                                             const Angles& a, float eps) {
    const float r = inverse_root<LANES>(x, eps);
    Vec8 g;
    float product = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float even = dout.v[2 * i], odd = dout.v[2 * i + 1];
        g.v[2 * i] = (even * a.cos[i] + odd * a.sin[i]) * w.v[2 * i];
        g.v[2 * i + 1] = (odd * a.cos[i] - even * a.sin[i]) * w.v[2 * i + 1];
        product = fmaf(g.v[2 * i], x.v[2 * i], product);
        product = fmaf(g.v[2 * i + 1], x.v[2 * i + 1], product);
    }
    product = group_sum<LANES>(product) / (float)(8 * LANES) * r * r;
#pragma unroll
    for (int j = 0; j < 8; ++j) g.v[j] = r * (g.v[j] - x.v[j] * product);
    return g;
}

template <int DH>
static __device__ __forceinline__ void forward(T* q_out, T* k_out, T* v_out, const T* qkv, const T* wq, const T* wk,
                                               const float* cos, const float* sin, int n, int n_total, int token_offset,
                                               int heads, int in_stride, int out_stride, float eps) {
    constexpr int LANES = DH / 8, HEADS = WARP / LANES;
    const Placement p = place(n, n_total, token_offset);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = lane % LANES;
    const Vec8 weight_q = load8(wq, part), weight_k = load8(wk, part);
    const Angles angles = load_angles(cos, sin, p.position * DH + part * 8);
    const T* q_in = qkv + p.in_row * in_stride;
    const long long out = p.out_row * out_stride;
    for (int first = warp * HEADS; first < heads; first += ROPE_WARPS * HEADS) {
        const int head = first + lane / LANES;
        const bool here = head < heads; // all lanes take part in the sums
        const int i = head * LANES + part, d = heads * LANES;
        const uint4 zero = make_uint4(0, 0, 0, 0);
        const uint4 q = here ? load_bits(q_in, i) : zero;
        const uint4 k = here ? load_bits(q_in, i + d) : zero;
        const uint4 v = here && v_out ? load_bits(q_in, i + 2 * d) : zero;
        const Vec8 q_done = norm_rotate<LANES>(unpack8(q), weight_q, angles, eps);
        const Vec8 k_done = norm_rotate<LANES>(unpack8(k), weight_k, angles, eps);
        if (here) {
            store8(q_out + out, i, q_done);
            store8(k_out + out, i, k_done);
            if (v_out) store_bits(v_out + out, i, v);
        }
    }
}

template <int DH>
static __device__ __forceinline__ void backward(T* dqkv, const T* dq, const T* dk, const T* dv, const T* qkv,
                                                const T* wq, const T* wk, const float* cos, const float* sin, int n,
                                                int n_total, int token_offset, int heads, int in_stride,
                                                int out_stride, float eps) {
    constexpr int LANES = DH / 8, HEADS = WARP / LANES;
    const Placement p = place(n, n_total, token_offset);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = lane % LANES;
    const Vec8 weight_q = load8(wq, part), weight_k = load8(wk, part);
    const Angles angles = load_angles(cos, sin, p.position * DH + part * 8);
    const T* q_in = qkv + p.in_row * in_stride;
    T* d_row = dqkv + p.in_row * in_stride;
    const long long out = p.out_row * out_stride;
    for (int first = warp * HEADS; first < heads; first += ROPE_WARPS * HEADS) {
        const int head = first + lane / LANES;
        const bool here = head < heads;
        const int i = head * LANES + part, d = heads * LANES;
        const uint4 zero = make_uint4(0, 0, 0, 0);
        const uint4 q = here ? load_bits(q_in, i) : zero;
        const uint4 k = here ? load_bits(q_in, i + d) : zero;
        const uint4 q_grad = here ? load_bits(dq + out, i) : zero;
        const uint4 k_grad = here ? load_bits(dk + out, i) : zero;
        const uint4 v_grad = here && dv ? load_bits(dv + out, i) : zero;
        const Vec8 q_done = norm_rotate_backward<LANES>(unpack8(q_grad), unpack8(q), weight_q, angles, eps);
        const Vec8 k_done = norm_rotate_backward<LANES>(unpack8(k_grad), unpack8(k), weight_k, angles, eps);
        if (here) {
            store8(d_row, i, q_done);
            store8(d_row, i + d, k_done);
            if (dv) store_bits(d_row, i + 2 * d, v_grad);
        }
    }
}

#define FORWARD(DH)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(ROPE_THREADS) qk_norm_rope_##DH(                                      \
        T* q_out, T* k_out, T* v_out, const T* qkv, const T* wq, const T* wk, const float* cos, const float* sin,      \
        int n, int n_total, int token_offset, int heads, int in_stride, int out_stride, float eps) {                   \
        forward<DH>(q_out, k_out, v_out, qkv, wq, wk, cos, sin, n, n_total, token_offset, heads, in_stride,            \
                    out_stride, eps);                                                                                  \
    }
#define BACKWARD(DH)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(ROPE_THREADS) qk_norm_rope_backward_##DH(                             \
        T* dqkv, const T* dq, const T* dk, const T* dv, const T* qkv, const T* wq, const T* wk, const float* cos,      \
        const float* sin, int n, int n_total, int token_offset, int heads, int in_stride, int out_stride, float eps) { \
        backward<DH>(dqkv, dq, dk, dv, qkv, wq, wk, cos, sin, n, n_total, token_offset, heads, in_stride, out_stride,  \
                     eps);                                                                                             \
    }
// Grid of all: b·n.
FORWARD(64)
FORWARD(128)
BACKWARD(64)
BACKWARD(128)

// As `forward`, one warp to a row's group of heads: for rows of few heads, of which a block would leave warps idle.
// Grid: items over ROWS_WARPS.
#define ROWS_THREADS 256
#define ROWS_WARPS (ROWS_THREADS / WARP)

template <int DH>
static __device__ __forceinline__ void forward_rows(T* q_out, T* k_out, T* v_out, const T* qkv, const T* wq,
                                                    const T* wk, const float* cos, const float* sin, int rows, int n,
                                                    int n_total, int token_offset, int heads, int in_stride,
                                                    int out_stride, float eps) {
    constexpr int LANES = DH / 8, HEADS = WARP / LANES;
    const int groups = (heads + HEADS - 1) / HEADS, d = heads * LANES;
    const int item = blockIdx.x * ROWS_WARPS + threadIdx.x / WARP;
    if (item >= rows * groups) return;
    const Placement p = place_row(item / groups, n, n_total, token_offset);
    const int lane = threadIdx.x % WARP, part = lane % LANES, head = item % groups * HEADS + lane / LANES;
    const bool here = head < heads; // all lanes take part in the sums
    const int i = head * LANES + part;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const T* q_in = qkv + p.in_row * in_stride;
    const uint4 q = here ? load_bits(q_in, i) : zero;
    const uint4 k = here ? load_bits(q_in, i + d) : zero;
    const uint4 v = here ? load_bits(q_in, i + 2 * d) : zero;
    const Angles angles = load_angles(cos, sin, p.position * DH + part * 8);
    const Vec8 q_done = norm_rotate<LANES>(unpack8(q), load8(wq, part), angles, eps);
    const Vec8 k_done = norm_rotate<LANES>(unpack8(k), load8(wk, part), angles, eps);
    const long long out = p.out_row * out_stride;
    if (here) {
        store8(q_out + out, i, q_done);
        store8(k_out + out, i, k_done);
        store_bits(v_out + out, i, v);
    }
}

#define FORWARD_ROWS(DH)                                                                                               \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS) qk_norm_rope_rows_##DH(                                 \
        T* q_out, T* k_out, T* v_out, const T* qkv, const T* wq, const T* wk, const float* cos, const float* sin,      \
        int rows, int n, int n_total, int token_offset, int heads, int in_stride, int out_stride, float eps) {         \
        forward_rows<DH>(q_out, k_out, v_out, qkv, wq, wk, cos, sin, rows, n, n_total, token_offset, heads, in_stride, \
                         out_stride, eps);                                                                             \
    }
FORWARD_ROWS(64)
FORWARD_ROWS(128)

// Pairs of a head that one lane holds in the form for any width.
#define PAIRS 4

static __device__ __forceinline__ unsigned load_pair(const T* head, int pair) {
    return reinterpret_cast<const unsigned*>(head)[pair];
}

static __device__ __forceinline__ void store_pair(T* head, int pair, unsigned bits) {
    reinterpret_cast<unsigned*>(head)[pair] = bits;
}

// One head of queries or keys, by one warp.
static __device__ __forceinline__ void any_head(T* out, const T* in, const T* w, const float* cos, const float* sin,
                                                int dh, float eps) {
    const int lane = threadIdx.x % WARP;
    float2 x[PAIRS];
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int pair = lane + k * WARP;
        x[k] = 2 * pair < dh ? unpack2(load_pair(in, pair)) : make_float2(0.0f, 0.0f);
        squares += x[k].x * x[k].x + x[k].y * x[k].y;
    }
    const float r = 1.0f / sqrtf(group_sum<WARP>(squares) / (float)dh + eps);
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int pair = lane + k * WARP;
        if (2 * pair < dh) {
            const float2 weight = unpack2(load_pair(w, pair));
            const float even = x[k].x * r * weight.x, odd = x[k].y * r * weight.y;
            const float c = cos[2 * pair], s = sin[2 * pair];
            store_pair(out, pair, pack2(even * c - odd * s, odd * c + even * s));
        }
    }
}

static __device__ __forceinline__ void any_head_backward(T* dx, const T* dout, const T* in, const T* w,
                                                         const float* cos, const float* sin, int dh, float eps) {
    const int lane = threadIdx.x % WARP;
    float2 x[PAIRS], g[PAIRS];
    float squares = 0.0f, product = 0.0f;
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int pair = lane + k * WARP;
        x[k] = g[k] = make_float2(0.0f, 0.0f);
        if (2 * pair < dh) {
            x[k] = unpack2(load_pair(in, pair));
            const float2 weight = unpack2(load_pair(w, pair)), d = unpack2(load_pair(dout, pair));
            const float c = cos[2 * pair], s = sin[2 * pair];
            g[k] = make_float2((d.x * c + d.y * s) * weight.x, (d.y * c - d.x * s) * weight.y);
        }
        squares += x[k].x * x[k].x + x[k].y * x[k].y;
        product += g[k].x * x[k].x + g[k].y * x[k].y;
    }
    const float r = 1.0f / sqrtf(group_sum<WARP>(squares) / (float)dh + eps);
    product = group_sum<WARP>(product) / (float)dh * r * r;
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int pair = lane + k * WARP;
        if (2 * pair < dh)
            store_pair(dx, pair, pack2(r * (g[k].x - x[k].x * product), r * (g[k].y - x[k].y * product)));
    }
}

static __device__ __forceinline__ void copy_head(T* out, const T* in, int dh) {
    for (int pair = threadIdx.x % WARP; 2 * pair < dh; pair += WARP) store_pair(out, pair, load_pair(in, pair));
}

// Grid: b·n.
extern "C" __global__ void __launch_bounds__(ROPE_THREADS)
    qk_norm_rope_any(T* q_out, T* k_out, T* v_out, const T* qkv, const T* wq, const T* wk, const float* cos,
                     const float* sin, int n, int n_total, int token_offset, int heads, int dh, int in_stride,
                     int out_stride, float eps) {
    const Placement p = place(n, n_total, token_offset);
    const T* in = qkv + p.in_row * in_stride;
    const long long out = p.out_row * out_stride, table = p.position * dh;
    const int d = heads * dh;
    for (int head = threadIdx.x / WARP; head < heads; head += ROPE_WARPS) {
        const int at = head * dh;
        any_head(q_out + out + at, in + at, wq, cos + table, sin + table, dh, eps);
        any_head(k_out + out + at, in + d + at, wk, cos + table, sin + table, dh, eps);
        if (v_out) copy_head(v_out + out + at, in + 2 * d + at, dh);
    }
}

// Grid: b·n.
extern "C" __global__ void __launch_bounds__(ROPE_THREADS)
    qk_norm_rope_backward_any(T* dqkv, const T* dq, const T* dk, const T* dv, const T* qkv, const T* wq, const T* wk,
                              const float* cos, const float* sin, int n, int n_total, int token_offset, int heads,
                              int dh, int in_stride, int out_stride, float eps) {
    const Placement p = place(n, n_total, token_offset);
    const T* in = qkv + p.in_row * in_stride;
    T* d_row = dqkv + p.in_row * in_stride;
    const long long out = p.out_row * out_stride, table = p.position * dh;
    const int d = heads * dh;
    for (int head = threadIdx.x / WARP; head < heads; head += ROPE_WARPS) {
        const int at = head * dh;
        any_head_backward(d_row + at, dq + out + at, in + at, wq, cos + table, sin + table, dh, eps);
        any_head_backward(d_row + d + at, dk + out + at, in + d + at, wk, cos + table, sin + table, dh, eps);
        if (dv) copy_head(d_row + 2 * d + at, dv + out + at, dh);
    }
}

// Going back with the gradients of the norms' weights too: Σ over tokens and heads of (the turned-back gradient)·x·r.
// Warps take rows in turn; blocks write their sums of queries' and keys' weights to partials[block][2][dh], which
// `finish_sums_f32` adds up. The 64- and 128-wide forms have a grid of (parts of rows, groups of heads) and also sum up
// the result, for the bias before it, to bias_partials[part][3·d].
#define SUM_THREADS 256
#define SUM_WARPS (SUM_THREADS / WARP)

template <int LANES>
static __device__ __forceinline__ Vec8 norm_rotate_backward_sums(const Vec8& dout, const Vec8& x, const Vec8& w,
                                                                 const Angles& a, float eps, Vec8& sums) {
    const float r = inverse_root<LANES>(x, eps);
    Vec8 g;
    float product = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float even = dout.v[2 * i], odd = dout.v[2 * i + 1];
        g.v[2 * i] = even * a.cos[i] + odd * a.sin[i];
        g.v[2 * i + 1] = odd * a.cos[i] - even * a.sin[i];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        sums.v[j] = fmaf(g.v[j], x.v[j] * r, sums.v[j]);
        g.v[j] *= w.v[j];
        product = fmaf(g.v[j], x.v[j], product);
    }
    product = group_sum<LANES>(product) / (float)(8 * LANES) * r * r;
#pragma unroll
    for (int j = 0; j < 8; ++j) g.v[j] = r * (g.v[j] - x.v[j] * product);
    return g;
}

template <int DH>
static __device__ __forceinline__ void backward_sums(T* dqkv, float* partials, float* bias_partials, const T* dq,
                                                     const T* dk, const T* dv, const T* qkv, const T* wq, const T* wk,
                                                     const float* cos, const float* sin, int rows, int n, int n_total,
                                                     int token_offset, int heads, int in_stride, int out_stride,
                                                     float eps) {
    constexpr int LANES = DH / 8, HEADS = WARP / LANES, GROUP = WARP * 8;
    __shared__ __align__(16) float scratch[SUM_WARPS][5][GROUP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = lane % LANES, d = heads * LANES;
    const int head = blockIdx.y * HEADS + lane / LANES, i = head * LANES + part;
    const bool here = head < heads; // all lanes take part in the sums
    const Vec8 weight_q = load8(wq, part), weight_k = load8(wk, part);
    // Of the weights of queries and keys, then of the results of queries, keys and values.
    Vec8 sums[5];
#pragma unroll
    for (int o = 0; o < 5; ++o)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[o].v[j] = 0.0f;
    for (int row = blockIdx.x * SUM_WARPS + warp; row < rows; row += gridDim.x * SUM_WARPS) {
        const Placement p = place_row(row, n, n_total, token_offset);
        const T* q_in = qkv + p.in_row * in_stride;
        T* d_row = dqkv + p.in_row * in_stride;
        const long long out = p.out_row * out_stride;
        const uint4 zero = make_uint4(0, 0, 0, 0);
        const uint4 q = here ? load_bits(q_in, i) : zero;
        const uint4 k = here ? load_bits(q_in, i + d) : zero;
        const uint4 q_grad = here ? load_bits(dq + out, i) : zero;
        const uint4 k_grad = here ? load_bits(dk + out, i) : zero;
        const uint4 v_grad = here ? load_bits(dv + out, i) : zero;
        const Angles angles = load_angles(cos, sin, p.position * DH + part * 8);
        const Vec8 q_done =
            norm_rotate_backward_sums<LANES>(unpack8(q_grad), unpack8(q), weight_q, angles, eps, sums[0]);
        const Vec8 k_done =
            norm_rotate_backward_sums<LANES>(unpack8(k_grad), unpack8(k), weight_k, angles, eps, sums[1]);
        const Vec8 v_done = unpack8(v_grad);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sums[2].v[j] += q_done.v[j];
            sums[3].v[j] += k_done.v[j];
            sums[4].v[j] += v_done.v[j];
        }
        if (here) {
            store8(d_row, i, q_done);
            store8(d_row, i + d, k_done);
            store_bits(d_row, i + 2 * d, v_grad);
        }
    }
#pragma unroll
    for (int o = 0; o < 5; ++o) store8_f32(scratch[warp][o], lane, sums[o]);
    __syncthreads();
    const int column = blockIdx.y * GROUP + threadIdx.x, width = heads * DH;
    if (column < width) {
        float* to = bias_partials + (long long)blockIdx.x * 3 * width + column;
#pragma unroll
        for (int o = 0; o < 3; ++o) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < SUM_WARPS; ++w) total += scratch[w][2 + o][threadIdx.x];
            to[o * width] = total;
        }
    }
    if (threadIdx.x >= 2 * DH) return;
    const int side = threadIdx.x / DH, channel = threadIdx.x % DH;
    float total = 0.0f;
    for (int w = 0; w < SUM_WARPS; ++w)
#pragma unroll
        for (int h = 0; h < HEADS; ++h) total += scratch[w][side][h * DH + channel];
    const long long block = (long long)blockIdx.x * gridDim.y + blockIdx.y;
    partials[(block * 2 + side) * DH + channel] = total;
}

#define BACKWARD_SUMS(DH)                                                                                              \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS) qk_norm_rope_backward_sums_##DH(                         \
        T* dqkv, float* partials, float* bias_partials, const T* dq, const T* dk, const T* dv, const T* qkv,           \
        const T* wq, const T* wk, const float* cos, const float* sin, int rows, int n, int n_total, int token_offset,  \
        int heads, int in_stride, int out_stride, float eps) {                                                         \
        backward_sums<DH>(dqkv, partials, bias_partials, dq, dk, dv, qkv, wq, wk, cos, sin, rows, n, n_total,          \
                          token_offset, heads, in_stride, out_stride, eps);                                            \
    }
BACKWARD_SUMS(64)
BACKWARD_SUMS(128)

static __device__ __forceinline__ void any_head_backward_sums(T* dx, const T* dout, const T* in, const T* w,
                                                              const float* cos, const float* sin, int dh, float eps,
                                                              float2 (&sums)[PAIRS]) {
    const int lane = threadIdx.x % WARP;
    float2 x[PAIRS], g[PAIRS];
    float squares = 0.0f, product = 0.0f;
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int pair = lane + k * WARP;
        x[k] = 2 * pair < dh ? unpack2(load_pair(in, pair)) : make_float2(0.0f, 0.0f);
        squares += x[k].x * x[k].x + x[k].y * x[k].y;
    }
    const float r = 1.0f / sqrtf(group_sum<WARP>(squares) / (float)dh + eps);
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int pair = lane + k * WARP;
        g[k] = make_float2(0.0f, 0.0f);
        if (2 * pair < dh) {
            const float2 weight = unpack2(load_pair(w, pair)), d = unpack2(load_pair(dout, pair));
            const float c = cos[2 * pair], s = sin[2 * pair];
            const float even = d.x * c + d.y * s, odd = d.y * c - d.x * s;
            sums[k].x = fmaf(even, x[k].x * r, sums[k].x);
            sums[k].y = fmaf(odd, x[k].y * r, sums[k].y);
            g[k] = make_float2(even * weight.x, odd * weight.y);
        }
        product += g[k].x * x[k].x + g[k].y * x[k].y;
    }
    product = group_sum<WARP>(product) / (float)dh * r * r;
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        const int pair = lane + k * WARP;
        if (2 * pair < dh)
            store_pair(dx, pair, pack2(r * (g[k].x - x[k].x * product), r * (g[k].y - x[k].y * product)));
    }
}

// For any width: warps take pairs of row and head in turn.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    qk_norm_rope_backward_sums_any(T* dqkv, float* partials, const T* dq, const T* dk, const T* dv, const T* qkv,
                                   const T* wq, const T* wk, const float* cos, const float* sin, int rows, int n,
                                   int n_total, int token_offset, int heads, int dh, int in_stride, int out_stride,
                                   float eps) {
    __shared__ float2 scratch[SUM_WARPS][2][WARP * PAIRS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, d = heads * dh;
    float2 q_sums[PAIRS], k_sums[PAIRS];
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) q_sums[k] = k_sums[k] = make_float2(0.0f, 0.0f);
    const long long items = (long long)rows * heads, step = (long long)gridDim.x * SUM_WARPS;
    for (long long item = (long long)blockIdx.x * SUM_WARPS + warp; item < items; item += step) {
        const Placement p = place_row((int)(item / heads), n, n_total, token_offset);
        const int at = (int)(item % heads) * dh;
        const T* in = qkv + p.in_row * in_stride;
        T* d_row = dqkv + p.in_row * in_stride;
        const long long out = p.out_row * out_stride, table = p.position * dh;
        any_head_backward_sums(d_row + at, dq + out + at, in + at, wq, cos + table, sin + table, dh, eps, q_sums);
        any_head_backward_sums(d_row + d + at, dk + out + at, in + d + at, wk, cos + table, sin + table, dh, eps,
                               k_sums);
        copy_head(d_row + 2 * d + at, dv + out + at, dh);
    }
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        scratch[warp][0][lane + k * WARP] = q_sums[k];
        scratch[warp][1][lane + k * WARP] = k_sums[k];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * dh; i += SUM_THREADS) {
        const int side = i / dh, channel = i % dh;
        float total = 0.0f;
        for (int w = 0; w < SUM_WARPS; ++w) {
            const float2 pair = scratch[w][side][channel / 2];
            total += channel % 2 ? pair.y : pair.x;
        }
        partials[((long long)blockIdx.x * 2 + side) * dh + channel] = total;
    }
}
