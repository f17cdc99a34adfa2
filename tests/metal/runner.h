// What a kernel sees of the harness that runs it (runner.cpp): its place, the operations at which threads meet, types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace harness {

struct Position {
  unsigned x, y, z;
};

// --- 16-bit floats, rounded to nearest, ties to even --------------------------------------------------------------

struct Half {
  _Float16 value;
  Half() = default;
  Half(float x) : value(static_cast<_Float16>(x)) {}
  operator float() const { return static_cast<float>(value); }
};

struct Bfloat {
  uint16_t bits;
  Bfloat() = default;
  Bfloat(float x) {
    uint32_t all;
    std::memcpy(&all, &x, 4);
    const bool nan = (all & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? static_cast<uint16_t>((all >> 16) | 0x40) : static_cast<uint16_t>((all + 0x7fff + ((all >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t all = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &all, 4);
    return x;
  }
};

// --- where threads meet -----------------------------------------------------------------------------------------------

[[noreturn]] void fail(const char* message);
Position in_group();
Position group();
Position groups();
void barrier();
uint64_t exchange(uint64_t value, int from);  // what thread `from` of the SIMD group gives
void remember(void* address, size_t size);    // threadgroup memory, to be NaN before each group
int serve(void (*call)(char**));              // runs launches from standard input until it ends

inline int lane() { return static_cast<int>(in_group().x % 32); }

template <typename T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  uint64_t slot = 0;
  std::memcpy(&slot, &value, sizeof(T));
  slot = exchange(slot, from);
  std::memcpy(&value, &slot, sizeof(T));
  return value;
}

// Threadgroup memory that knows its size.
template <typename T, size_t COUNT>
struct Shared {
  T values[COUNT];
  Shared() {
    std::memset(values, 0xff, sizeof(values));
    remember(values, sizeof(values));
  }
  T& operator[](int64_t i) {
    if (i < 0 || i >= static_cast<int64_t>(COUNT)) fail("an index outside threadgroup memory");
    return values[i];
  }
};

}  // namespace harness
