// A batch from tables that lie on the device: latents drawn from their posteriors, noise, mixture and target; captions.
//
// Normal numbers come from Philox4x32-10 (Salmon et al. 2011) and Box–Muller, four to a draw: draw `index` of `purpose`
// has counter (index low, index high, purpose, 0) and the seed as key. Element e of a batch is number e % 4 of draw e/4,
// elements counted as the tokens have them.

#include "common.cuh"

#define DRAW_THREADS 256

#define POSTERIOR 0u
#define NOISE 1u

static __device__ __forceinline__ uint4 philox(unsigned long long index, unsigned purpose, unsigned long long seed) {
    uint4 c = make_uint4((unsigned)index, (unsigned)(index >> 32), purpose, 0u);
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned low0 = 0xD2511F53u * c.x, high0 = __umulhi(0xD2511F53u, c.x);
        const unsigned low1 = 0xCD9E8D57u * c.z, high1 = __umulhi(0xCD9E8D57u, c.z);
        c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c;
}

// Two normal numbers from two words: a uniform one above 0 of 24 bits, and a turn.
static __device__ __forceinline__ float2 box_muller(unsigned a, unsigned b) {
    const float u = ((float)(a >> 8) + 0.5f) * 0x1p-24f, radius = sqrtf(-2.0f * logf(u));
    float s, c;
    sincospif((float)(b >> 8) * 0x1p-23f, &s, &c);
    return make_float2(radius * c, radius * s);
}

static __device__ __forceinline__ float4 normals(unsigned long long index, unsigned purpose, unsigned long long seed) {
    const uint4 w = philox(index, purpose, seed);
    const float2 a = box_muller(w.x, w.y), b = box_muller(w.z, w.w);
    return make_float4(a.x, a.y, b.x, b.y);
}

// Places of pictures and rows come from a table on the device, which nobody has compared with `rows`: one beyond the last
// reads the last.
static __device__ __forceinline__ long long place_in(const unsigned* places, int i, int rows) {
    return min(places[i], (unsigned)(rows - 1));
}

// Tokens [b, h/2·w/2, 4c] of latents [rows, c, h, w]: x₀ = mean + deviation·n, x_t = (1 − σ)x₀ + σε, target = ε − x₀.
// One thread for the four cells of one channel of one token.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
    draw(T* x_t, float* target, const float* mean, const float* deviation, const unsigned* pictures,
         const float* sigma, const unsigned long long* seed, int b, int c, int h, int w, int rows) {
    const long long i = (long long)blockIdx.x * DRAW_THREADS + threadIdx.x;
    const int tokens = (h / 2) * (w / 2);
    if (i >= (long long)b * tokens * c) return;
    const int channel = (int)(i % c);
    const long long token = i / c;
    const int sample = (int)(token / tokens), place = (int)(token % tokens);
    const int row = place / (w / 2) * 2, column = place % (w / 2) * 2;
    const long long at = ((place_in(pictures, sample, rows) * c + channel) * h + row) * w + column;
    const float4 n = normals(i, POSTERIOR, *seed), e = normals(i, NOISE, *seed);
    const float s = sigma[sample], rest = 1.0f - s;
    const float draws[4] = {n.x, n.y, n.z, n.w}, noise[4] = {e.x, e.y, e.z, e.w};
    float mixed[4], velocity[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const long long cell = at + (k / 2) * w + k % 2;
        const float x = fmaf(deviation[cell], draws[k], mean[cell]);
        mixed[k] = __fadd_rn(__fmul_rn(rest, x), __fmul_rn(s, noise[k]));
        velocity[k] = noise[k] - x;
    }
    reinterpret_cast<uint2*>(x_t)[i] = make_uint2(pack2(mixed[0], mixed[1]), pack2(mixed[2], mixed[3]));
    reinterpret_cast<float4*>(target)[i] = make_float4(velocity[0], velocity[1], velocity[2], velocity[3]);
}

// out[i] = table[rows[i]]. Grid: (b, chunks of the row).
extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
    gather_rows(T* out, const T* table, const unsigned* places, int width, int rows) {
    const T* from = table + place_in(places, blockIdx.x, rows) * width;
    T* to = out + (long long)blockIdx.x * width;
    const int i = blockIdx.y * DRAW_THREADS + threadIdx.x;
    if (width % 8 == 0) {
        if (i < width / 8) store_bits(to, i, load_bits(from, i));
    } else {
        for (int j = i * 8; j < i * 8 + 8 && j < width; ++j) to[j] = from[j];
    }
}
