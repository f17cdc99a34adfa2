/* The selective scan as one plain loop, for comparison: built by the benchmark with -O3 -march=native.
 *
 * h = exp(delta A) h + delta B u,  y = (C . h + D u) silu(z),  delta = softplus(delta + bias)
 *
 * Sixteen channels at a time, one per vector lane; the state stays in registers where it fits. The exponential and the
 * logarithm are polynomials, because the C library's are not vectorised without -ffast-math.
 *
 * Dimensions: L length, D channels, N d_state (at most 256). float32, row-major, one sequence.
 */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define MOST 256

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

static inline vector splat(float x) { return x - (vector){0}; }

static inline vector choose(integers condition, vector yes, vector no) {
    return (vector)((condition & (integers)yes) | (~condition & (integers)no));
}

/* e^x to about 1e-7 of itself, for x up to 88; 0 below -87. */
static inline vector exponential(vector x) {
    const integers normal = x > splat(-87.0f);
    vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* the nearest whole number */
    vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vector p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    integers exponent = (__builtin_convertvector(n, integers) + 127) << 23;
    return (vector)((integers)(p * (vector)exponent) & normal);
}

/* log(1 + e^x): max(x, 0) + log1p(e^-|x|), the latter as a series in e / (2 + e). */
static inline vector softplus(vector x) {
    vector e = exponential(choose(x > splat(0.0f), -x, x));
    vector s = e / (e + 2.0f), q = s * s;
    vector p = splat(2.0f / 13);
    p = p * q + 2.0f / 11;
    p = p * q + 2.0f / 9;
    p = p * q + 2.0f / 7;
    p = p * q + 2.0f / 5;
    p = p * q + 2.0f / 3;
    p = p * q + 2.0f;
    return choose(x > splat(0.0f), x, splat(0.0f)) + p * s;
}

static inline vector load(const float *from, int64_t width) {
    vector x = {0};
    memcpy(&x, from, width == LANES ? sizeof x : sizeof(float) * width);
    return x;
}

static inline __attribute__((always_inline)) void block(
    const float *u, const float *delta, const float *A, const float *B, const float *C, const float *D,
    const float *z, const float *bias, float *y, int64_t L, int64_t channels, const int64_t N, int64_t first,
    const int64_t width) {
    vector a[MOST], h[MOST];
    for (int64_t n = 0; n < N; n++) {
        h[n] = splat(0.0f);
        a[n] = splat(0.0f);
        for (int64_t j = 0; j < width; j++) a[n][j] = A[(first + j) * N + n];
    }
    const vector skip = load(D + first, width), shift = load(bias + first, width);
    for (int64_t t = 0; t < L; t++) {
        const int64_t at = t * channels + first;
        const vector x = load(u + at, width), dt = softplus(load(delta + at, width) + shift), step = dt * x;
        vector sum = skip * x;
        for (int64_t n = 0; n < N; n++) {
            h[n] = exponential(dt * a[n]) * h[n] + step * B[t * N + n];
            sum += h[n] * C[t * N + n];
        }
        const vector gate = load(z + at, width), least = splat(-88.0f);
        sum = sum * gate / (exponential(-choose(gate > least, gate, least)) + 1.0f);
        memcpy(y + at, &sum, sizeof(float) * width);
    }
}

/* Channels first to last - 1 of y (L, D), from u, delta, z (L, D), A (D, N), B, C (L, N), D and bias (D). */
void scan(const float *u, const float *delta, const float *A, const float *B, const float *C, const float *D,
          const float *z, const float *bias, float *y, int64_t L, int64_t channels, int64_t N, int64_t first,
          int64_t last) {
    for (; first < last; first += LANES) {
        const int64_t left = last - first;
        if (left < LANES)
            block(u, delta, A, B, C, D, z, bias, y, L, channels, N, first, left);
        else if (N == 16)
            block(u, delta, A, B, C, D, z, bias, y, L, channels, 16, first, LANES);
        else
            block(u, delta, A, B, C, D, z, bias, y, L, channels, N, first, LANES);
    }
}

/* The exponential of count values (a multiple of sixteen), for the limit that it sets. */
void exponentials(const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const vector e = exponential(load(x + i, LANES));
        memcpy(y + i, &e, sizeof e);
    }
}
