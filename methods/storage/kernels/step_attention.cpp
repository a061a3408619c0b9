// Attention of one token per row over stored keys and values on a CPU; cpu.py defines the macros.
//
// KEY_CHANNELS, VALUE_CHANNELS: channels, multiples of 16.  GROUP: query heads per KV head.
//
// A step reads each stored number once, so the kernel has to be as fast as the memory: the query heads of a KV head
// share every load, and the tokens of a KV head are divided into parts, which the threads share.

namespace {

constexpr int BLOCK = 64;  // tokens between two updates of the maximum
// Value channels that are summed at a time: their sums stay in registers, of which there are 32 with AVX-512.
constexpr int CHANNELS = std::max(1, std::min<int>(VALUE_CHANNELS, 256 / GROUP) / LANES) * LANES;

// Sums of neighbours: of a in the first half, of b in the second. Four levels of it turn 16 vectors into their 16 sums.
inline Vector folded(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// What a head's queries have seen of some of its tokens: softmax's maximum and normalizer, and the weighted values.
struct Part {
  float max[GROUP], sum[GROUP], out[GROUP][VALUE_CHANNELS];
};

struct Head {
  float query[GROUP][KEY_CHANNELS];  // times the scaling
  const SCALAR *keys, *values;
  const bool* valid;  // or null
  float* logits;      // of the first query, or null; those of the next one are `logits_stride` further
  int64_t key_stride, value_stride, logits_stride;
  float softcap;  // 0: none
};

// Logits of 16 tokens, of which only the first `count` exist; `rows` is for their keys, which are read once and in order.
inline void logits_of(const Head& head, int64_t first, int count, int lane, float (&rows)[LANES][KEY_CHANNELS],
                      float (&logits)[GROUP][BLOCK]) {
  const SCALAR* keys = head.keys + first * head.key_stride;
  for (int t = 0; t < count; t++)
    for (int d = 0; d < KEY_CHANNELS; d += LANES) store(&rows[t][d], load(keys + t * head.key_stride + d));
  for (int g = 0; g < GROUP; g++) {
    Vector sums[LANES];
#pragma GCC unroll 16
    for (int t = 0; t < LANES; t++) {
      sums[t] = load(head.query[g]) * load(rows[t]);
#pragma GCC unroll 16
      for (int d = LANES; d < KEY_CHANNELS; d += LANES) sums[t] += load(&head.query[g][d]) * load(&rows[t][d]);
    }
#pragma GCC unroll 4
    for (int width = LANES; width > 1; width /= 2)
#pragma GCC unroll 8
      for (int t = 0; t < width / 2; t++) sums[t] = folded(sums[2 * t], sums[2 * t + 1]);
    Vector sum = sums[0];
    if (head.softcap > 0) {  // softcap * tanh(x / softcap)
      const Vector size = sum < 0.0f ? -sum : sum, e = exponential(size * (-2.0f / head.softcap));
      const Vector capped = head.softcap * (1.0f - e) / (1.0f + e);
      sum = sum < 0.0f ? -capped : capped;
    }
    store(&logits[g][lane], sum);
  }
}

// Adds the weighted values of `count` tokens, `WIDTH` vectors of channels from channel `from`.
template <int WIDTH>
inline void add_values(const Head& head, int64_t first, int count, int from, float (&weights)[GROUP][BLOCK], Part& part) {
  Vector out[GROUP][WIDTH];
#pragma GCC unroll 16
  for (int g = 0; g < GROUP; g++)
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) out[g][i] = load(&part.out[g][from + i * LANES]);
  for (int t = 0; t < count; t++) {
    const SCALAR* values = head.values + (first + t) * head.value_stride + from;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
      const Vector x = load(values + i * LANES);
#pragma GCC unroll 16
      for (int g = 0; g < GROUP; g++) out[g][i] += weights[g][t] * x;
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < GROUP; g++)
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) store(&part.out[g][from + i * LANES], out[g][i]);
}

void attend_to(const Head& head, int64_t begin, int64_t end, Part& part) {
  float rows[LANES][KEY_CHANNELS] = {}, weights[GROUP][BLOCK];
  std::fill(part.max, part.max + GROUP, -INFINITY);
  std::fill(part.sum, part.sum + GROUP, 0.0f);
  std::fill(part.out[0], part.out[0] + GROUP * VALUE_CHANNELS, 0.0f);
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int count = int(std::min<int64_t>(BLOCK, end - first));
    for (int t = 0; t < count; t += LANES) logits_of(head, first + t, std::min(count - t, LANES), t, rows, weights);
    for (int g = 0; g < GROUP; g++) {
      float* row = weights[g];
      std::fill(row + count, row + BLOCK, -INFINITY);
      if (head.valid)
        for (int t = 0; t < count; t++)
          if (!head.valid[first + t]) row[t] = -INFINITY;
      if (head.logits) std::copy(row, row + count, head.logits + g * head.logits_stride + first);
      float max = part.max[g];
      bool is_nan = false;
      for (int t = 0; t < count; t++) {
        max = row[t] > max ? row[t] : max;
        is_nan |= row[t] != row[t];
      }
      if (is_nan) max = NAN;  // as in softmax, one NaN makes the result NaN
      if (max == -INFINITY) {  // no token yet
        std::fill(row, row + count, 0.0f);
        continue;
      }
      Vector sums = {};
      for (int t = 0; t < BLOCK; t += LANES) {
        const Vector weight = exponential(load(&row[t]) - max);
        store(&row[t], weight);
        sums += weight;
      }
      const float scale = std::exp(part.max[g] - max);
      part.sum[g] = part.sum[g] * scale + sum_of(sums);
      part.max[g] = max;
      if (scale != 1)
        for (int d = 0; d < VALUE_CHANNELS; d += LANES) store(&part.out[g][d], load(&part.out[g][d]) * scale);
    }
    constexpr int WHOLE = VALUE_CHANNELS / CHANNELS * CHANNELS, LAST = VALUE_CHANNELS - WHOLE;
    for (int from = 0; from < WHOLE; from += CHANNELS)
      add_values<CHANNELS / LANES>(head, first, count, from, weights, part);
    if constexpr (LAST > 0) add_values<LAST / LANES>(head, first, count, WHOLE, weights, part);
  }
}

// Joins the parts of a head; the logits become weights.
void join(const Head& head, const Part* parts, int64_t count, int64_t tokens, const float* sinks, SCALAR* out) {
  for (int g = 0; g < GROUP; g++) {
    float max = sinks ? sinks[g] : -INFINITY;
    for (int64_t p = 0; p < count; p++) max = parts[p].max[g] != parts[p].max[g] ? NAN : std::max(max, parts[p].max[g]);
    float sum = sinks ? std::exp(sinks[g] - max) : 0.0f, joined[VALUE_CHANNELS] = {};
    for (int64_t p = 0; p < count; p++) {
      if (parts[p].max[g] == -INFINITY) continue;
      const float scale = std::exp(parts[p].max[g] - max);
      sum += scale * parts[p].sum[g];
      for (int d = 0; d < VALUE_CHANNELS; d++) joined[d] += scale * parts[p].out[g][d];
    }
    for (int d = 0; d < VALUE_CHANNELS; d++)
      store_rounded(out + g * VALUE_CHANNELS + d, sum == 0 ? 0.0f : joined[d] / sum);  // 0 if there is no token
    if (!head.logits) continue;
    float* row = head.logits + g * head.logits_stride;
    int64_t t = 0;
    for (; t + LANES <= tokens; t += LANES) store(row + t, exponential(load(row + t) - max) / sum);
    for (; t < tokens; t++) row[t] = std::exp(row[t] - max) / sum;
  }
}

}  // namespace

// Strides are in elements, `threads` threads take `parts` parts of each head; logits may be null.
extern "C" void step_attention(const SCALAR* query, const SCALAR* keys, const SCALAR* values, const bool* valid,
                               const float* sinks, SCALAR* out, float* logits, int64_t rows, int64_t heads,
                               int64_t tokens, int64_t query_row, int64_t query_head, int64_t key_row, int64_t key_head,
                               int64_t key_token, int64_t value_row, int64_t value_head, int64_t value_token,
                               int64_t valid_row, int64_t valid_head, float scaling, float softcap, int64_t parts,
                               int threads) {
  const int64_t all = rows * heads;
  const int64_t size = ((tokens + parts - 1) / parts + BLOCK - 1) / BLOCK * BLOCK;  // tokens of a part
  std::vector<Head> head(all);
  std::vector<Part> made(all * parts);
  for (int64_t i = 0; i < all; i++) {
    const int64_t b = i / heads, h = i % heads;
    Head& x = head[i];
    for (int g = 0; g < GROUP; g++)
      for (int d = 0; d < KEY_CHANNELS; d += LANES)
        store(&x.query[g][d], load(query + b * query_row + (h * GROUP + g) * query_head + d) * scaling);
    x.keys = keys + b * key_row + h * key_head;
    x.values = values + b * value_row + h * value_head;
    x.valid = valid ? valid + b * valid_row + h * valid_head : nullptr;
    x.logits = logits ? logits + i * GROUP * tokens : nullptr;
    x.key_stride = key_token;
    x.value_stride = value_token;
    x.logits_stride = tokens;
    x.softcap = softcap;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < all * parts; i++) {
      const int64_t begin = std::min(tokens, i % parts * size);
      attend_to(head[i / parts], begin, std::min(tokens, begin + size), made[i]);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all; i++)
      join(head[i], &made[i * parts], parts, tokens, sinks ? sinks + i % heads * GROUP : nullptr,
           out + i * GROUP * VALUE_CHANNELS);
  }
}
