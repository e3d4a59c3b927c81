// Block-sparse attention forward on a CPU, float32: one parallel region that gathers as it goes.
//
// Semantics: reference.py; cpu_native.py compiles and calls it. Keys and values are packed once per
// call, block by block (keys transposed, channels and keys padded with zeros to whole vectors), so
// that a list entry is a pointer. A task is up to TASK_ROWS rows of one query block; it walks the
// list in chunks of CHUNK keys with an online softmax in log2 units. Vectors are the compiler's own,
// so the source has no instruction set; ROWS x VECS accumulators fill the registers of AVX-512 or
// AVX2. Written for -ffinite-math-only: "minus infinity" is LOWEST, a finite number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16, ROWS = 8;
#else
constexpr int WIDTH = 8, ROWS = 4;
#endif
constexpr int PANEL = 2 * WIDTH, CHUNK = 128, TASK_ROWS = 128, GROUP = 32;
constexpr float LOWEST = -1e30f, LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline Vec all(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2 ** x for x <= 0 to 2e-7 relative; 0 below -126.
inline Vec exp2(Vec x) {
  x = larger(x, all(-127.0f));
  const Vec magic = all(12582912.0f);  // 1.5 * 2 ** 23: adding it rounds to an integer
  Vec shifted = x + magic;
  Vec f = x - (shifted - magic);
  Vec p = all(1.5403530e-4f);
  p = p * f + all(1.3333558e-3f);
  p = p * f + all(9.6181291e-3f);
  p = p * f + all(5.5504109e-2f);
  p = p * f + all(2.4022651e-1f);
  p = p * f + all(6.9314718e-1f);
  p = p * f + all(1.0f);
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - (0x4B400000 - 127)) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline float sum(Vec x) {
  float part[WIDTH];
  store(part, x);
  for (int n = WIDTH / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  return part[0];
}
inline float largest(Vec x) {
  float part[WIDTH];
  store(part, x);
  for (int n = WIDTH / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] = std::max(part[i], part[i + n]);
  return part[0];
}

// c[ROWS][N * WIDTH] = a[ROWS][depth] b[depth][PANEL], plus c times factor[ROWS] under ADD
template <int N, bool ADD>
inline void product(const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                    int64_t ldc, const float* factor) {
  Vec acc[ROWS][N];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) acc[i][j] = ADD ? load(c + i * ldc + j * WIDTH) * all(factor[i]) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) row[j] = load(b + k * PANEL + j * WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = all(a[i * lda + k]);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * WIDTH, acc[i][j]);
}

// The same for panels of b that lie `panel` floats apart, and rows a multiple of ROWS; a panel stays
// in the first cache while all rows pass.
template <bool ADD>
void multiply(const float* a, int64_t lda, const float* b, int64_t panel, int64_t rows,
              int64_t depth, int64_t columns, float* c, int64_t ldc, const float* factor) {
  for (int64_t j = 0; j < columns; j += PANEL, b += panel)
    for (int64_t i = 0; i < rows; i += ROWS) {
      const auto run = columns - j > WIDTH ? product<2, ADD> : product<1, ADD>;
      run(a + i * lda, lda, b, depth, c + i * ldc + j, ldc, factor + i);
    }
}

// Uninitialised floats that start at a cache line, so that no vector crosses one.
struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;
inline Floats floats(int64_t count) {
  return Floats(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 64) / 64 * 64)));
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

// What cpu_native.py fills in; strides in elements.
struct Call {
  const float *q, *k, *v;
  float *out, *lse;
  const int32_t *counts, *ids, *some_counts, *some_ids, *mask_ids, *masks, *lengths;
  const float *bias, *pooled_k, *pooled_v, *pooled_bias;
  const int32_t* bits;
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  int64_t pooled_k_strides[3], pooled_v_strides[3];
  int64_t count_strides[3], id_strides[3], some_count_strides[3], some_id_strides[3];
  int64_t bias_strides[2], pooled_bias_strides[2], bit_strides[3];
  int64_t batch, heads, n_q, n_k, n_pooled, d, block_q, block_k, width, some_width, mask_count;
  float scale;
  int32_t threads;
};

namespace {

// Keys, transposed, and values, block by block in panels of PANEL columns: [key panels][d][PANEL] and
// [channel panels][keys][PANEL].
struct Packed {
  int64_t block, d, columns, channels, blocks;
  Floats k, v;
  Packed(int64_t heads, int64_t n, int64_t block, int64_t d)
      : block(block), d(d), columns(up(block, PANEL)), channels(up(d, PANEL)),
        blocks((n + block - 1) / block), k(floats(heads * blocks * columns * d)),
        v(floats(heads * blocks * block * channels)) {}
  const float* keys(int64_t at, int64_t first) const { return k.get() + (at * columns + first) * d; }
  const float* values(int64_t at, int64_t first) const {
    return v.get() + at * block * channels + first * PANEL;
  }
  void fill(int64_t at, const float* keys, int64_t key_stride, const float* values,
            int64_t value_stride, int64_t tokens) {
    float* to_k = k.get() + at * columns * d;
    float* to_v = v.get() + at * block * channels;
    if (tokens < columns) std::fill(to_k, to_k + columns * d, 0.0f);
    if (tokens < block || d < channels) std::fill(to_v, to_v + block * channels, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      float* column = to_k + t / PANEL * PANEL * d + t % PANEL;
      for (int64_t c = 0; c < d; ++c) column[c * PANEL] = keys[t * key_stride + c];
      for (int64_t c = 0; c < d; c += PANEL)
        std::memcpy(to_v + c * block + t * PANEL, values + t * value_stride + c,
                    std::min<int64_t>(PANEL, d - c) * sizeof(float));
    }
  }
};

struct Task {
  const Call& call;
  int64_t rows, padded, channels;
  Floats q, out, m, norm, p;

  explicit Task(const Call& call)
      : call(call), rows(0), padded(0), channels(up(call.d, WIDTH)), q(floats(TASK_ROWS * call.d)),
        out(floats(TASK_ROWS * channels)), m(floats(TASK_ROWS)), norm(floats(TASK_ROWS * WIDTH)),
        p(floats(GROUP * CHUNK)) {}

  void start(const float* from, int64_t stride, int64_t count) {
    rows = count;
    padded = up(count, ROWS);
    std::fill_n(q.get(), TASK_ROWS * call.d, 0.0f);
    std::fill_n(out.get(), TASK_ROWS * channels, 0.0f);
    std::fill_n(m.get(), TASK_ROWS, LOWEST);
    std::fill_n(norm.get(), TASK_ROWS * WIDTH, 0.0f);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < call.d; ++c)
        q[i * call.d + c] = from[i * stride + c] * (call.scale * LOG2E);
  }

  // Absorbs `tokens` keys of one packed block, from key `first`. `bias` is natural and may be null;
  // bit (key) of words[row * words_stride + key / 32] says whether a pair exists, if words are given.
  void absorb(const Packed& packed, int64_t at, int64_t first, int64_t tokens, const float* bias,
              const int32_t* words, int64_t words_stride) {
    const int64_t columns = up(tokens, WIDTH);
    const bool masked = tokens != columns || bias || words;
    float shift[GROUP], alpha[GROUP];
    for (int64_t base = 0; base < padded; base += GROUP) {
      const int64_t group = std::min<int64_t>(GROUP, padded - base);
      multiply<false>(q.get() + base * call.d, call.d, packed.keys(at, first), call.d * PANEL, group,
                      call.d, columns, p.get(), CHUNK, alpha);
      if (masked) hide(base, group, first, tokens, columns, bias, words, words_stride);
      for (int64_t i = 0; i < group; ++i) {
        const float* row = p.get() + i * CHUNK;
        Vec top = load(row);
        for (int64_t t = WIDTH; t < columns; t += WIDTH) top = larger(top, load(row + t));
        const float was = m[base + i], now = std::max(was, largest(top));
        shift[i] = now > LOWEST ? now : 0;  // a row that has seen nothing yet: all weights are 0
        alpha[i] = was - now;
        m[base + i] = now;
      }
      for (int64_t i = 0; i < GROUP; i += WIDTH) store(alpha + i, exp2(load(alpha + i)));
      for (int64_t i = 0; i < group; ++i) {
        float* row = p.get() + i * CHUNK;
        float* total_of_row = norm.get() + (base + i) * WIDTH;
        Vec total = load(total_of_row) * all(alpha[i]);
        for (int64_t t = 0; t < columns; t += WIDTH) {
          const Vec x = exp2(load(row + t) - all(shift[i]));
          total += x;
          store(row + t, x);
        }
        store(total_of_row, total);
      }
      multiply<true>(p.get(), CHUNK, packed.values(at, first), packed.block * PANEL, group, tokens,
                     channels, out.get() + base * channels, channels, alpha);
    }
  }

  // Biases of a group's scores, and LOWEST for pairs that do not exist.
  void hide(int64_t base, int64_t group, int64_t first, int64_t tokens, int64_t columns,
            const float* bias, const int32_t* words, int64_t words_stride) {
    for (int64_t i = 0; i < group; ++i) {
      float* row = p.get() + i * CHUNK;
      const int32_t* word = words && base + i < rows ? words + (base + i) * words_stride : nullptr;
      if (bias)
        for (int64_t t = 0; t < tokens; ++t) row[t] = std::max(row[t] + bias[t] * LOG2E, LOWEST);
      if (word)
        for (int64_t t = 0; t < tokens; ++t)
          row[t] = (word[(first + t) / 32] >> ((first + t) % 32)) & 1 ? row[t] : LOWEST;
      for (int64_t t = tokens; t < columns; ++t) row[t] = LOWEST;
    }
  }

  void finish(float* to, int64_t stride, float* lse) {
    for (int64_t i = 0; i < rows; ++i) {
      const float total = sum(load(norm.get() + i * WIDTH)), inverse = total > 0 ? 1 / total : 0;
      for (int64_t c = 0; c < call.d; ++c) to[i * stride + c] = out[i * channels + c] * inverse;
      if (!lse) continue;
      lse[i] = (m[i] + std::log2(std::max(total, 1e-38f))) * LN2;
      const uint32_t minus_infinity = 0xff800000u;
      if (!(total > 0)) std::memcpy(lse + i, &minus_infinity, sizeof minus_infinity);
    }
  }
};

}  // namespace

extern "C" void ditopt_block_sparse_attention(const Call* given) {
  const Call& c = *given;
  const int64_t pairs = c.batch * c.heads;
  const int64_t key_blocks = (c.n_k + c.block_k - 1) / c.block_k;
  const int64_t words = (c.block_k + 31) / 32;
  Packed keys(pairs, c.n_k, c.block_k, c.d);
  Packed pooled(pairs, std::max<int64_t>(c.n_pooled, 0), CHUNK, c.d);
  const int64_t query_blocks = (c.n_q + c.block_q - 1) / c.block_q;
  const int64_t parts = (std::min(c.block_q, c.n_q) + TASK_ROWS - 1) / TASK_ROWS;

#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(static)
    for (int64_t at = 0; at < pairs * keys.blocks; ++at) {
      const int64_t b = at / keys.blocks / c.heads, h = at / keys.blocks % c.heads;
      const int64_t first = at % keys.blocks * c.block_k;
      int64_t tokens = std::min(c.block_k, c.n_k - first);
      if (c.lengths) tokens = std::max<int64_t>(0, std::min<int64_t>(tokens, c.lengths[at % keys.blocks]));
      keys.fill(at, c.k + b * c.k_strides[0] + h * c.k_strides[1] + first * c.k_strides[2],
                c.k_strides[2],
                c.v + b * c.v_strides[0] + h * c.v_strides[1] + first * c.v_strides[2],
                c.v_strides[2], tokens);
    }
#pragma omp for schedule(static)
    for (int64_t at = 0; at < pairs * pooled.blocks; ++at) {
      const int64_t b = at / pooled.blocks / c.heads, h = at / pooled.blocks % c.heads;
      const int64_t first = at % pooled.blocks * CHUNK;
      pooled.fill(at,
                  c.pooled_k + b * c.pooled_k_strides[0] + h * c.pooled_k_strides[1] +
                      first * c.pooled_k_strides[2],
                  c.pooled_k_strides[2],
                  c.pooled_v + b * c.pooled_v_strides[0] + h * c.pooled_v_strides[1] +
                      first * c.pooled_v_strides[2],
                  c.pooled_v_strides[2], std::min<int64_t>(CHUNK, c.n_pooled - first));
    }
    Task task(c);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < pairs * query_blocks * parts; ++unit) {
      const int64_t pair = unit / (query_blocks * parts), b = pair / c.heads, h = pair % c.heads;
      const int64_t block = unit / parts % query_blocks, part = unit % parts;
      const int64_t in_block = part * TASK_ROWS, row = block * c.block_q + in_block;
      const int64_t rows = std::min<int64_t>(
          TASK_ROWS, std::min(c.block_q - in_block, c.n_q - row));
      if (rows <= 0) continue;
      task.start(c.q + b * c.q_strides[0] + h * c.q_strides[1] + row * c.q_strides[2],
                 c.q_strides[2], rows);
      const float* bias = c.bias ? c.bias + b * c.bias_strides[0] + h * c.bias_strides[1] : nullptr;
      for (int list = 0; list < (c.some_ids ? 2 : 1); ++list) {
        const int32_t* counts = list ? c.some_counts : c.counts;
        const int64_t* cs = list ? c.some_count_strides : c.count_strides;
        const int64_t* is = list ? c.some_id_strides : c.id_strides;
        const int64_t from = b * is[0] + h * is[1] + block * is[2];
        const int32_t* ids = (list ? c.some_ids : c.ids) + from;
        const int64_t width = list ? c.some_width : c.width;
        const int64_t count = std::min<int64_t>(counts[b * cs[0] + h * cs[1] + block * cs[2]], width);
        for (int64_t e = 0; e < count; ++e) {
          const int64_t id = ids[e];
          if (id < 0 || id >= key_blocks) continue;
          const int32_t* bits = nullptr;
          if (list) {
            const int64_t mask = c.mask_ids[from + e];
            if (mask < 0 || mask >= c.mask_count) continue;
            bits = c.masks + (mask * c.block_q + in_block) * words;
          }
          int64_t tokens = std::min(c.block_k, c.n_k - id * c.block_k);
          if (c.lengths) tokens = std::min<int64_t>(tokens, c.lengths[id]);
          for (int64_t first = 0; first < tokens; first += CHUNK)
            task.absorb(keys, pair * keys.blocks + id, first,
                        std::min<int64_t>(CHUNK, tokens - first),
                        bias ? bias + id * c.block_k + first : nullptr, bits, words);
        }
      }
      if (c.n_pooled > 0) {
        const int32_t* bits = c.bits + b * c.bit_strides[0] + h * c.bit_strides[1] +
                              block * c.bit_strides[2];
        const float* weight =
            c.pooled_bias + b * c.pooled_bias_strides[0] + h * c.pooled_bias_strides[1];
        for (int64_t at = 0; at < pooled.blocks; ++at)
          task.absorb(pooled, pair * pooled.blocks + at, 0,
                      std::min<int64_t>(CHUNK, c.n_pooled - at * CHUNK), weight + at * CHUNK,
                      bits + at * (CHUNK / 32), 0);
      }
      task.finish(c.out + b * c.out_strides[0] + h * c.out_strides[1] + row * c.out_strides[2],
                  c.out_strides[2],
                  c.lse ? c.lse + (b * c.heads + h) * c.n_q + row : nullptr);
    }
  }
}
