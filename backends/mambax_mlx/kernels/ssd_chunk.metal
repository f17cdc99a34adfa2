// State-space duality, what a chunk of a row does by itself, and the sum of its time steps, in which the decay of a
// head is exp(A sum). Forwards (x is x, W is B): the state after the chunk from a state of zero before it. Backwards
// (x is the gradient of y, W is C): the gradient of the state before the chunk from a gradient of zero after it. A
// chunk in which a sequence begins lets nothing through: its sum is CUT.
//
// Threadgroups: (heads x blocks of BLOCK channels, chunks, rows). Threads as in ssd_output.

constexpr int WIDE = LANES * RN;
constexpr int BLOCK = THREADS / LANES * RP;
SHARED(float, w_tile, TILE * WIDE);
SHARED(float, x_tile, TILE * BLOCK);  // what W is multiplied by: dt x forwards, the gradient of y backwards
SHARED(float, dt_tile, TILE);
SHARED(float, a_tile, TILE);  // decays; below zero where a sequence begins

const int length = x_shape[1];
const int heads = x_shape[2];
const int width = x_shape[3];
const int id = int(thread_position_in_threadgroup.x);
const int part = id % LANES;
const int row = int(threadgroup_position_in_grid.z);
const int chunk = int(threadgroup_position_in_grid.y);
const int chunks = int(threadgroups_per_grid.y);
const int blocks = (width + BLOCK - 1) / BLOCK;
const int head = int(threadgroup_position_in_grid.x) / blocks;
const int base = int(threadgroup_position_in_grid.x) % blocks * BLOCK;
const int mine = id / LANES * RP;
const int group = head / (heads / W_shape[2]);
const int start = chunk * CHUNK;
const int end = start + CHUNK > length ? length : start + CHUNK;

const auto x_row = x + row * x_strides[0] + head * x_strides[2];
const auto dt_row = dt + row * dt_strides[0] + head * dt_strides[2];
const auto w_row = W + row * W_strides[0] + group * W_strides[2];
const auto steps_row = steps + row * steps_strides[0];
const float bias = HAS_BIAS ? float(dt_bias[head]) : 0.0f;
const float a_head = float(A[head]) * mambax::LOG2_E;
const int64_t states = W_shape[3];

float h[RP][RN];
UNROLL for (int k = 0; k < RP; ++k) {
  UNROLL for (int r = 0; r < RN; ++r) h[k][r] = 0.0f;
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
    w_tile[i] = used ? float(w_row[t * W_strides[1] + n * W_strides[3]]) : 0.0f;
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

  UNROLL for (int j = 0; j < TILE; ++j) {
    const int i = REVERSE ? TILE - 1 - j : j;
    const bool begins = a_tile[i] < 0.0f;
    const float decay = a_tile[i];
    sum += dt_tile[i];
    cut = cut || begins;
    UNROLL for (int k = 0; k < RP; ++k) {
      const float given = x_tile[i * BLOCK + mine + k];
      const float scale = REVERSE ? given : given * dt_tile[i];
      UNROLL for (int r = 0; r < RN; ++r) {
        const float added = scale * w_tile[i * WIDE + part * RN + r];
        const float kept = decay * (REVERSE ? h[k][r] + added : h[k][r]);
        h[k][r] = (begins ? 0.0f : kept) + (REVERSE ? 0.0f : added);
      }
    }
  }
}

const int64_t place = (int64_t(row) * chunks + chunk) * heads + head;
UNROLL for (int k = 0; k < RP; ++k) {
  UNROLL for (int r = 0; r < RN; ++r) {
    const int p = base + mine + k;
    const int n = part * RN + r;
    if (p < width && n < states) local_end[(place * width + p) * states + n] = h[k][r];
  }
}
if (base == 0 && id == 0) total[place] = cut ? mambax::CUT : sum;
