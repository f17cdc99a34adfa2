// The names of the kernels' language on Apple GPUs: they are Metal's own.

#define DEVICE_FUNCTION inline
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHARED(type, name, count) threadgroup type name[count]
#define CONSTANT constexpr constant

namespace mambax {

DEVICE_FUNCTION float exp(float x) { return metal::precise::exp(x); }
DEVICE_FUNCTION float exp2(float x) { return metal::precise::exp2(x); }
DEVICE_FUNCTION float log(float x) { return metal::precise::log(x); }
DEVICE_FUNCTION float abs(float x) { return metal::fabs(x); }
DEVICE_FUNCTION float max(float x, float y) { return metal::fmax(x, y); }

}  // namespace mambax
