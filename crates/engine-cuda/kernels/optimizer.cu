// The optimiser over one flat f32 buffer of many tensors: global norm, clipping, AdamW with f32 or 8-bit moments.
//
// Bit for bit what crates/quant computes on the same gradients: products and sums that it does not fuse are not fused
// here. Nothing is read back: whether a step happens, and the step's numbers, are decided on the device, so one CUDA
// graph serves every step. A tensor is cut into blocks of up to 256 elements, one warp each; the last may be short.

#include "common.cuh"

#define STEP_THREADS 256
#define BLOCK_LEN 256
#define PER_LANE (BLOCK_LEN / WARP)
// Above this the square of a gradient overflows f32.
#define LARGEST_GRADIENT 1.8446743e19f

// Where a block lies: in parameters and gradients, and in the moments.
struct Block {
    unsigned start;
    unsigned len;
    unsigned state;
    unsigned scale; // of 8-bit moments: the index of its absmax
};

// The scalars of one step, computed in f64 and rounded once.
struct StepNumbers {
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float epsilon, epsilon_corrected;
    float decay;
    float correction2;
    float step_size;           // −lr / c1
    float step_size_corrected; // −lr·c2 / c1
};

// Σ (unscale·g)² of a block's part, in f64, to partials[block]. Any grid.
extern "C" __global__ void __launch_bounds__(STEP_THREADS)
    sum_squares(double* partials, const float* g, long long n, float unscale) {
    __shared__ double scratch[STEP_THREADS / WARP];
    double sum = 0.0;
    const long long stride = (long long)gridDim.x * STEP_THREADS, vectors = n / 4;
    const auto add = [&](float value) {
        const double x = (double)__fmul_rn(value, unscale);
        sum = fma(x, x, sum);
    };
    for (long long i = (long long)blockIdx.x * STEP_THREADS + threadIdx.x; i < vectors; i += stride) {
        const float4 four = reinterpret_cast<const float4*>(g)[i];
        add(four.x), add(four.y), add(four.z), add(four.w);
    }
    if (blockIdx.x == 0 && threadIdx.x < n % 4) add(g[n - n % 4 + threadIdx.x]);
    sum = block_sum<STEP_THREADS>(sum, scratch);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// norm = √Σ partials. One block.
extern "C" __global__ void __launch_bounds__(STEP_THREADS)
    finish_norm(float* norm, const double* partials, int num_partials) {
    __shared__ double scratch[STEP_THREADS / WARP];
    double sum = 0.0;
    for (int i = threadIdx.x; i < num_partials; i += STEP_THREADS) sum += partials[i];
    sum = block_sum<STEP_THREADS>(sum, scratch);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

// factor = min(1, max_norm/(norm + 1e-6))·unscale and flag = 0; 0 and 1 if the norm is not finite. One thread.
extern "C" __global__ void clip_factor(float* factor, unsigned* flag, const float* norm, float max_norm,
                                       float unscale) {
    const float value = *norm;
    const bool finite = (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
    *factor = finite ? fminf(__fdiv_rn(max_norm, __fadd_rn(value, 1e-6f)), 1.0f) * unscale : 0.0f;
    *flag = finite ? 0u : 1u;
}

// beta^step by repeated squaring, in the order of LLVM's __powidf2, which Rust's powi calls.
static __device__ double power(double beta, unsigned step) {
    double result = 1.0;
    while (true) {
        if (step & 1u) result = __dmul_rn(result, beta);
        step /= 2;
        if (step == 0) return result;
        beta = __dmul_rn(beta, beta);
    }
}

// Counts the step, unless `flag` says that it is skipped, and computes its numbers. One thread.
extern "C" __global__ void step_numbers(StepNumbers* numbers, unsigned* steps, const unsigned* flag,
                                        const double* learning_rate, double beta1, double beta2, double epsilon,
                                        double weight_decay) {
    if (*flag) return;
    const unsigned step = *steps + 1;
    *steps = step;
    const double lr = *learning_rate;
    const double correction1 = __dsub_rn(1.0, power(beta1, step));
    const double correction2 = __dsqrt_rn(__dsub_rn(1.0, power(beta2, step)));
    StepNumbers s;
    s.beta1 = (float)beta1;
    s.one_minus_beta1 = (float)(1.0 - beta1);
    s.beta2 = (float)beta2;
    s.one_minus_beta2 = (float)(1.0 - beta2);
    s.epsilon = (float)epsilon;
    s.epsilon_corrected = (float)(epsilon * correction2);
    s.decay = (float)__dsub_rn(1.0, __dmul_rn(lr, weight_decay));
    s.correction2 = (float)correction2;
    s.step_size = (float)__ddiv_rn(-lr, correction1);
    s.step_size_corrected = (float)__ddiv_rn(__dmul_rn(-lr, correction2), correction1);
    *numbers = s;
}

static __device__ __forceinline__ float next_first(const StepNumbers& s, float g, float m) {
    return __fmaf_rn(g, s.one_minus_beta1, __fmul_rn(m, s.beta1));
}

static __device__ __forceinline__ float next_second(const StepNumbers& s, float g, float v) {
    return __fmaf_rn(__fmul_rn(s.one_minus_beta2, g), g, __fmul_rn(v, s.beta2));
}

// p·decay + (step_size·m)/(√v/c2 + ε), each operation rounded.
static __device__ __forceinline__ float moved(const StepNumbers& s, float p, float m, float v) {
    const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.correction2), s.epsilon);
    return __fadd_rn(__fmul_rn(p, s.decay), __fdiv_rn(__fmul_rn(s.step_size, m), root));
}

// f32 moments. `small` chooses the order of operations that tensors too small for 8 bits have there; otherwise it is
// torch's. An element whose gradient is not usable keeps its parameter and loses its moments. `shadow`, if not null,
// receives the parameters in T. Any grid.
extern "C" __global__ void __launch_bounds__(STEP_THREADS)
    adamw_f32(float* parameters, T* shadow, float* first, float* second, const float* gradients, const Block* blocks,
              int num_blocks, const float* factor, const unsigned* flag, const StepNumbers* numbers, int small) {
    if (*flag) return;
    const StepNumbers s = *numbers;
    const float scale = *factor;
    const int lane = threadIdx.x % WARP, num_warps = gridDim.x * (STEP_THREADS / WARP);
    for (int b = (blockIdx.x * STEP_THREADS + threadIdx.x) / WARP; b < num_blocks; b += num_warps) {
        const Block block = blocks[b];
        for (unsigned j = lane; j < block.len; j += WARP) {
            const long long i = (long long)block.start + j, state = (long long)block.state + j;
            const float g = __fmul_rn(gradients[i], scale);
            float p = parameters[i], m = first[state], v = second[state];
            if (fabsf(g) <= LARGEST_GRADIENT) {
                if (small) {
                    m = next_first(s, g, m);
                    v = next_second(s, g, v);
                    const float update = __fdiv_rn(m, __fadd_rn(__fsqrt_rn(v), s.epsilon_corrected));
                    p = __fmaf_rn(update, s.step_size_corrected, __fmul_rn(p, s.decay));
                } else {
                    const float distance = __fsub_rn(g, m);
                    m = s.one_minus_beta1 < 0.5f
                            ? __fmaf_rn(s.one_minus_beta1, distance, m)
                            : __fsub_rn(g, __fmul_rn(distance, __fsub_rn(1.0f, s.one_minus_beta1)));
                    v = next_second(s, g, v);
                    p = moved(s, p, m, v);
                }
                parameters[i] = p;
            } else {
                m = v = 0.0f;
            }
            first[state] = m;
            second[state] = v;
            if (shadow) shadow[i] = from_f32(p);
        }
    }
}

// One moment's block from f32 to codes. `midpoints` are in shared memory.
static __device__ __forceinline__ void store_codes(unsigned char* codes, float* absmax, const float* midpoints,
                                                   const float (&values)[PER_LANE], unsigned len) {
    const int lane = threadIdx.x % WARP;
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) largest = fmaxf(largest, fabsf(values[k]));
    largest = group_max<WARP>(largest);
    const bool full = len == BLOCK_LEN;
    if (lane == 0) *absmax = stored_scale(largest, full);
    const Scaler s = scaler_of(largest, full);
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
        const unsigned j = lane + k * WARP;
        if (j < len) codes[j] = (unsigned char)dynamic_code(midpoints, scaled(s, values[k]));
    }
}

// 8-bit moments: parameters see the new moments before these are rounded to codes. The
// grid should be small, because every block makes the midpoints anew.
extern "C" __global__ void __launch_bounds__(STEP_THREADS)
    adamw_8bit(float* parameters, T* shadow, unsigned char* first, float* first_absmax, unsigned char* second,
               float* second_absmax, const float* gradients, const Block* blocks, int num_blocks,
               const float* factor, const unsigned* flag, const StepNumbers* numbers) {
    if (*flag) return;
    __shared__ float signed_map[256], unsigned_map[256], signed_midpoints[256], unsigned_midpoints[256];
    const int t = threadIdx.x;
    signed_map[t] = SIGNED_MAP[t];
    unsigned_map[t] = UNSIGNED_MAP[t];
    __syncthreads();
    signed_midpoints[t] = t < 255 ? (signed_map[t] + signed_map[t + 1]) / 2.0f : 0.0f;
    unsigned_midpoints[t] = t < 255 ? (unsigned_map[t] + unsigned_map[t + 1]) / 2.0f : 0.0f;
    __syncthreads();
    const StepNumbers s = *numbers;
    const float scale = *factor;
    const int lane = t % WARP, num_warps = gridDim.x * (STEP_THREADS / WARP);
    for (int b = (blockIdx.x * STEP_THREADS + t) / WARP; b < num_blocks; b += num_warps) {
        const Block block = blocks[b];
        const long long start = block.start, state = block.state;
        const float m_scale = first_absmax[block.scale], v_scale = second_absmax[block.scale];
        float p[PER_LANE], g[PER_LANE], m[PER_LANE], v[PER_LANE];
        unsigned m_code[PER_LANE], v_code[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            const unsigned j = lane + k * WARP;
            const bool here = j < block.len;
            p[k] = here ? parameters[start + j] : 0.0f;
            g[k] = here ? gradients[start + j] : 0.0f;
            m_code[k] = here ? first[state + j] : 0u;
            v_code[k] = here ? second[state + j] : 0u;
        }
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            const unsigned j = lane + k * WARP;
            g[k] = __fmul_rn(g[k], scale);
            m[k] = __fmul_rn(signed_map[m_code[k]], m_scale);
            v[k] = __fmul_rn(unsigned_map[v_code[k]], v_scale);
            if (j >= block.len) {
                m[k] = v[k] = 0.0f;
            } else if (fabsf(g[k]) <= LARGEST_GRADIENT) {
                m[k] = next_first(s, g[k], m[k]);
                v[k] = next_second(s, g[k], v[k]);
                p[k] = moved(s, p[k], m[k], v[k]);
                parameters[start + j] = p[k];
            } else {
                m[k] = v[k] = 0.0f;
            }
            if (shadow && j < block.len) shadow[start + j] = from_f32(p[k]);
        }
        // Every lane has read the old scales: the shuffles of store_codes stand before lane 0 writes the new ones.
        store_codes(first + state, first_absmax + block.scale, signed_midpoints, m, block.len);
        store_codes(second + state, second_absmax + block.scale, unsigned_midpoints, v, block.len);
    }
}
