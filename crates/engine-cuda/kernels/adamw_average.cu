// AdamW over one flat f32 buffer, the average of its values, and the values in T; see ops/average.rs.
//
//     m = β₁m + (1 − β₁)g     v = β₂v + (1 − β₂)g²     p = kept·p − rate·m/(√(v/c₂) + ε)     a = δa + (1 − δ)p
//
// Products and sums are rounded one by one, as the tensor operations of crates/pretrain are.

#include "common.cuh"

#define AVERAGE_THREADS 256

struct Numbers {
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float correction2, epsilon, rate, kept;
    float decay, one_minus_decay;
};

// n is a multiple of four. Grid: four elements a thread.
extern "C" __global__ void __launch_bounds__(AVERAGE_THREADS)
    adamw_average(float* values, float* first, float* second, float* averaged, T* shadow, const float* gradients,
                  const float* factor, const unsigned* flag, const Numbers* numbers, long long n) {
    const long long i = (long long)blockIdx.x * AVERAGE_THREADS + threadIdx.x;
    if (i >= n / 4 || *flag) return;
    const Numbers s = *numbers;
    const float scale = *factor;
    const auto load = [&](const float* p) { return reinterpret_cast<const float4*>(p)[i]; };
    const float4 p4 = load(values), m4 = load(first), v4 = load(second), a4 = load(averaged), g4 = load(gradients);
    float p[4] = {p4.x, p4.y, p4.z, p4.w}, m[4] = {m4.x, m4.y, m4.z, m4.w}, v[4] = {v4.x, v4.y, v4.z, v4.w};
    float a[4] = {a4.x, a4.y, a4.z, a4.w};
    const float gs[4] = {g4.x, g4.y, g4.z, g4.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const float g = __fmul_rn(gs[k], scale);
        m[k] = __fadd_rn(__fmul_rn(m[k], s.beta1), __fmul_rn(g, s.one_minus_beta1));
        v[k] = __fadd_rn(__fmul_rn(v[k], s.beta2), __fmul_rn(__fmul_rn(g, g), s.one_minus_beta2));
        const float root = __fadd_rn(__fsqrt_rn(__fdiv_rn(v[k], s.correction2)), s.epsilon);
        p[k] = __fsub_rn(__fmul_rn(p[k], s.kept), __fmul_rn(__fdiv_rn(m[k], root), s.rate));
        a[k] = __fadd_rn(__fmul_rn(a[k], s.decay), __fmul_rn(p[k], s.one_minus_decay));
    }
    const auto store = [&](float* to, const float* x) {
        reinterpret_cast<float4*>(to)[i] = make_float4(x[0], x[1], x[2], x[3]);
    };
    store(values, p), store(first, m), store(second, v), store(averaged, a);
    reinterpret_cast<uint2*>(shadow)[i] = make_uint2(pack2(p[0], p[1]), pack2(p[2], p[3]));
}
