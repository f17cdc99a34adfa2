// What the kernels share, in either dialect. A SIMD group is 32 threads.

namespace mambax {

CONSTANT float LOG2_E = 1.44269504088896341f;
CONSTANT float LN_2 = 0.693147180559945309f;
CONSTANT float CUT = 3.0e38f;  // a sum of time steps across which no state passes

enum Steps { EVERY, MASKED, PACKED };  // of a row: all exist; some do not; some begin a new sequence

// log(1 + e^x), exact to units of the last place at both ends; log1p after Goldberg (1991, theorem 4).
DEVICE_FUNCTION float softplus(float x) {
  const float e = exp(-abs(x));
  const float w = 1.0f + e;
  return max(x, 0.0f) + (w == 1.0f ? e : log(w) * (e / (w - 1.0f)));
}

DEVICE_FUNCTION float sigmoid(float x) {
  const float e = exp(-abs(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// A time step within its limits, the lower of which holds if it is above zero.
DEVICE_FUNCTION float limited(float x, float low, float high) {
  const float raised = low > 0.0f && x < low ? low : x;
  return raised > high ? high : raised;
}

DEVICE_FUNCTION float silu(float x) { return x * sigmoid(x); }

// The derivative of silu.
DEVICE_FUNCTION float silu_slope(float x) {
  const float s = sigmoid(x);
  return s + x * s * (1.0f - s);
}

// Sums each of COUNT values over the threads of a SIMD group whose numbers differ in the bits LOW to HIGH / 2, and
// leaves a thread with its share of the sums: of the P = HIGH / LOW threads, number p = lane / LOW % P holds the sums
// p * COUNT / P on in values[0] on; where COUNT < P, P / COUNT threads in succession hold the same sum. At each of
// the first steps a thread hands over the half that it will not keep, so that COUNT sums take about COUNT shuffles.
template <int COUNT, int LOW, int HIGH>
DEVICE_FUNCTION void scatter_sum(thread float* values, int lane) {
  int count = COUNT;
  UNROLL for (int bit = HIGH / 2; bit >= LOW; bit /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = (lane & bit) != 0;
      UNROLL for (int i = 0; i < COUNT / 2; ++i) {
        if (i < count) {
          const float given = upper ? values[i] : values[i + count];
          const float kept = upper ? values[i + count] : values[i];
          values[i] = kept + simd_shuffle_xor(given, bit);
        }
      }
    } else {
      values[0] += simd_shuffle_xor(values[0], bit);
    }
  }
}

}  // namespace mambax
