// State-space duality (Mamba-2), forward: from the state before a chunk of a row to its outputs and, after the last
// chunk, the final state. A head has one decay at a step, so that its exponential is taken once for all its states.
//
// LANES threads in succession hold the states of RP channels of a head, each of them RN of every channel's. The sums
// over states of a tile of TILE steps end up in the threads of these channels, OWN in each, by a reduce-scatter.
//
// Threadgroups: (heads x blocks of BLOCK channels, chunks, rows). CHUNK is a multiple of TILE, or 0: one chunk is all.

constexpr int WIDE = LANES * RN;                       // N and padding
constexpr int BLOCK = THREADS / LANES * RP;            // channels of a threadgroup, all of one head
constexpr int SUMS = TILE * RP;                        // outputs of a tile: steps, and in each the channels
constexpr int OWN = SUMS > LANES ? SUMS / LANES : 1;
constexpr int TWINS = LANES > SUMS ? LANES / SUMS : 1; // threads with the same output; the first writes it
SHARED(float, b_tile, TILE * WIDE);
SHARED(float, c_tile, TILE * WIDE);
SHARED(float, x_tile, TILE * BLOCK);
SHARED(float, dt_tile, TILE);
SHARED(float, a_tile, TILE);  // decays; below zero where a sequence begins

const int length = x_shape[1];
const int heads = x_shape[2];
const int width = x_shape[3];
const int id = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int part = id % LANES;
const int row = int(threadgroup_position_in_grid.z);
const int chunk = int(threadgroup_position_in_grid.y);
const int blocks = (width + BLOCK - 1) / BLOCK;
const int head = int(threadgroup_position_in_grid.x) / blocks;
const int base = int(threadgroup_position_in_grid.x) % blocks * BLOCK;
const int mine = id / LANES * RP;  // the first of this thread's channels in the block
const int group = head / (heads / B_shape[2]);
const int start = chunk * CHUNK;
const int end = CHUNK == 0 || start + CHUNK > length ? length : start + CHUNK;

const auto x_row = x + row * x_strides[0] + head * x_strides[2];
const auto dt_row = dt + row * dt_strides[0] + head * dt_strides[2];
const auto b_row = B + row * B_strides[0] + group * B_strides[2];
const auto c_row = C + row * C_strides[0] + group * C_strides[2];
const auto steps_row = steps + row * steps_strides[0];
const float bias = HAS_BIAS ? float(dt_bias[head]) : 0.0f;
const float skip = HAS_D ? float(D[head]) : 0.0f;
const float a_head = float(A[head]) * mambax::LOG2_E;

const int64_t states = B_shape[3];
const int64_t chunks = CHUNK == 0 ? 1 : (length + CHUNK - 1) / CHUNK;
const int64_t place = ((int64_t(row) * chunks + chunk) * heads + head) * width;
float h[RP][RN];
UNROLL for (int k = 0; k < RP; ++k) {
  UNROLL for (int r = 0; r < RN; ++r) {
    const int p = base + mine + k;
    const int n = part * RN + r;
    h[k][r] = HAS_STATE && p < width && n < states ? float(state[(place + p) * states + n]) : 0.0f;
  }
}

for (int t0 = start; t0 < end; t0 += TILE) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = id; i < TILE * WIDE; i += THREADS) {
    const int t = t0 + i / WIDE;
    const int n = i % WIDE;
    bool used = t < end && n < states;
    if (STEPS == mambax::MASKED && used) used = bool(steps_row[t * steps_strides[1]]);
    b_tile[i] = used ? float(b_row[t * B_strides[1] + n * B_strides[3]]) : 0.0f;
    c_tile[i] = used ? float(c_row[t * C_strides[1] + n * C_strides[3]]) : 0.0f;
  }
  for (int i = id; i < TILE * BLOCK; i += THREADS) {
    const int t = t0 + i / BLOCK;
    const int p = base + i % BLOCK;
    bool used = t < end && p < width;
    if (STEPS == mambax::MASKED && used) used = bool(steps_row[t * steps_strides[1]]);
    x_tile[i] = used ? float(x_row[t * x_strides[1] + p * x_strides[3]]) : 0.0f;
  }
  for (int i = id; i < TILE; i += THREADS) {
    const int t = t0 + i;
    bool used = t < end;
    if (STEPS == mambax::MASKED && used) used = bool(steps_row[t * steps_strides[1]]);
    const float raw = used ? float(dt_row[t * dt_strides[1]]) + bias : 0.0f;
    const float step = used ? mambax::limited(SOFTPLUS ? mambax::softplus(raw) : raw, limits[0], limits[1]) : 0.0f;
    bool begins = false;
    if (STEPS == mambax::PACKED && used) begins = bool(steps_row[t * steps_strides[1]]);
    dt_tile[i] = step;
    a_tile[i] = begins ? -1.0f : mambax::exp2(step * a_head);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float sums[SUMS];
  UNROLL for (int i = 0; i < TILE; ++i) {
    const bool begins = a_tile[i] < 0.0f;
    const float decay = a_tile[i];
    UNROLL for (int k = 0; k < RP; ++k) {
      const float dtx = dt_tile[i] * x_tile[i * BLOCK + mine + k];
      float sum = 0.0f;
      UNROLL for (int r = 0; r < RN; ++r) {
        const int n = i * WIDE + part * RN + r;
        h[k][r] = (begins ? 0.0f : decay * h[k][r]) + dtx * b_tile[n];
        sum += h[k][r] * c_tile[n];
      }
      sums[i * RP + k] = sum;
    }
  }
  mambax::scatter_sum<SUMS, 1, LANES>(sums, lane);

  UNROLL for (int j = 0; j < OWN; ++j) {
    const int item = part / TWINS * OWN + j;
    const int t = t0 + item / RP;
    const int p = mine + item % RP;
    if (t < end && base + p < width && part % TWINS == 0) {
      bool exists = true;
      if (STEPS == mambax::MASKED) exists = bool(steps_row[t * steps_strides[1]]);
      const float out = sums[j] + skip * x_tile[item / RP * BLOCK + p];
      y[((int64_t(row) * length + t) * heads + head) * width + base + p] = T(exists ? out : 0.0f);
    }
  }
}

if (end == length) {
  UNROLL for (int k = 0; k < RP; ++k) {
    UNROLL for (int r = 0; r < RN; ++r) {
      const int p = base + mine + k;
      const int n = part * RN + r;
      if (p < width && n < states) {
        final_state[((int64_t(row) * heads + head) * width + p) * states + n] = h[k][r];
      }
    }
  }
}
