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

// Values of the codes of the dynamic 8-bit maps: crates/quant's codebooks. A block copies what it needs to shared memory.
static __device__ const float SIGNED_MAP[256] = {
    -0.99296874f, -0.9789063f, -0.96484375f, -0.9507812f, -0.93671876f, -0.92265624f, -0.9085938f, -0.89453125f,
    -0.8804687f, -0.86640626f, -0.85234374f, -0.8382813f, -0.82421875f, -0.8101562f, -0.79609376f, -0.78203124f,
    -0.7679688f, -0.75390625f, -0.7398437f, -0.72578126f, -0.7117188f, -0.6976563f, -0.68359375f, -0.6695312f,
    -0.65546876f, -0.6414063f, -0.6273438f, -0.61328125f, -0.5992187f, -0.58515626f, -0.5710938f, -0.5570313f,
    -0.54296875f, -0.5289062f, -0.5148437f, -0.50078124f, -0.4867187f, -0.47265625f, -0.45859373f, -0.44453126f,
    -0.43046874f, -0.41640624f, -0.40234375f, -0.38828123f, -0.37421876f, -0.36015624f, -0.34609374f, -0.33203125f,
    -0.31796873f, -0.30390626f, -0.28984374f, -0.27578127f, -0.26171875f, -0.24765624f, -0.23359375f, -0.21953125f,
    -0.20546874f, -0.19140625f, -0.17734376f, -0.16328125f, -0.14921875f, -0.13515624f, -0.12109375f, -0.107031256f,
    -0.09859375f, -0.09578126f, -0.092968754f, -0.09015625f, -0.08734375f, -0.08453125f, -0.08171876f, -0.07890625f,
    -0.07609375f, -0.07328125f, -0.070468746f, -0.067656256f, -0.06484375f, -0.06203125f, -0.059218753f, -0.05640625f,
    -0.05359375f, -0.05078125f, -0.04796875f, -0.04515625f, -0.042343747f, -0.03953125f, -0.036718752f, -0.03390625f,
    -0.03109375f, -0.028281251f, -0.02546875f, -0.02265625f, -0.019843752f, -0.01703125f, -0.01421875f, -0.01140625f,
    -0.00971875f, -0.009156249f, -0.00859375f, -0.00803125f, -0.00746875f, -0.00690625f, -0.00634375f, -0.00578125f,
    -0.0052187503f, -0.0046562497f, -0.00409375f, -0.0035312497f, -0.00296875f, -0.00240625f, -0.00184375f,
    -0.0012812499f, -0.0009437501f, -0.00083125f, -0.00071875006f, -0.0006062501f, -0.00049375003f, -0.00038125002f,
    -0.00026875004f, -0.00015625001f, -8.875e-05f, -6.625e-05f, -4.375e-05f, -2.1249998e-05f, -7.75e-06f,
    -3.2500002e-06f, -5.5000004e-07f, 0.0f, 5.5000004e-07f, 3.2500002e-06f, 7.75e-06f, 2.1249998e-05f, 4.375e-05f,
    6.625e-05f, 8.875e-05f, 0.00015625001f, 0.00026875004f, 0.00038125002f, 0.00049375003f, 0.0006062501f,
    0.00071875006f, 0.00083125f, 0.0009437501f, 0.0012812499f, 0.00184375f, 0.00240625f, 0.00296875f, 0.0035312497f,
    0.00409375f, 0.0046562497f, 0.0052187503f, 0.00578125f, 0.00634375f, 0.00690625f, 0.00746875f, 0.00803125f,
    0.00859375f, 0.009156249f, 0.00971875f, 0.01140625f, 0.01421875f, 0.01703125f, 0.019843752f, 0.02265625f,
    0.02546875f, 0.028281251f, 0.03109375f, 0.03390625f, 0.036718752f, 0.03953125f, 0.042343747f, 0.04515625f,
    0.04796875f, 0.05078125f, 0.05359375f, 0.05640625f, 0.059218753f, 0.06203125f, 0.06484375f, 0.067656256f,
    0.070468746f, 0.07328125f, 0.07609375f, 0.07890625f, 0.08171876f, 0.08453125f, 0.08734375f, 0.09015625f,
    0.092968754f, 0.09578126f, 0.09859375f, 0.107031256f, 0.12109375f, 0.13515624f, 0.14921875f, 0.16328125f,
    0.17734376f, 0.19140625f, 0.20546874f, 0.21953125f, 0.23359375f, 0.24765624f, 0.26171875f, 0.27578127f,
    0.28984374f, 0.30390626f, 0.31796873f, 0.33203125f, 0.34609374f, 0.36015624f, 0.37421876f, 0.38828123f,
    0.40234375f, 0.41640624f, 0.43046874f, 0.44453126f, 0.45859373f, 0.47265625f, 0.4867187f, 0.50078124f, 0.5148437f,
    0.5289062f, 0.54296875f, 0.5570313f, 0.5710938f, 0.58515626f, 0.5992187f, 0.61328125f, 0.6273438f, 0.6414063f,
    0.65546876f, 0.6695312f, 0.68359375f, 0.6976563f, 0.7117188f, 0.72578126f, 0.7398437f, 0.75390625f, 0.7679688f,
    0.78203124f, 0.79609376f, 0.8101562f, 0.82421875f, 0.8382813f, 0.85234374f, 0.86640626f, 0.8804687f, 0.89453125f,
    0.9085938f, 0.92265624f, 0.93671876f, 0.9507812f, 0.96484375f, 0.9789063f, 0.99296874f, 1.0f};
static __device__ const float UNSIGNED_MAP[256] = {
    0.0f, 3.2500003e-07f, 7.75e-07f, 2.1249998e-06f, 4.3749997e-06f, 6.625e-06f, 8.874999e-06f, 1.5624999e-05f,
    2.6875001e-05f, 3.8125e-05f, 4.9374998e-05f, 6.0625003e-05f, 7.1875e-05f, 8.312499e-05f, 9.4375e-05f,
    0.000128125f, 0.000184375f, 0.00024062501f, 0.00029687502f, 0.00035312498f, 0.00040937503f, 0.00046562502f,
    0.00052187504f, 0.000578125f, 0.000634375f, 0.00069062505f, 0.000746875f, 0.0008031251f, 0.00085937505f,
    0.000915625f, 0.00097187504f, 0.001140625f, 0.001421875f, 0.001703125f, 0.001984375f, 0.002265625f, 0.0025468748f,
    0.002828125f, 0.0031093748f, 0.0033906251f, 0.003671875f, 0.003953125f, 0.0042343745f, 0.004515625f,
    0.0047968747f, 0.005078125f, 0.005359375f, 0.0056406246f, 0.005921875f, 0.0062031248f, 0.006484375f,
    0.0067656254f, 0.0070468746f, 0.007328125f, 0.0076093744f, 0.007890625f, 0.008171875f, 0.008453124f, 0.008734375f,
    0.009015624f, 0.0092968745f, 0.009578126f, 0.009859375f, 0.010703126f, 0.012109376f, 0.013515624f, 0.014921876f,
    0.016328124f, 0.017734377f, 0.019140625f, 0.020546874f, 0.021953126f, 0.023359375f, 0.024765624f, 0.026171876f,
    0.027578129f, 0.028984373f, 0.030390626f, 0.031796873f, 0.033203125f, 0.034609374f, 0.036015626f, 0.03742188f,
    0.038828123f, 0.040234376f, 0.041640624f, 0.043046873f, 0.044453125f, 0.045859374f, 0.047265626f, 0.04867187f,
    0.050078124f, 0.051484372f, 0.052890625f, 0.054296877f, 0.05570313f, 0.057109382f, 0.058515627f, 0.059921872f,
    0.061328124f, 0.06273438f, 0.06414063f, 0.06554688f, 0.06695312f, 0.068359375f, 0.06976563f, 0.07117188f,
    0.072578125f, 0.07398438f, 0.07539063f, 0.07679688f, 0.07820313f, 0.07960938f, 0.081015624f, 0.08242188f,
    0.08382813f, 0.085234374f, 0.086640626f, 0.08804687f, 0.08945312f, 0.090859376f, 0.09226563f, 0.09367188f,
    0.095078126f, 0.09648438f, 0.09789063f, 0.099296875f, 0.103515625f, 0.11054687f, 0.11757813f, 0.12460937f,
    0.13164061f, 0.13867188f, 0.14570314f, 0.15273437f, 0.15976563f, 0.16679686f, 0.17382812f, 0.18085939f,
    0.18789062f, 0.19492188f, 0.20195311f, 0.20898438f, 0.21601564f, 0.22304687f, 0.23007813f, 0.23710936f,
    0.24414062f, 0.25117186f, 0.25820312f, 0.26523438f, 0.2722656f, 0.27929688f, 0.28632814f, 0.29335937f, 0.3003906f,
    0.30742186f, 0.31445312f, 0.3214844f, 0.32851562f, 0.33554685f, 0.3425781f, 0.34960938f, 0.35664064f, 0.36367187f,
    0.3707031f, 0.37773436f, 0.38476562f, 0.3917969f, 0.39882812f, 0.40585935f, 0.4128906f, 0.41992188f, 0.42695314f,
    0.43398437f, 0.4410156f, 0.44804686f, 0.45507812f, 0.4621094f, 0.46914062f, 0.47617185f, 0.4832031f, 0.49023438f,
    0.4972656f, 0.5042969f, 0.5113281f, 0.51835936f, 0.5253906f, 0.5324218f, 0.53945315f, 0.54648435f, 0.5535157f,
    0.5605469f, 0.56757814f, 0.5746094f, 0.5816406f, 0.5886719f, 0.5957031f, 0.6027344f, 0.60976565f, 0.61679685f,
    0.6238282f, 0.6308594f, 0.63789064f, 0.6449219f, 0.6519531f, 0.6589844f, 0.6660156f, 0.6730469f, 0.68007815f,
    0.68710935f, 0.6941407f, 0.7011719f, 0.70820314f, 0.7152344f, 0.7222656f, 0.7292969f, 0.7363281f, 0.7433594f,
    0.75039065f, 0.75742185f, 0.7644532f, 0.7714844f, 0.7785156f, 0.7855469f, 0.7925781f, 0.7996094f, 0.8066406f,
    0.8136718f, 0.82070315f, 0.82773435f, 0.8347657f, 0.8417969f, 0.8488281f, 0.8558594f, 0.8628906f, 0.8699219f,
    0.8769531f, 0.8839843f, 0.89101565f, 0.89804685f, 0.9050782f, 0.9121094f, 0.9191406f, 0.9261719f, 0.9332031f,
    0.9402344f, 0.9472656f, 0.9542968f, 0.96132815f, 0.96835935f, 0.9753907f, 0.9824219f, 0.9894531f, 0.9964844f,
    1.0f};

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
