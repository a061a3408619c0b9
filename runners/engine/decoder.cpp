// A decode step of a Llama-like decoder on a CPU, without its attention; compiled.py defines ROWS, the number of
// sequences.
//
// With so few rows a step takes as long as reading the weights, so each row of a weight is read once, from front to
// back, by one thread, and multiplied with all ROWS vectors. Products are summed in float, norms in double.

namespace {

struct Affine {
  const SCALAR *weight, *bias;  // [outputs][inputs], [outputs] or null
};

struct Layer {
  const SCALAR* attention_norm;
  Affine query_key_value;
  const SCALAR *query_norm, *key_norm;  // of each head, or null
  Affine output;
  const SCALAR* mlp_norm;
  Affine gate_and_up, down;
};

struct Sizes {
  int64_t hidden, heads, kv_heads, head_dim, intermediate, activation, threads;
  double epsilon;
};

typedef std::vector<float> Floats;

// Products of one row of weights with ROWS vectors x [ROWS][inputs].
inline void multiply(const SCALAR* weight, const float* x, int64_t inputs, float (&out)[ROWS]) {
  constexpr int STREAMS = 4;  // independent sums, since each addition waits for the one before it
  Vector sums[ROWS][STREAMS] = {};
  int64_t i = 0;
  for (; i + STREAMS * LANES <= inputs; i += STREAMS * LANES)
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; s++) {
      const Vector w = load(weight + i + s * LANES);
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; r++) sums[r][s] += w * load(x + r * inputs + i + s * LANES);
    }
  for (; i + LANES <= inputs; i += LANES)
    for (int r = 0; r < ROWS; r++) sums[r][0] += load(weight + i) * load(x + r * inputs + i);
  for (int r = 0; r < ROWS; r++) out[r] = sum_of((sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]));
  for (; i < inputs; i++)
    for (int r = 0; r < ROWS; r++) out[r] += load_one(weight[i]) * x[r * inputs + i];
}

inline void apply(const Affine& affine, int64_t row, const float* x, int64_t inputs, float (&out)[ROWS]) {
  multiply(affine.weight + row * inputs, x, inputs, out);
  if (affine.bias)
    for (int r = 0; r < ROWS; r++) out[r] += load_one(affine.bias[row]);
}

// y [ROWS][outputs] = x [ROWS][inputs] times a weight, rounded.
void apply_all(const Affine& affine, const Floats& x, int64_t inputs, SCALAR* y, int64_t outputs, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < outputs; row++) {
    float out[ROWS];
    apply(affine, row, x.data(), inputs, out);
    for (int r = 0; r < ROWS; r++) store_rounded(y + r * outputs + row, out[r]);
  }
}

Floats floats_of(const SCALAR* x, int64_t count) {
  Floats y(count);
  for (int64_t i = 0; i < count; i++) y[i] = load_one(x[i]);
  return y;
}

void rms_norm(float* x, const SCALAR* weight, int64_t size, double epsilon) {
  double squares = 0;
  for (int64_t i = 0; i < size; i++) squares += double(x[i]) * x[i];
  const float scale = 1 / std::sqrt(squares / size + epsilon);
  for (int64_t i = 0; i < size; i++) x[i] *= scale * load_one(weight[i]);
}

void rms_norms(Floats& x, const SCALAR* weight, const Sizes& sizes) {
  for (int r = 0; r < ROWS; r++) rms_norm(&x[r * sizes.hidden], weight, sizes.hidden, sizes.epsilon);
}

inline float activate(float x, int64_t kind) {
  switch (kind) {
    case 0:  // SiLU
      return x / (1 + std::exp(-x));
    case 1:  // GELU
      return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    default:  // GELU by tanh
      return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
  }
}

}  // namespace

// A product by itself.
extern "C" void product(const Affine& affine, const SCALAR* x, SCALAR* y, int64_t inputs, int64_t outputs, int threads) {
  apply_all(affine, floats_of(x, ROWS * inputs), inputs, y, outputs, threads);
}

// Queries [ROWS][heads][head_dim], keys and values [ROWS][kv_heads][head_dim] of x [ROWS][hidden], with RoPE by the
// cosines and sines [ROWS][head_dim] of the rows' positions.
extern "C" void before_attention(const Layer& layer, const Sizes& sizes, const SCALAR* x, const SCALAR* cosines,
                                 const SCALAR* sines, SCALAR* query, SCALAR* key, SCALAR* value) {
  const int64_t dim = sizes.head_dim, half = dim / 2, queries = sizes.heads, keys = sizes.kv_heads;
  const int64_t heads = queries + 2 * keys, width = heads * dim;
  Floats normed = floats_of(x, ROWS * sizes.hidden), products(ROWS * width);
  rms_norms(normed, layer.attention_norm, sizes);
#pragma omp parallel num_threads(sizes.threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < width; row++) {
      float out[ROWS];
      apply(layer.query_key_value, row, normed.data(), sizes.hidden, out);
      for (int r = 0; r < ROWS; r++) products[r * width + row] = out[r];
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < ROWS * heads; i++) {
      const int64_t r = i / heads, head = i % heads;
      float* from = &products[i * dim];
      SCALAR* to = head < queries          ? query + (r * queries + head) * dim
                   : head < queries + keys ? key + (r * keys + head - queries) * dim
                                           : value + (r * keys + head - queries - keys) * dim;
      if (head >= queries + keys) {
        for (int64_t d = 0; d < dim; d++) store_rounded(to + d, from[d]);
        continue;
      }
      const SCALAR* norm = head < queries ? layer.query_norm : layer.key_norm;
      if (norm) rms_norm(from, norm, dim, sizes.epsilon);
      const SCALAR *c = cosines + r * dim, *s = sines + r * dim;
      for (int64_t d = 0; d < half; d++) {
        store_rounded(to + d, from[d] * load_one(c[d]) - from[d + half] * load_one(s[d]));
        store_rounded(to + d + half, from[d + half] * load_one(c[d + half]) + from[d] * load_one(s[d + half]));
      }
    }
  }
}

// The layer's result y [ROWS][hidden] from that of the attention [ROWS][heads][head_dim] and the layer's input x.
extern "C" void after_attention(const Layer& layer, const Sizes& sizes, const SCALAR* attended, const SCALAR* x,
                                SCALAR* y) {
  const int64_t hidden = sizes.hidden, inner = sizes.intermediate, width = sizes.heads * sizes.head_dim;
  const Floats attention = floats_of(attended, ROWS * width);
  Floats residual(ROWS * hidden), normed, gated(ROWS * inner);
#pragma omp parallel num_threads(sizes.threads)
  {
    float out[ROWS], up[ROWS];
#pragma omp for schedule(static)
    for (int64_t row = 0; row < hidden; row++) {
      apply(layer.output, row, attention.data(), width, out);
      for (int r = 0; r < ROWS; r++) residual[r * hidden + row] = load_one(x[r * hidden + row]) + out[r];
    }
#pragma omp single
    {
      normed = residual;
      rms_norms(normed, layer.mlp_norm, sizes);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < inner; row++) {
      apply(layer.gate_and_up, row, normed.data(), hidden, out);
      apply(layer.gate_and_up, inner + row, normed.data(), hidden, up);
      for (int r = 0; r < ROWS; r++) gated[r * inner + row] = activate(out[r], sizes.activation) * up[r];
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < hidden; row++) {
      apply(layer.down, row, gated.data(), inner, out);
      for (int r = 0; r < ROWS; r++) store_rounded(y + r * hidden + row, residual[r * hidden + row] + out[r]);
    }
  }
}

// Logits [ROWS][outputs] of the last layer's result x [ROWS][hidden].
extern "C" void output_logits(const SCALAR* norm, const Affine& output, const Sizes& sizes, const SCALAR* x,
                              SCALAR* logits, int64_t outputs) {
  Floats normed = floats_of(x, ROWS * sizes.hidden);
  rms_norms(normed, norm, sizes);
  apply_all(output, normed, sizes.hidden, logits, outputs, sizes.threads);
}
