// Selective scan, from chunk to chunk: what arrives at each chunk of a row. Forwards: the state before every chunk,
// from the initial state and the chunks by themselves. Backwards: the gradient of the state after every chunk, from
// that of the final state. With ONE_DECAY, a channel has one A for all its states, as a head of Mamba-2 has.
// One thread to each state of a row: (channels N / THREADS, 1, rows) threadgroups.

const int row = int(threadgroup_position_in_grid.z);
const int chunks = local_end_shape[1] + 1;
const int channels = local_end_shape[2];
const int states = local_end_shape[3];
const int64_t size = int64_t(channels) * states;
const int64_t index = int64_t(threadgroup_position_in_grid.x) * THREADS + thread_position_in_threadgroup.x;

if (index < size) {
  const int64_t channel = index / states;
  const float a = float(A[ONE_DECAY ? channel : index]) * mambax::LOG2_E;
  float value = HAS_STATE ? float(state[row * size + index]) : 0.0f;
  for (int k = 0; k < chunks; ++k) {
    const int chunk = REVERSE ? chunks - 1 - k : k;
    arriving[(int64_t(row) * chunks + chunk) * size + index] = value;
    if (k + 1 < chunks) {
      const int64_t place = int64_t(row) * (chunks - 1) + (REVERSE ? chunk - 1 : chunk);
      const float sum = total[place * channels + channel];
      const float passed = sum < mambax::CUT ? mambax::exp2(a * sum) * value : 0.0f;
      value = passed + local_end[place * size + index];
    }
  }
}
