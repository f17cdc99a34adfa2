// Selective scan, backward: all gradients of a chunk of a row, from the state before it and the gradient of the state
// after it. The states inside are computed again, twice: once up to the last tile to find the state before each tile,
// once in each tile, whose states then stand in registers while its steps are gone through from last to first.
//
// The gradients of B and C are sums over channels. A SIMD group sums over its own by shuffles, the threadgroup over
// its SIMD groups in their order, and it goes on through every so-many-th block of channels, adding to its own share
// in memory; the shares of the threadgroups, and those of the chunks in the gradients of A, D and the bias, are summed
// outside. No order depends on timing, so that equal inputs give equal bits.
//
// Threadgroups: (shares, chunks, rows). CHUNK is TILES tiles. Threads as in scan_output.

constexpr int WIDE = LANES * R;
constexpr int OWN = TILE > LANES ? TILE / LANES : 1;
constexpr int TWINS = LANES > TILE ? LANES / TILE : 1;
constexpr int TILES = CHUNK / TILE;
constexpr int GROUPS = THREADS / 32;     // SIMD groups
constexpr int PEERS = 32 / LANES;        // channels of a SIMD group
constexpr int KEPT = 2 * R > PEERS ? 2 * R / PEERS : 1;   // sums for B and C that end up in this thread,
constexpr int COPIES = PEERS > 2 * R ? PEERS / (2 * R) : 1;  // or threads with the same one
SHARED(float, b_tile, TILE * WIDE);
SHARED(float, c_tile, TILE * WIDE);
SHARED(float, shares, TILE * 2 * WIDE * GROUPS);

const int length = u_shape[1];
const int channels = u_shape[2];
const int id = int(thread_position_in_threadgroup.x);
const int lane = int(thread_index_in_simdgroup);
const int part = id % LANES;
const int row = int(threadgroup_position_in_grid.z);
const int chunk = int(threadgroup_position_in_grid.y);
const int chunks = (length + CHUNK - 1) / CHUNK;
const int first = part / TWINS * OWN;
const int start = chunk * CHUNK;
const int end = start + CHUNK > length ? length : start + CHUNK;
const int tiles = (end - start + TILE - 1) / TILE;
const int64_t states = A_shape[1];

const auto b_row = B + row * B_strides[0];
const auto c_row = C + row * C_strides[0];
const auto steps_row = steps + row * steps_strides[0];
const int64_t share_row = int64_t(threadgroup_position_in_grid.x) * int64_t(threadgroups_per_grid.z) + row;

const int block = THREADS / LANES;  // channels of a threadgroup
for (int base = int(threadgroup_position_in_grid.x) * block; base < channels;
     base += int(threadgroups_per_grid.x) * block) {
  const bool adds = base != int(threadgroup_position_in_grid.x) * block;
  const int channel = base + id / LANES;
  const bool real = channel < channels;
  const auto u_row = u + row * u_strides[0] + channel * u_strides[2];
  const auto delta_row = delta + row * delta_strides[0] + channel * delta_strides[2];
  const auto z_row = z + row * z_strides[0] + channel * z_strides[2];
  const auto dy_row = dy + row * dy_strides[0] + channel * dy_strides[2];
  const float bias = HAS_BIAS && real ? float(delta_bias[channel]) : 0.0f;
  const float skip = HAS_D && real ? float(D[channel]) : 0.0f;
  const int64_t chunk_place = (int64_t(row) * chunks + chunk) * channels + channel;

  float a[R];  // in powers of two
  float h[R];
  float later[R];  // the gradient of the state after the step at hand
  float da[R];
  float before_tile[TILES][R];
  UNROLL for (int r = 0; r < R; ++r) {
    const int n = part * R + r;
    const bool used = real && n < states;
    a[r] = used ? float(A[channel * states + n]) * mambax::LOG2_E : 0.0f;
    h[r] = HAS_STATE && used ? float(state[chunk_place * states + n]) : 0.0f;
    later[r] = used ? float(dstate[chunk_place * states + n]) : 0.0f;
    da[r] = 0.0f;
  }
  float dskip = 0.0f;
  float dbias = 0.0f;

  // Pass 0 goes forwards and leaves the state before each tile; pass 1 goes backwards.
  for (int turn = 0; turn < 2 * tiles - 1; ++turn) {
    const bool back = turn >= tiles - 1;
    const int tile = back ? 2 * tiles - 2 - turn : turn;
    const int t0 = start + tile * TILE;
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

    float raw[OWN];
    float dt[OWN];
    float x[OWN];
    float dtx[OWN];
    UNROLL for (int j = 0; j < OWN; ++j) {
      const int t = t0 + first + j;
      bool exists = real && t < end;
      if (STEPS == mambax::MASKED && exists) exists = bool(steps_row[t * steps_strides[1]]);
      raw[j] = exists ? float(delta_row[t * delta_strides[1]]) + bias : 0.0f;
      dt[j] = exists ? (SOFTPLUS ? mambax::softplus(raw[j]) : raw[j]) : 0.0f;
      x[j] = exists ? float(u_row[t * u_strides[1]]) : 0.0f;
      dtx[j] = dt[j] * x[j];
    }

    UNROLL for (int k = 0; k < TILES; ++k) {
      UNROLL for (int r = 0; r < R; ++r) {
        if (!back && tile == k) before_tile[k][r] = h[r];
        if (back && tile == k && tile != tiles - 1) h[r] = before_tile[k][r];
      }
    }

    float before[TILE][R];  // the states before the steps, zero where a sequence begins
    float sums[TILE];
    UNROLL for (int i = 0; i < TILE; ++i) {
      const int owner = lane - part + i / OWN * TWINS;
      const float dt_i = simd_shuffle(dt[i % OWN], owner);
      const float dtx_i = simd_shuffle(dtx[i % OWN], owner);
      const bool begins = STEPS == mambax::PACKED && t0 + i < end && bool(steps_row[(t0 + i) * steps_strides[1]]);
      float sum = 0.0f;
      UNROLL for (int r = 0; r < R; ++r) {
        const int n = i * WIDE + part * R + r;
        before[i][r] = begins ? 0.0f : h[r];
        h[r] = mambax::exp2(dt_i * a[r]) * before[i][r] + dtx_i * b_tile[n];
        sum += h[r] * c_tile[n];
      }
      sums[i] = sum;
    }
    if (!back) continue;
    mambax::scatter_sum<TILE, 1, LANES>(sums, lane);

    float g[OWN];  // the gradient of y before the gate
    UNROLL for (int j = 0; j < OWN; ++j) {
      const int t = t0 + first + j;
      bool exists = real && t < end;
      if (STEPS == mambax::MASKED && exists) exists = bool(steps_row[t * steps_strides[1]]);
      g[j] = exists ? float(dy_row[t * dy_strides[1]]) : 0.0f;
      if (HAS_Z) {
        const float gate = exists ? float(z_row[t * z_strides[1]]) : 0.0f;
        const float dgate = g[j] * (sums[j] + skip * x[j]) * mambax::silu_slope(gate);
        g[j] *= mambax::silu(gate);
        if (real && t < end && part % TWINS == 0) dz[(int64_t(row) * length + t) * channels + channel] = T_Z(dgate);
      }
    }

    float of_dt[TILE];   // this thread's part of the gradient of delta through the decay,
    float of_dtx[TILE];  // and of that of delta u
    UNROLL for (int k = 0; k < TILE; ++k) {
      const int i = TILE - 1 - k;
      const int owner = lane - part + i / OWN * TWINS;
      const float dt_i = simd_shuffle(dt[i % OWN], owner);
      const float dtx_i = simd_shuffle(dtx[i % OWN], owner);
      const float g_i = simd_shuffle(g[i % OWN], owner);
      const bool begins = STEPS == mambax::PACKED && t0 + i < end && bool(steps_row[(t0 + i) * steps_strides[1]]);
      float of_bc[2 * R];
      float through_decay = 0.0f;
      float through_input = 0.0f;
      UNROLL for (int r = 0; r < R; ++r) {
        const int n = i * WIDE + part * R + r;
        const float decay = mambax::exp2(dt_i * a[r]);
        const float after = decay * before[i][r] + dtx_i * b_tile[n];
        const float here = later[r] + g_i * c_tile[n];  // the gradient of the state after step i
        of_bc[r] = here * dtx_i;
        of_bc[R + r] = g_i * after;
        through_input += here * b_tile[n];
        const float of_exponent = decay * here * before[i][r];
        through_decay += of_exponent * a[r];
        da[r] += of_exponent * dt_i;
        later[r] = begins ? 0.0f : decay * here;
      }
      of_dt[i] = through_decay;
      of_dtx[i] = through_input;
      mambax::scatter_sum<2 * R, LANES, 32>(of_bc, lane);
      const int peer = lane / LANES;
      if (peer % COPIES == 0) {
        UNROLL for (int j = 0; j < KEPT; ++j) {
          const int item = peer / COPIES * KEPT + j;  // R states of B, then those of C
          const int place = (i * 2 + item / R) * WIDE + part * R + item % R;
          shares[place * GROUPS + int(simdgroup_index_in_threadgroup)] = of_bc[j];
        }
      }
    }
    mambax::scatter_sum<TILE, 1, LANES>(of_dt, lane);
    mambax::scatter_sum<TILE, 1, LANES>(of_dtx, lane);

    UNROLL for (int j = 0; j < OWN; ++j) {
      const int t = t0 + first + j;
      if (real && t < end && part % TWINS == 0) {
        bool exists = true;
        if (STEPS == mambax::MASKED) exists = bool(steps_row[t * steps_strides[1]]);
        float ddt = of_dtx[j] * x[j] + of_dt[j] * mambax::LN_2;
        if (SOFTPLUS) ddt *= mambax::sigmoid(raw[j]);
        const int64_t place = (int64_t(row) * length + t) * channels + channel;
        du[place] = T(exists ? of_dtx[j] * dt[j] + skip * g[j] : 0.0f);
        ddelta[place] = T_DELTA(exists ? ddt : 0.0f);
        dbias += exists ? ddt : 0.0f;
        dskip += g[j] * x[j];
      }
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = id; i < TILE * 2 * WIDE; i += THREADS) {
      const int t = t0 + i / (2 * WIDE);
      const int n = i % WIDE;
      if (t < end && n < states) {
        float share = 0.0f;
        for (int k = 0; k < GROUPS; ++k) share += shares[i * GROUPS + k];
        const int64_t place = (share_row * length + t) * states + n;
        if (i / WIDE % 2 == 0) {
          dB[place] = adds ? dB[place] + share : share;
        } else {
          dC[place] = adds ? dC[place] + share : share;
        }
      }
    }
  }

  float of_channel[2] = {dskip, dbias};
  mambax::scatter_sum<1, 1, LANES>(of_channel, lane);
  mambax::scatter_sum<1, 1, LANES>(of_channel + 1, lane);
  if (real) {
    if (part == 0) {
      dD[chunk_place] = of_channel[0];
      ddelta_bias[chunk_place] = of_channel[1];
    }
    UNROLL for (int r = 0; r < R; ++r) {
      const int n = part * R + r;
      if (n < states) {
        dA[chunk_place * states + n] = da[r];
        if (chunk == 0) dinitial_state[(int64_t(row) * channels + channel) * states + n] = later[r];
      }
    }
  }
}
