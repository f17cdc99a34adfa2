// Selective scan of a single step, as in decoding. A channel has LANES threads in succession, each of which holds R of
// its states. Threadgroups: (channels / (THREADS / LANES), 1, rows).

const int channels = u_shape[2];
const int id = int(thread_position_in_threadgroup.x);
const int part = id % LANES;
const int row = int(threadgroup_position_in_grid.z);
const int channel = int(threadgroup_position_in_grid.x) * (THREADS / LANES) + id / LANES;
const bool real = channel < channels;
const bool flag = STEPS != mambax::EVERY && bool(steps[row * steps_strides[0]]);
const bool exists = STEPS != mambax::MASKED || flag;
const bool begins = STEPS == mambax::PACKED && flag;

float dt = 0.0f;
float x = 0.0f;
if (real && exists) {
  dt = float(delta[row * delta_strides[0] + channel * delta_strides[2]]);
  if (HAS_BIAS) dt += float(delta_bias[channel]);
  if (SOFTPLUS) dt = mambax::softplus(dt);
  x = float(u[row * u_strides[0] + channel * u_strides[2]]);
}

const int64_t states = A_shape[1];
const int64_t place = (int64_t(row) * channels + channel) * states;
float sum[1] = {0.0f};
UNROLL for (int r = 0; r < R; ++r) {
  const int n = part * R + r;
  if (real && n < states) {
    float h = HAS_STATE && !begins ? float(state[place + n]) : 0.0f;
    if (exists) {
      h = mambax::exp2(dt * (float(A[channel * states + n]) * mambax::LOG2_E)) * h +
          dt * x * float(B[row * B_strides[0] + n * B_strides[2]]);
      sum[0] += h * float(C[row * C_strides[0] + n * C_strides[2]]);
    }
    final_state[place + n] = h;
  }
}
mambax::scatter_sum<1, 1, LANES>(sum, int(thread_index_in_simdgroup));

if (real && part == 0) {
  float out = sum[0];
  if (HAS_D) out += float(D[channel]) * x;
  if (HAS_Z) out *= mambax::silu(float(z[row * z_strides[0] + channel * z_strides[2]]));
  y[int64_t(row) * channels + channel] = T(exists ? out : 0.0f);
}
