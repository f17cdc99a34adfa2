// State-space duality, the sums of the gradients that need the states of a chunk (forwards, from the state before it)
// or the gradients of these states (backwards, from the gradient of the state after it). Either way there is
//   for each step and channel a sum over states: with C of the state, the output before the skip; with B of its
//   gradient, that of dt x, which gives the gradient of x;
//   for each step and state a sum over channels: with the gradient of y, the gradient of C; with dt x, that of B;
//   for each step and head a sum over channels, from which ssd_decay finds the gradients of dt and A: of y and its
//   gradient forwards, of x and the gradient of dt x backwards.
//
// A threadgroup goes through every so-many-th block of channels of its group's heads, and adds to its own share of the
// gradient of B or C in memory. The shares are summed outside, and so are the blocks of a head; no order depends on
// timing, so that equal inputs give equal bits.
//
// Threadgroups: (groups x shares, chunks, rows). Threads as in ssd_output.

constexpr int WIDE = LANES * RN;
constexpr int BLOCK = THREADS / LANES * RP;
constexpr int SUMS = TILE * RP;
constexpr int OWN = SUMS > LANES ? SUMS / LANES : 1;
constexpr int TWINS = LANES > SUMS ? LANES / SUMS : 1;
constexpr int GROUPS = THREADS / 32;                  // SIMD groups
constexpr int PEERS = 32 / LANES;                     // threads of a SIMD group with the same states
constexpr int KEPT = RN > PEERS ? RN / PEERS : 1;     // sums over channels that end up in this thread,
constexpr int COPIES = PEERS > RN ? PEERS / RN : 1;   // or threads with the same one
SHARED(float, b_tile, TILE * WIDE);
SHARED(float, c_tile, TILE * WIDE);
SHARED(float, x_tile, TILE * BLOCK);
SHARED(float, dy_tile, TILE * BLOCK);
SHARED(float, dots, TILE * BLOCK);   // over states; then, times x or the gradient of y, to be summed over channels
SHARED(float, shares, TILE * WIDE * GROUPS);
SHARED(float, dt_tile, TILE);
SHARED(float, a_tile, TILE);  // decays; below zero where a sequence begins

const int length = x_shape[1];
const int heads = x_shape[2];
const int width = x_shape[3];
const int groups = B_shape[2];
const int64_t states = B_shape[3];
const int id = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int part = id % LANES;
const int mine = id / LANES * RP;
const int row = int(threadgroup_position_in_grid.z);
const int chunk = int(threadgroup_position_in_grid.y);
const int chunks = (length + CHUNK - 1) / CHUNK;
const int sharing = int(threadgroups_per_grid.x) / groups;
const int group = int(threadgroup_position_in_grid.x) / sharing;
const int share = int(threadgroup_position_in_grid.x) % sharing;
const int start = chunk * CHUNK;
const int end = start + CHUNK > length ? length : start + CHUNK;
const int tiles = (end - start + TILE - 1) / TILE;

const auto b_row = B + row * B_strides[0] + group * B_strides[2];
const auto c_row = C + row * C_strides[0] + group * C_strides[2];
const auto steps_row = steps + row * steps_strides[0];
const int64_t share_row = int64_t(share) * int64_t(threadgroups_per_grid.z) + row;

const int blocks = (width + BLOCK - 1) / BLOCK;
const int of_group = heads / groups * blocks;
for (int number = share; number < of_group; number += sharing) {
  const bool adds = number != share;
  const int head = group * (heads / groups) + number / blocks;
  const int base = number % blocks * BLOCK;
  const auto x_row = x + row * x_strides[0] + head * x_strides[2];
  const auto dy_row = dy + row * dy_strides[0] + head * dy_strides[2];
  const auto dt_row = dt + row * dt_strides[0] + head * dt_strides[2];
  const float bias = HAS_BIAS ? float(dt_bias[head]) : 0.0f;
  const float skip = HAS_D ? float(D[head]) : 0.0f;
  const float a_head = float(A[head]) * mambax::LOG2_E;

  const int64_t place = ((int64_t(row) * (chunks + 1) + chunk + (REVERSE ? 1 : 0)) * heads + head) * width;
  float h[RP][RN];  // states; backwards, the gradients of the states after the step at hand
  UNROLL for (int k = 0; k < RP; ++k) {
    UNROLL for (int r = 0; r < RN; ++r) {
      const int p = base + mine + k;
      const int n = part * RN + r;
      h[k][r] = p < width && n < states ? float(state[(place + p) * states + n]) : 0.0f;
    }
  }

  for (int tile = 0; tile < tiles; ++tile) {
    const int t0 = start + (REVERSE ? tiles - 1 - tile : tile) * TILE;
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
      dy_tile[i] = used ? float(dy_row[t * dy_strides[1] + p * dy_strides[3]]) : 0.0f;
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
    UNROLL for (int j = 0; j < TILE; ++j) {
      const int i = REVERSE ? TILE - 1 - j : j;
      const bool begins = a_tile[i] < 0.0f;
      const float decay = a_tile[i];
      float of_states[RN];
      UNROLL for (int r = 0; r < RN; ++r) of_states[r] = 0.0f;
      UNROLL for (int k = 0; k < RP; ++k) {
        const float dtx = dt_tile[i] * x_tile[i * BLOCK + mine + k];
        const float g = dy_tile[i * BLOCK + mine + k];
        float sum = 0.0f;
        UNROLL for (int r = 0; r < RN; ++r) {
          const int n = i * WIDE + part * RN + r;
          const float before = REVERSE ? h[k][r] : begins ? 0.0f : decay * h[k][r];
          const float here = before + (REVERSE ? g * c_tile[n] : dtx * b_tile[n]);
          sum += here * (REVERSE ? b_tile[n] : c_tile[n]);
          of_states[r] += here * (REVERSE ? dtx : g);
          h[k][r] = !REVERSE ? here : begins ? 0.0f : decay * here;
        }
        sums[i * RP + k] = sum;
      }
      mambax::scatter_sum<RN, LANES, 32>(of_states, lane);
      const int peer = lane / LANES;
      if (peer % COPIES == 0) {
        UNROLL for (int r = 0; r < KEPT; ++r) {
          const int n = part * RN + peer / COPIES * KEPT + r;
          shares[(i * WIDE + n) * GROUPS + int(simdgroup_index_in_threadgroup)] = of_states[r];
        }
      }
    }
    mambax::scatter_sum<SUMS, 1, LANES>(sums, lane);

    UNROLL for (int j = 0; j < OWN; ++j) {
      const int item = part / TWINS * OWN + j;
      const int i = item / RP;
      const int t = t0 + i;
      const int p = mine + item % RP;
      if (part % TWINS == 0) {
        const float given = REVERSE ? x_tile[i * BLOCK + p] : dy_tile[i * BLOCK + p];
        dots[i * BLOCK + p] = given * sums[j];
        if (REVERSE && t < end && base + p < width) {
          bool exists = true;
          if (STEPS == mambax::MASKED) exists = bool(steps_row[t * steps_strides[1]]);
          const float out = dt_tile[i] * sums[j] + skip * dy_tile[i * BLOCK + p];
          dx[((int64_t(row) * length + t) * heads + head) * width + base + p] = T(exists ? out : 0.0f);
        }
      }
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = id; i < TILE * WIDE; i += THREADS) {
      const int t = t0 + i / WIDE;
      const int n = i % WIDE;
      if (t < end && n < states) {
        float sum = 0.0f;
        for (int k = 0; k < GROUPS; ++k) sum += shares[i * GROUPS + k];
        const int64_t at = ((share_row * length + t) * groups + group) * states + n;
        dW[at] = adds ? dW[at] + sum : sum;
      }
    }
    for (int i = id; i < TILE; i += THREADS) {
      const int t = t0 + i;
      if (t < end) {
        float sum = 0.0f;
        float of_skip = 0.0f;
        for (int p = 0; p < BLOCK; ++p) {
          sum += dots[i * BLOCK + p];
          of_skip += x_tile[i * BLOCK + p] * dy_tile[i * BLOCK + p];
        }
        const int64_t at = ((int64_t(row) * length + t) * heads + head) * blocks + number % blocks;
        product[at] = sum;
        if (!REVERSE) skips[at] = of_skip;
      }
    }
  }
}
