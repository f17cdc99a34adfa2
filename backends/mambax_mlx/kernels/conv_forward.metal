// Causal depthwise convolution with bias and SiLU. One thread to SPAN steps of a channel, with the last K inputs in
// registers. Where positions are masked, `last` holds for each position the latest one up to it that exists, or -1.
//
// Threadgroups: (channels / THREADS, length / SPAN, rows).

const int length = x_shape[1];
const int channels = x_shape[2];
const int row = int(threadgroup_position_in_grid.z);
const int start = int(threadgroup_position_in_grid.y) * SPAN;
const int channel = int(threadgroup_position_in_grid.x) * THREADS + int(thread_position_in_threadgroup.x);

if (channel < channels) {
  const auto x_row = x + row * x_strides[0] + channel * x_strides[2];
  const auto steps_row = steps + row * steps_strides[0];
  const float shift = HAS_BIAS ? float(bias[channel]) : 0.0f;
  float taps[K];
  float window[K];  // the newest input last
  UNROLL for (int k = 0; k < K; ++k) taps[k] = float(weight[int64_t(channel) * K + k]);

  int place = start - 1;
  int older = K - 2;  // of the initial state, from its newest
  bool cut = false;   // a sequence began: what is older counts as zero
  UNROLL for (int k = K - 2; k >= 0; --k) {
    if (STEPS == mambax::MASKED && place >= 0) place = int(steps_row[place * steps_strides[1]]);
    if (place >= 0) {
      window[k] = cut ? 0.0f : float(x_row[place * x_strides[1]]);
      if (STEPS == mambax::PACKED) cut = cut || bool(steps_row[place * steps_strides[1]]);
    } else {
      window[k] = HAS_STATE && !cut ? float(state[(int64_t(row) * (K - 1) + older) * channels + channel]) : 0.0f;
      --older;
    }
    --place;
  }

  const int stop = start + SPAN < length ? start + SPAN : length;
  for (int t = start; t < stop; ++t) {
    const int64_t out = (int64_t(row) * length + t) * channels + channel;
    if (STEPS == mambax::MASKED && int(steps_row[t * steps_strides[1]]) != t) {
      y[out] = T(0.0f);
      continue;
    }
    if (STEPS == mambax::PACKED && bool(steps_row[t * steps_strides[1]])) {
      UNROLL for (int k = 0; k < K - 1; ++k) window[k] = 0.0f;
    }
    window[K - 1] = float(x_row[t * x_strides[1]]);
    float sum = shift;
    UNROLL for (int k = 0; k < K; ++k) sum += taps[k] * window[k];
    y[out] = T(SILU ? mambax::silu(sum) : sum);
    UNROLL for (int k = 0; k < K - 1; ++k) window[k] = window[k + 1];
  }
  if (stop == length) {
    UNROLL for (int k = 0; k < K - 1; ++k) {
      final_state[(int64_t(row) * (K - 1) + k) * channels + channel] = T(window[k]);
    }
  }
}
