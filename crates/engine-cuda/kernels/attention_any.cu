// Attention for any head width up to 256, one block per row: correct and slow, for models too small to matter.
// Scores of a row lie in shared memory, so a row has at most 12,000 keys.
#include "common.cuh"

using i64 = long long;
#define THREADS 128

struct Strides {
    int token;
    int head;
    i64 batch;
};

static __device__ __forceinline__ i64 offset_of(Strides s, int batch, int head, int token) {
    return (i64)batch * s.batch + (i64)head * s.head + (i64)token * s.token;
}

static __device__ __forceinline__ float dot(const T* a, const T* b, int dh) {
    float sum = 0.0f;
    for (int c = 0; c < dh; ++c) sum += to_f32(a[c]) * to_f32(b[c]);
    return sum;
}

static __device__ float block_max(float x, float* shared) {
    x = group_max<WARP>(x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    float most = shared[0];
    for (int i = 1; i < THREADS / WARP; ++i) most = fmaxf(most, shared[i]);
    __syncthreads();
    return most;
}

// grid (n, h, b)
extern "C" __global__ void attention_any_forward(T* o, float* lse, const T* q, const T* k, const T* v, int o_token,
                                                 int o_head, i64 o_batch, int q_token, int q_head, i64 q_batch,
                                                 int k_token, int k_head, i64 k_batch, int v_token, int v_head,
                                                 i64 v_batch, int n, int dh, float scale) {
    extern __shared__ float scores[];
    __shared__ float reduce[32];
    const int row = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const T* q_row = q + offset_of({q_token, q_head, q_batch}, batch, head, row);
    float most = -__int_as_float(0x7f800000);
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        const float score = scale * dot(q_row, k + offset_of({k_token, k_head, k_batch}, batch, head, j), dh);
        scores[j] = score;
        most = fmaxf(most, score);
    }
    most = block_max(most, reduce);
    float sum = 0.0f;
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        const float e = expf(scores[j] - most);
        scores[j] = e;
        sum += e;
    }
    sum = block_sum<THREADS>(sum, reduce);
    __syncthreads();
    for (int c = threadIdx.x; c < dh; c += blockDim.x) {
        float mixed = 0.0f;
        for (int j = 0; j < n; ++j)
            mixed += scores[j] * to_f32(v[offset_of({v_token, v_head, v_batch}, batch, head, j) + c]);
        o[offset_of({o_token, o_head, o_batch}, batch, head, row) + c] = from_f32(mixed / sum);
    }
    if (threadIdx.x == 0) lse[((i64)batch * gridDim.y + head) * n + row] = most + logf(sum);
}

// grid (n, h, b): the gradient of one query, and delta = Σ do·o.
extern "C" __global__ void attention_any_backward_q(T* dq, float* delta, const T* d_o, const T* o, const float* lse,
                                                    const T* q, const T* k, const T* v, int dq_token, int dq_head,
                                                    i64 dq_batch, int do_token, int do_head, i64 do_batch, int o_token,
                                                    int o_head, i64 o_batch, int q_token, int q_head, i64 q_batch,
                                                    int k_token, int k_head, i64 k_batch, int v_token, int v_head,
                                                    i64 v_batch, int n, int dh, float scale) {
    extern __shared__ float scores[];
    __shared__ float reduce[32];
    const int row = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const T* q_row = q + offset_of({q_token, q_head, q_batch}, batch, head, row);
    const T* do_row = d_o + offset_of({do_token, do_head, do_batch}, batch, head, row);
    const T* o_row = o + offset_of({o_token, o_head, o_batch}, batch, head, row);
    float sum = 0.0f;
    for (int c = threadIdx.x; c < dh; c += blockDim.x) sum += to_f32(do_row[c]) * to_f32(o_row[c]);
    const float d = block_sum<THREADS>(sum, reduce);
    const i64 index = ((i64)batch * gridDim.y + head) * n + row;
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        const float score = scale * dot(q_row, k + offset_of({k_token, k_head, k_batch}, batch, head, j), dh);
        const float p = expf(score - lse[index]);
        const float dp = dot(do_row, v + offset_of({v_token, v_head, v_batch}, batch, head, j), dh);
        scores[j] = p * (dp - d) * scale;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < dh; c += blockDim.x) {
        float gradient = 0.0f;
        for (int j = 0; j < n; ++j)
            gradient += scores[j] * to_f32(k[offset_of({k_token, k_head, k_batch}, batch, head, j) + c]);
        dq[offset_of({dq_token, dq_head, dq_batch}, batch, head, row) + c] = from_f32(gradient);
    }
    if (threadIdx.x == 0) delta[index] = d;
}

// grid (n, h, b): the gradients of one key and value. Shared memory holds p and ds of all queries.
extern "C" __global__ void attention_any_backward_kv(T* dk, T* dv, const float* delta, const T* d_o, const float* lse,
                                                     const T* q, const T* k, const T* v, int dk_token, int dk_head,
                                                     i64 dk_batch, int dv_token, int dv_head, i64 dv_batch,
                                                     int do_token, int do_head, i64 do_batch, int q_token, int q_head,
                                                     i64 q_batch, int k_token, int k_head, i64 k_batch, int v_token,
                                                     int v_head, i64 v_batch, int n, int dh, float scale) {
    extern __shared__ float scores[];
    float* p = scores;
    float* ds = scores + n;
    const int column = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const T* k_row = k + offset_of({k_token, k_head, k_batch}, batch, head, column);
    const T* v_row = v + offset_of({v_token, v_head, v_batch}, batch, head, column);
    const i64 base = ((i64)batch * gridDim.y + head) * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float score = scale * dot(q + offset_of({q_token, q_head, q_batch}, batch, head, i), k_row, dh);
        p[i] = expf(score - lse[base + i]);
        const float dp = dot(d_o + offset_of({do_token, do_head, do_batch}, batch, head, i), v_row, dh);
        ds[i] = p[i] * (dp - delta[base + i]) * scale;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < dh; c += blockDim.x) {
        float gk = 0.0f, gv = 0.0f;
        for (int i = 0; i < n; ++i) {
            gv += p[i] * to_f32(d_o[offset_of({do_token, do_head, do_batch}, batch, head, i) + c]);
            gk += ds[i] * to_f32(q[offset_of({q_token, q_head, q_batch}, batch, head, i) + c]);
        }
        dk[offset_of({dk_token, dk_head, dk_batch}, batch, head, column) + c] = from_f32(gk);
        dv[offset_of({dv_token, dv_head, dv_batch}, batch, head, column) + c] = from_f32(gv);
    }
}
