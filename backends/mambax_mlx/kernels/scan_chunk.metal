// Selective scan, what a chunk of a row does by itself, and the sum of its time steps, in which its decay is
// exp(A sum). Forwards (x is u, W is B): the state after the chunk from a state of zero before it, of all chunks but
// the last. Backwards (x is the gradient of y, W is C): the gradient of the state before the chunk from a gradient of
// zero after it, of all chunks but the first. A chunk in which a sequence begins lets nothing through: its sum is CUT.
//
// Threadgroups: (channels / (THREADS / LANES), chunks - 1, rows). Threads as in scan_output.

constexpr int WIDE = LANES * R;
constexpr int OWN = TILE > LANES ? TILE / LANES : 1;
constexpr int TWINS = LANES > TILE ? LANES / TILE : 1;
SHARED(float, w_tile, TILE * WIDE);

const int length = x_shape[1];
const int channels = x_shape[2];
const int id = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int part = id % LANES;
const int row = int(threadgroup_position_in_grid.z);
const int channel = int(threadgroup_position_in_grid.x) * (THREADS / LANES) + id / LANES;
const bool real = channel < channels;
const int first = part / TWINS * OWN;
const int chunks = (length + CHUNK - 1) / CHUNK;
const int number = int(threadgroup_position_in_grid.y);  // of the result
const int start = (REVERSE ? number + 1 : number) * CHUNK;
const int end = start + CHUNK > length ? length : start + CHUNK;

const auto x_row = x + row * x_strides[0] + channel * x_strides[2];
const auto delta_row = delta + row * delta_strides[0] + channel * delta_strides[2];
const auto w_row = W + row * W_strides[0];
const auto z_row = z + row * z_strides[0] + channel * z_strides[2];
const auto steps_row = steps + row * steps_strides[0];
const float bias = HAS_BIAS && real ? float(delta_bias[channel]) : 0.0f;

const int64_t states = A_shape[1];
float a[R];  // in powers of two
float h[R];
UNROLL for (int r = 0; r < R; ++r) {
  const int n = part * R + r;
  a[r] = real && n < states ? float(A[channel * states + n]) * mambax::LOG2_E : 0.0f;
  h[r] = 0.0f;
}
float sum = 0.0f;
bool cut = false;

const int tiles = (end - start + TILE - 1) / TILE;
for (int tile = 0; tile < tiles; ++tile) {
  const int t0 = start + (REVERSE ? tiles - 1 - tile : tile) * TILE;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = id; i < TILE * WIDE; i += THREADS) {
    const int t = t0 + i / WIDE;
    const int n = i % WIDE;
    bool used = t < end && n < states;
    if (STEPS == mambax::MASKED && used) used = bool(steps_row[t * steps_strides[1]]);
    w_tile[i] = used ? float(w_row[t * W_strides[1] + n * W_strides[2]]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float dt[OWN];
  float scale[OWN];  // of W: delta u forwards, the gradient before the gate backwards
  UNROLL for (int j = 0; j < OWN; ++j) {
    const int t = t0 + first + j;
    bool exists = real && t < end;
    if (STEPS == mambax::MASKED && exists) exists = bool(steps_row[t * steps_strides[1]]);
    const float raw = exists ? float(delta_row[t * delta_strides[1]]) + bias : 0.0f;
    dt[j] = exists ? (SOFTPLUS ? mambax::softplus(raw) : raw) : 0.0f;
    scale[j] = exists ? float(x_row[t * x_strides[1]]) : 0.0f;
    if (!REVERSE) scale[j] *= dt[j];
    if (REVERSE && HAS_Z && exists) scale[j] *= mambax::silu(float(z_row[t * z_strides[1]]));
  }

  UNROLL for (int k = 0; k < TILE; ++k) {
    const int i = REVERSE ? TILE - 1 - k : k;
    const int owner = lane - part + i / OWN * TWINS;
    const float dt_i = simd_shuffle(dt[i % OWN], owner);
    const float scale_i = simd_shuffle(scale[i % OWN], owner);
    const bool begins = STEPS == mambax::PACKED && t0 + i < end && bool(steps_row[(t0 + i) * steps_strides[1]]);
    sum += dt_i;
    cut = cut || begins;
    UNROLL for (int r = 0; r < R; ++r) {
      const float decay = mambax::exp2(dt_i * a[r]);
      const float new_part = scale_i * w_tile[i * WIDE + part * R + r];
      const float carried = REVERSE ? decay * (h[r] + new_part) : decay * (begins ? 0.0f : h[r]) + new_part;
      h[r] = REVERSE && begins ? 0.0f : carried;
    }
  }
}

if (real) {
  const int64_t place = (int64_t(row) * (chunks - 1) + number) * channels + channel;
  UNROLL for (int r = 0; r < R; ++r) {
    const int n = part * R + r;
    if (n < states) local_end[place * states + n] = h[r];
  }
  if (part == 0) total[place] = cut ? mambax::CUT : sum;
}
