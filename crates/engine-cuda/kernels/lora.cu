// LoRA factors between the optimiser's layout (f32, tensor after tensor) and the products' (T, stacked and padded).
#include "common.cuh"

using i64 = long long;

// A strided rectangle to be copied: source and destination are element offsets into the two buffers.
struct Rectangle {
    i64 source;
    i64 target;
    int rows;
    int columns;
    int source_stride;
    int target_stride;
    float scale;
    int padding;
};

// One grid row per rectangle.
extern "C" __global__ void lora_pack(T* __restrict__ target, const float* __restrict__ source,
                                     const Rectangle* __restrict__ rectangles) {
    const Rectangle r = rectangles[blockIdx.y];
    const i64 count = (i64)r.rows * r.columns;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 row = i / r.columns, column = i % r.columns;
        target[r.target + row * r.target_stride + column] =
            from_f32(source[r.source + row * r.source_stride + column] * r.scale);
    }
}

extern "C" __global__ void lora_unpack(float* __restrict__ target, const float* __restrict__ source,
                                       const Rectangle* __restrict__ rectangles) {
    const Rectangle r = rectangles[blockIdx.y];
    const i64 count = (i64)r.rows * r.columns;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 row = i / r.columns, column = i % r.columns;
        target[r.target + row * r.target_stride + column] =
            source[r.source + row * r.source_stride + column] * r.scale;
    }
}
