// Metal's names for a C++ compiler: the part of the Metal shading language that the kernels use, run as on a GPU.
#pragma once

#include "runner.h"

#define thread
#ifdef ADDRESS_SPACES  // clang can keep them apart as Metal does, in code that is compiled but not run: the types of
                       // 16 bits must be built in, and any will do
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup static __attribute__((address_space(3)))
typedef _Float16 half;
typedef _Float16 bfloat;
#else
#define device
#define constant
#define threadgroup static
typedef harness::Half half;
typedef harness::Bfloat bfloat;
#endif

typedef unsigned int uint;
typedef harness::Position uint3;
typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
namespace precise {
inline float exp(float x) { return std::exp(x); }
inline float exp2(float x) { return std::exp2(x); }
inline float log(float x) { return std::log(x); }
}  // namespace precise
inline float fabs(float x) { return std::fabs(x); }
inline float fmax(float x, float y) { return std::fmax(x, y); }
inline void threadgroup_barrier(mem_flags) { harness::barrier(); }
template <typename T> T simd_shuffle(T value, unsigned short lane) { return harness::shuffle(value, lane); }
template <typename T> T simd_shuffle_xor(T value, unsigned short mask) {
  return harness::shuffle(value, harness::lane() ^ mask);
}
}  // namespace metal

using namespace metal;
