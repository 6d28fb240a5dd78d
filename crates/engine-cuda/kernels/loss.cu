// Both ends of the network: noise in, loss and its gradient out, and the sampler's step. See crates/flow-matching.

#include "common.cuh"

#define LOSS_THREADS 256

// Samples of `per_sample` elements, a multiple of eight, so that no vector straddles two.

// x_t = (1 − σ)x₀ + σε, target = ε − x₀. Grid: chunks of eight elements a thread, in all b·per_sample.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS)
    noise_mix(T* x_t, float* target, const float* x0, const float* eps, const float* sigma, int b,
              long long per_sample) {
    const long long i = (long long)blockIdx.x * LOSS_THREADS + threadIdx.x;
    if (i * 8 >= b * per_sample) return;
    const float s = sigma[i * 8 / per_sample], rest = 1.0f - s;
    const Vec8 x = load8_f32(x0, i), e = load8_f32(eps, i);
    Vec8 mixed, velocity;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        // Not contracted, so that the mixture is flow-matching's to the last bit.
        mixed.v[j] = __fadd_rn(__fmul_rn(rest, x.v[j]), __fmul_rn(s, e.v[j]));
        velocity.v[j] = e.v[j] - x.v[j];
    }
    store8(x_t, i, mixed);
    store8_f32(target, i, velocity);
}

// dvelocity = gradient_scale·w·e with e = velocity − target; a block's Σ w e² goes to partials[block]. Any grid.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS)
    weighted_mse(float* partials, T* dvelocity, const T* velocity, const float* target, const float* weight, int b,
                 long long per_sample, float gradient_scale) {
    __shared__ float scratch[LOSS_THREADS / WARP];
    float sum = 0.0f;
    const long long vectors = b * per_sample / 8;
    for (long long i = (long long)blockIdx.x * LOSS_THREADS + threadIdx.x; i < vectors;
         i += (long long)gridDim.x * LOSS_THREADS) {
        const float w = weight[i * 8 / per_sample];
        const Vec8 v = load8(velocity, i), t = load8_f32(target, i);
        Vec8 gradient;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float error = v.v[j] - t.v[j];
            sum = fmaf(w * error, error, sum);
            gradient.v[j] = gradient_scale * (w * error);
        }
        store8(dvelocity, i, gradient);
    }
    sum = block_sum<LOSS_THREADS>(sum, scratch);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// loss += Σ partials / mean_over. One block.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS)
    add_loss(float* loss, const float* partials, int num_partials, float mean_over) {
    __shared__ double scratch[LOSS_THREADS / WARP];
    double sum = 0.0;
    for (int i = threadIdx.x; i < num_partials; i += LOSS_THREADS) sum += (double)partials[i];
    sum = block_sum<LOSS_THREADS>(sum, scratch);
    if (threadIdx.x == 0) *loss += (float)(sum / (double)mean_over);
}

// sample += (σ′ − σ)·v with v the velocity, or v₋ + guidance·(v₊ − v₋) if there are two copies (v₊ first); the new
// sample goes to every copy of the model's input. coefficients: [σ′ − σ, guidance]. Grid: chunks of eight elements.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS)
    euler_cfg(float* sample, T* model_input, const T* velocity, const float* coefficients, long long n, int copies) {
    const long long i = (long long)blockIdx.x * LOSS_THREADS + threadIdx.x, vectors = n / 8;
    if (i >= vectors) return;
    const float step = coefficients[0];
    Vec8 v = load8(velocity, i), x = load8_f32(sample, i);
    if (copies == 2) {
        const float guidance = coefficients[1];
        const Vec8 negative = load8(velocity, vectors + i);
#pragma unroll
        for (int j = 0; j < 8; ++j)
            v.v[j] = __fadd_rn(negative.v[j], __fmul_rn(v.v[j] - negative.v[j], guidance));
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) x.v[j] = __fadd_rn(x.v[j], __fmul_rn(v.v[j], step));
    store8_f32(sample, i, x);
    for (int copy = 0; copy < copies; ++copy) store8(model_input, copy * vectors + i, x);
}
