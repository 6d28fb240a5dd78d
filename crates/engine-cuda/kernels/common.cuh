// What the kernels share: the 16-bit type `T`, vectors of eight values, sums over a warp or a block in a fixed order.
//
// Everything is computed in f32 and rounded once, to nearest even, when it is stored. No kernel uses floating-point
// atomics, so every result is the same from run to run. Conversions are written in PTX and no header is included: a
// machine with nothing but the driver and NVRTC can compile this.

// A 16-bit float as raw bits: bfloat16 with -DT_BF16, half precision with -DT_F16.
struct T {
    unsigned short bits;
};

#if defined(T_BF16)

// Two values, the first in the low half.
static __device__ __forceinline__ unsigned pack2(float first, float second) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}

static __device__ __forceinline__ float2 unpack2(unsigned bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

static __device__ __forceinline__ float to_f32(T t) { return __uint_as_float((unsigned)t.bits << 16); }

#elif defined(T_F16)

static __device__ __forceinline__ unsigned pack2(float first, float second) {
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}

static __device__ __forceinline__ float2 unpack2(unsigned bits) {
    float2 pair;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(bits));
    return pair;
}

static __device__ __forceinline__ float to_f32(T t) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(t.bits));
    return value;
}

#else
#error "define T_BF16 or T_F16"
#endif

static __device__ __forceinline__ T from_f32(float value) { return T{(unsigned short)(pack2(value, 0.0f) & 0xffffu)}; }

// Threads of a warp.
#define WARP 32
#define FULL_MASK 0xffffffffu

// Vec8 neighbouring values, 16 bytes.
struct Vec8 {
    float v[8];
};

static __device__ __forceinline__ Vec8 unpack8(uint4 bits) {
    Vec8 e;
    float2 pair = unpack2(bits.x);
    e.v[0] = pair.x, e.v[1] = pair.y;
    pair = unpack2(bits.y);
    e.v[2] = pair.x, e.v[3] = pair.y;
    pair = unpack2(bits.z);
    e.v[4] = pair.x, e.v[5] = pair.y;
    pair = unpack2(bits.w);
    e.v[6] = pair.x, e.v[7] = pair.y;
    return e;
}

static __device__ __forceinline__ uint4 pack8(const Vec8& e) {
    return make_uint4(pack2(e.v[0], e.v[1]), pack2(e.v[2], e.v[3]), pack2(e.v[4], e.v[5]), pack2(e.v[6], e.v[7]));
}

// `index` counts vectors of eight.
static __device__ __forceinline__ uint4 load_bits(const T* p, long long index) {
    return reinterpret_cast<const uint4*>(p)[index];
}

static __device__ __forceinline__ void store_bits(T* p, long long index, uint4 bits) {
    reinterpret_cast<uint4*>(p)[index] = bits;
}

static __device__ __forceinline__ Vec8 load8(const T* p, long long index) { return unpack8(load_bits(p, index)); }

static __device__ __forceinline__ void store8(T* p, long long index, const Vec8& e) { store_bits(p, index, pack8(e)); }

static __device__ __forceinline__ Vec8 load8_f32(const float* p, long long index) {
    const float4 a = reinterpret_cast<const float4*>(p)[2 * index];
    const float4 b = reinterpret_cast<const float4*>(p)[2 * index + 1];
    return Vec8{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

static __device__ __forceinline__ void store8_f32(float* p, long long index, const Vec8& e) {
    reinterpret_cast<float4*>(p)[2 * index] = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
    reinterpret_cast<float4*>(p)[2 * index + 1] = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
}

// The sum over groups of `LANES` neighbouring lanes, in each of them.
template <int LANES, typename V>
static __device__ __forceinline__ V group_sum(V value) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_MASK, value, offset);
    return value;
}

template <int LANES>
static __device__ __forceinline__ float group_max(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL_MASK, value, offset));
    return value;
}

// The sum over all `THREADS` threads of a block, in each of them. `scratch` has one place per warp, and may be used
// again only after another barrier.
template <int THREADS, typename V>
static __device__ __forceinline__ V block_sum(V value, V* scratch) {
    value = group_sum<WARP>(value);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    V total = scratch[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / WARP; ++warp) total += scratch[warp];
    return total;
}

// The smallest divisor of a block's values: crates/quant's number. It is subnormal.
#define SMALLEST_SCALE 1e-38f

// A block of zeros is told from its bits and divided by 1: its codes and its scale do not depend on how subnormal
// numbers are treated. `largest` is the largest magnitude of a block, not negative.
static __device__ __forceinline__ bool all_zeros(float largest) { return __float_as_uint(largest) == 0u; }

// The scale that is stored with a block.
static __device__ __forceinline__ float stored_scale(float largest, bool full) {
    const bool as_it_is = full || (!all_zeros(largest) && largest >= SMALLEST_SCALE);
    return as_it_is ? largest : SMALLEST_SCALE;
}

// How a block's values are brought to [-1, 1] before they become codes. A full block is multiplied by a reciprocal and
// a short one divided, as crates/quant: the two can differ in the last bit and so in the code.
struct Scaler {
    float factor; // the reciprocal or the divisor
    bool full;
};

static __device__ __forceinline__ Scaler scaler_of(float largest, bool full) {
    const float divisor = all_zeros(largest) ? 1.0f : fmaxf(largest, SMALLEST_SCALE);
    return Scaler{full ? __fdiv_rn(1.0f, divisor) : divisor, full};
}

static __device__ __forceinline__ float scaled(const Scaler& s, float value) {
    const float quotient = s.full ? __fmul_rn(value, s.factor) : __fdiv_rn(value, s.factor);
    return fminf(fmaxf(quotient, -1.0f), 1.0f);
}

// The code of the nearest value of a 256-entry map: the number of the 255 midpoints that `value` is greater than.
static __device__ __forceinline__ unsigned dynamic_code(const float* midpoints, float value) {
    unsigned code = 0;
#pragma unroll
    for (unsigned step = 128; step > 0; step /= 2)
        if (midpoints[code + step - 1] < value) code += step;
    return code;
}

// Bound `i` of `count` from 0.1 to 1, each half counted from its own end, as torch's linspace.
static __device__ __forceinline__ float tenth_to_one(int i, int count) {
    const float step = __fdiv_rn(1.0f - 0.1f, (float)(count - 1));
    return i < count / 2 ? __fmaf_rn(step, (float)i, 0.1f) : __fmaf_rn(-step, (float)(count - i - 1), 1.0f);
}

// The value of a code of the dynamic 8-bit map, signed or unsigned: crates/quant's codebook, entry by entry.
template <bool SIGNED>
static __device__ __forceinline__ float dynamic_value(int code) {
    const float decades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    const int zero = SIGNED ? 127 : 0;
    if (code == zero) return 0.0f;
    if (code == 255) return 1.0f;
    // Among the values of one sign, decade d has 2^d parts (unsigned: 2^(d+1)) and comes after all smaller ones.
    const int place = (code > zero ? code - zero : zero - code) - (SIGNED ? 0 : -1);
    int decade = 0;
    while (place >> (decade + 1)) ++decade;
    const int parts = 1 << decade, part = place - parts;
    const float middle = (tenth_to_one(part, parts + 1) + tenth_to_one(part + 1, parts + 1)) / 2.0f;
    const float value = __fmul_rn(decades[SIGNED ? decade : decade - 1], middle);
    return code > zero ? value : -value;
}

// Values of the 16 codes of NF4: crates/quant's.
static __constant__ const float NF4_VALUES[16] = {
    -1.0f,       -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
    0.0795803f,  0.1609302f,  0.2461123f,   0.33791524f, 0.44070983f,  0.562617f,    0.72295684f,   1.0f};

// The scale of a block of 64 whose scale is doubly quantised; `map` has the values of the signed dynamic codes.
static __device__ __forceinline__ float nf4_double_scale(const float* map, const unsigned char* codes,
                                                         const float* nested_absmax, float mean, long long block) {
    return __fadd_rn(__fmul_rn(map[codes[block]], nested_absmax[block / 256]), mean);
}

// 2√(2/π), and the cubic's factor.
#define GELU_SLOPE 1.5957691216057308f
#define GELU_CUBIC 0.044715f

// x·sigmoid(2u), u = √(2/π)(x + 0.044715x³): the tanh form of GELU, with one exponential.
static __device__ __forceinline__ float gelu(float x) {
    const float twice_u = GELU_SLOPE * x * fmaf(GELU_CUBIC * x, x, 1.0f);
    return __fdividef(x, 1.0f + __expf(-twice_u));
}

static __device__ __forceinline__ float gelu_slope(float x) {
    // Beyond ±20 the slope is 1 or 0 to the last bit, and squares cannot overflow.
    x = fminf(fmaxf(x, -20.0f), 20.0f);
    const float square = x * x;
    const float s = __fdividef(1.0f, 1.0f + __expf(-GELU_SLOPE * x * fmaf(GELU_CUBIC, square, 1.0f)));
    return fmaf(x * s * (1.0f - s), GELU_SLOPE * fmaf(3.0f * GELU_CUBIC, square, 1.0f), s);
}
