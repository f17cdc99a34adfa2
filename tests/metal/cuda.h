// CUDA's names for a C++ compiler, and those of MLX's headers that its generated signatures use.
#pragma once

#include <array>

#include "runner.h"

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define threadIdx (harness::in_group())
#define blockIdx (harness::group())
#define gridDim (harness::groups())

typedef harness::Half __half;
typedef harness::Bfloat __nv_bfloat16;

inline void __syncthreads() { harness::barrier(); }
template <typename T> T __shfl_sync(unsigned, T value, int lane) { return harness::shuffle(value, lane); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return harness::shuffle(value, harness::lane() ^ mask);
}

namespace cooperative_groups {}
namespace mlx::core::cu {
using Shape = std::array<int32_t, 10>;
using Strides = std::array<int64_t, 10>;
}  // namespace mlx::core::cu
