// Selective scan, forward: from the state before a chunk of a row to its outputs and, after the last chunk, the final
// state. A channel has LANES threads in succession, each of which holds R of its states in registers. Of a tile of
// TILE steps, a thread reads the inputs of OWN steps and hands them to the others of its channel when their turn
// comes; the sums over states come back the same way, and it writes what it had read the inputs of.
//
// Threadgroups: (channels / (THREADS / LANES), chunks, rows). CHUNK is a multiple of TILE, or 0: one chunk is all.

constexpr int WIDE = LANES * R;                        // N and padding
constexpr int OWN = TILE > LANES ? TILE / LANES : 1;   // steps of a tile that this thread reads and writes
constexpr int TWINS = LANES > TILE ? LANES / TILE : 1; // threads that read the same step; the first writes it
SHARED(float, b_tile, TILE * WIDE);
SHARED(float, c_tile, TILE * WIDE);

const int length = u_shape[1];
const int channels = u_shape[2];
const int id = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int part = id % LANES;
const int row = int(threadgroup_position_in_grid.z);
const int chunk = int(threadgroup_position_in_grid.y);
const int channel = int(threadgroup_position_in_grid.x) * (THREADS / LANES) + id / LANES;
const bool real = channel < channels;
const int first = part / TWINS * OWN;
const int start = chunk * CHUNK;
const int end = CHUNK == 0 || start + CHUNK > length ? length : start + CHUNK;

const auto u_row = u + row * u_strides[0] + channel * u_strides[2];
const auto delta_row = delta + row * delta_strides[0] + channel * delta_strides[2];
const auto b_row = B + row * B_strides[0];
const auto c_row = C + row * C_strides[0];
const auto z_row = z + row * z_strides[0] + channel * z_strides[2];
const auto steps_row = steps + row * steps_strides[0];
const float bias = HAS_BIAS && real ? float(delta_bias[channel]) : 0.0f;
const float skip = HAS_D && real ? float(D[channel]) : 0.0f;

const int64_t states = A_shape[1];
const int64_t place = ((int64_t(row) * (CHUNK == 0 ? 1 : (length + CHUNK - 1) / CHUNK) + chunk) * channels + channel) * states;
float a[R];  // in powers of two
float h[R];
UNROLL for (int r = 0; r < R; ++r) {
  const int n = part * R + r;
  const bool used = real && n < states;
  a[r] = used ? float(A[channel * states + n]) * mambax::LOG2_E : 0.0f;
  h[r] = HAS_STATE && used ? float(state[place + n]) : 0.0f;
}

for (int t0 = start; t0 < end; t0 += TILE) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = id; i < TILE * WIDE; i += THREADS) {
    const int t = t0 + i / WIDE;
    const int n = i % WIDE;
    bool used = t < end && n < states;
    if (STEPS == mambax::MASKED && used) used = bool(steps_row[t * steps_strides[1]]);
    b_tile[i] = used ? float(b_row[t * B_strides[1] + n * B_strides[2]]) : 0.0f;
    c_tile[i] = used ? float(c_row[t * C_strides[1] + n * C_strides[2]]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float dt[OWN];
  float x[OWN];
  float dtx[OWN];
  UNROLL for (int j = 0; j < OWN; ++j) {
    const int t = t0 + first + j;
    bool exists = real && t < end;
    if (STEPS == mambax::MASKED && exists) exists = bool(steps_row[t * steps_strides[1]]);
    const float raw = exists ? float(delta_row[t * delta_strides[1]]) + bias : 0.0f;
    dt[j] = exists ? (SOFTPLUS ? mambax::softplus(raw) : raw) : 0.0f;
    x[j] = exists ? float(u_row[t * u_strides[1]]) : 0.0f;
    dtx[j] = dt[j] * x[j];
  }

  float sums[TILE];
  UNROLL for (int i = 0; i < TILE; ++i) {
    const int owner = lane - part + i / OWN * TWINS;
    const float dt_i = simd_shuffle(dt[i % OWN], owner);
    const float dtx_i = simd_shuffle(dtx[i % OWN], owner);
    const bool begins = STEPS == mambax::PACKED && t0 + i < end && bool(steps_row[(t0 + i) * steps_strides[1]]);
    float sum = 0.0f;
    UNROLL for (int r = 0; r < R; ++r) {
      const int n = i * WIDE + part * R + r;
      const float before = begins ? 0.0f : h[r];
      h[r] = mambax::exp2(dt_i * a[r]) * before + dtx_i * b_tile[n];
      sum += h[r] * c_tile[n];
    }
    sums[i] = sum;
  }
  mambax::scatter_sum<TILE, 1, LANES>(sums, lane);

  UNROLL for (int j = 0; j < OWN; ++j) {
    const int t = t0 + first + j;
    if (real && t < end && part % TWINS == 0) {
      bool exists = true;
      if (STEPS == mambax::MASKED) exists = bool(steps_row[t * steps_strides[1]]);
      float out = sums[j] + skip * x[j];
      if (HAS_Z) out *= mambax::silu(float(z_row[t * z_strides[1]]));
      y[(int64_t(row) * length + t) * channels + channel] = T(exists ? out : 0.0f);
    }
  }
}

if (real && end == length) {
  UNROLL for (int r = 0; r < R; ++r) {
    const int n = part * R + r;
    if (n < states) final_state[(int64_t(row) * channels + channel) * states + n] = h[r];
  }
}
