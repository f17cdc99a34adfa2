// State-space duality, the gradients of dt and A of a chunk of a row, from the products that ssd_gradient has summed.
// With h the state after a step, G its gradient and L what of it comes from later steps,
//   the gradient of the exponent dt A of a step is  (L, h) + (dy, y) - dt (x, gradient of dt x),
// since G = L + dy C and h is the decayed state and dt x B; and (L, h) is that gradient at the next step. So it is
// found from the last step to the first. At the end of the chunk (L, h) is given. Where a sequence begins, or where the
// decay is so strong that the gradient is below the rounding of its parts, it is zero.
//
// One thread to each head: (heads / THREADS, chunks, rows) threadgroups.

constexpr float NOTHING = -24.0f;  // powers of two

const int length = dt_shape[1];
const int heads = dt_shape[2];
const int blocks = outputs_shape[3];
const int row = int(threadgroup_position_in_grid.z);
const int chunk = int(threadgroup_position_in_grid.y);
const int chunks = int(threadgroups_per_grid.y);
const int head = int(threadgroup_position_in_grid.x) * THREADS + int(thread_position_in_threadgroup.x);

if (head < heads) {
  const int start = chunk * CHUNK;
  const int end = start + CHUNK > length ? length : start + CHUNK;
  const auto dt_row = dt + row * dt_strides[0] + head * dt_strides[2];
  const auto steps_row = steps + row * steps_strides[0];
  const float bias = HAS_BIAS ? float(dt_bias[head]) : 0.0f;
  const float a_head = float(A[head]);
  const int64_t place = (int64_t(row) * chunks + chunk) * heads + head;
  float carried = ends[place];
  float da = 0.0f;
  float dbias = 0.0f;
  for (int t = end - 1; t >= start; --t) {
    bool exists = true;
    bool begins = false;
    if (STEPS == mambax::MASKED) exists = bool(steps_row[t * steps_strides[1]]);
    if (STEPS == mambax::PACKED) begins = bool(steps_row[t * steps_strides[1]]);
    float gradient = 0.0f;
    if (exists) {
      const float raw = float(dt_row[t * dt_strides[1]]) + bias;
      const float wide = SOFTPLUS ? mambax::softplus(raw) : raw;
      const float step = mambax::limited(wide, limits[0], limits[1]);
      float output = 0.0f;
      float input = 0.0f;
      for (int k = 0; k < blocks; ++k) {
        const int64_t at = ((int64_t(row) * length + t) * heads + head) * blocks + k;
        output += outputs[at];
        input += inputs[at];
      }
      carried += output - step * input;
      if (begins || step * a_head * mambax::LOG2_E < NOTHING) carried = 0.0f;
      da += carried * step;
      const bool held = (limits[0] > 0.0f && wide <= limits[0]) || wide >= limits[1];
      gradient = held ? 0.0f : carried * a_head + input;
      if (SOFTPLUS) gradient *= mambax::sigmoid(raw);
    }
    ddt[(int64_t(row) * length + t) * heads + head] = T_DT(gradient);
    dbias += gradient;
  }
  dA[place] = da;
  ddt_bias[place] = dbias;
}
