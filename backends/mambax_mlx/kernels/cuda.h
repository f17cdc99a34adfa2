// The names of the kernels' language, which are Metal's, on NVIDIA GPUs.

#define DEVICE_FUNCTION __device__ inline
#define UNROLL _Pragma("unroll")
#define SHARED(type, name, count) __shared__ type name[count]

#define thread
#define CONSTANT constexpr

#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)

#define threadgroup_barrier(flags) __syncthreads()
#define simd_shuffle(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define simd_shuffle_xor(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)

namespace mambax {

DEVICE_FUNCTION float exp(float x) { return ::expf(x); }
DEVICE_FUNCTION float exp2(float x) { return ::exp2f(x); }
DEVICE_FUNCTION float log(float x) { return ::logf(x); }
DEVICE_FUNCTION float abs(float x) { return ::fabsf(x); }
DEVICE_FUNCTION float max(float x, float y) { return ::fmaxf(x, y); }

}  // namespace mambax
