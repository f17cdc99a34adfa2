// Causal depthwise convolution, backward. One thread to SPAN steps of a channel: it goes through them and the next K-1
// that exist, which their inputs reach. An input stays in the window for K steps and takes its gradient with it. Where
// positions are masked, `steps` is as in conv_forward, and `next` holds the first position from each one on that
// exists, or the length. The shares of the threads in the gradients of the weight and the bias are summed outside.
//
// Threadgroups: (channels / THREADS, length / SPAN, rows).

const int length = x_shape[1];
const int channels = x_shape[2];
const int row = int(threadgroup_position_in_grid.z);
const int span = int(threadgroup_position_in_grid.y);
const int start = span * SPAN;
const int stop = start + SPAN < length ? start + SPAN : length;
const int channel = int(threadgroup_position_in_grid.x) * THREADS + int(thread_position_in_threadgroup.x);

if (channel < channels) {
  const auto x_row = x + row * x_strides[0] + channel * x_strides[2];
  const auto dy_row = dy + row * dy_strides[0] + channel * dy_strides[2];
  const auto steps_row = steps + row * steps_strides[0];
  const auto next_row = next + row * next_strides[0];
  const float shift = HAS_BIAS ? float(bias[channel]) : 0.0f;
  float taps[K];
  float dtaps[K];
  float dshift = 0.0f;
  float window[K];  // inputs, the newest last,
  float grad[K];    // their gradients,
  int source[K];    // and where they come from: a position, or one of the initial state less K - 1
  UNROLL for (int k = 0; k < K; ++k) {
    taps[k] = float(weight[int64_t(channel) * K + k]);
    dtaps[k] = 0.0f;
    grad[k] = 0.0f;
  }

  int place = start - 1;
  int older = -1;
  int known = 0;  // inputs in the window, from the newest, that belong to the same sequence as the step at hand
  bool cut = false;
  UNROLL for (int k = K - 2; k >= 0; --k) {
    if (STEPS == mambax::MASKED && place >= 0) place = int(steps_row[place * steps_strides[1]]);
    known += cut ? 0 : 1;
    if (place >= 0) {
      source[k] = place;
      window[k] = cut ? 0.0f : float(x_row[place * x_strides[1]]);
      if (STEPS == mambax::PACKED) cut = cut || bool(steps_row[place * steps_strides[1]]);
    } else {
      source[k] = older;
      window[k] = HAS_STATE && !cut ? float(state[(int64_t(row) * (K - 1) + older + K - 1) * channels + channel]) : 0.0f;
      --older;
    }
    --place;
  }

  int beyond = 0;  // steps taken that are not of this span
  int t = start;
  while (t < length && (t < stop || beyond < K - 1)) {
    if (STEPS == mambax::MASKED && t < stop && int(steps_row[t * steps_strides[1]]) != t) {
      dx[(int64_t(row) * length + t) * channels + channel] = T(0.0f);
      ++t;
      continue;
    }
    if (STEPS == mambax::MASKED && t >= stop) {
      t = int(next_row[t * next_strides[1]]);
      if (t >= length) break;
    }
    if (STEPS == mambax::PACKED && bool(steps_row[t * steps_strides[1]])) {
      UNROLL for (int k = 0; k < K - 1; ++k) window[k] = 0.0f;
      known = 0;
    }
    known = known < K ? known + 1 : K;
    window[K - 1] = float(x_row[t * x_strides[1]]);
    grad[K - 1] = 0.0f;
    source[K - 1] = t;
    float d = float(dy_row[t * dy_strides[1]]);
    if (SILU) {
      float sum = shift;
      UNROLL for (int k = 0; k < K; ++k) sum += taps[k] * window[k];
      d *= mambax::silu_slope(sum);
    }
    UNROLL for (int k = 0; k < K; ++k) {
      grad[k] += k >= K - known ? d * taps[k] : 0.0f;
      dtaps[k] += t < stop ? d * window[k] : 0.0f;
    }
    dshift += t < stop ? d : 0.0f;
    beyond += t < stop ? 0 : 1;
    if (source[0] >= start && source[0] < stop) {
      dx[(int64_t(row) * length + source[0]) * channels + channel] = T(grad[0]);
    } else if (start == 0 && source[0] < 0) {
      dinitial_state[(int64_t(row) * (K - 1) + source[0] + K - 1) * channels + channel] = T(grad[0]);
    }
    UNROLL for (int k = 0; k < K - 1; ++k) {
      window[k] = window[k + 1];
      grad[k] = grad[k + 1];
      source[k] = source[k + 1];
    }
    ++t;
  }

  // What is left in the window at the end of the row is the final state.
  UNROLL for (int k = 0; k < K - 1; ++k) {
    if (t >= length && k >= K - 1 - known) {
      grad[k] += float(dfinal[(int64_t(row) * (K - 1) + k) * channels + channel]);
    }
    if (source[k] >= start && source[k] < stop) {
      dx[(int64_t(row) * length + source[k]) * channels + channel] = T(grad[k]);
    } else if (start == 0 && source[k] < 0) {
      dinitial_state[(int64_t(row) * (K - 1) + source[k] + K - 1) * channels + channel] = T(grad[k]);
    }
  }

  const int64_t spans = (length + SPAN - 1) / SPAN;
  const int64_t share = (row * spans + span) * channels + channel;
  UNROLL for (int k = 0; k < K; ++k) dweight[share * K + k] = dtaps[k];
  dbias[share] = dshift;
}
