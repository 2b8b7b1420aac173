// Attention of one query per sequence over its paged context, read where it lies.
// Included once per instruction set, inside its namespace.
//
//   score[t] = softcap * tanh(query . key[t] * scale / softcap)      t in the window
//   output   = sum_t softmax(score)[t] * value[t]
//
// The context is cut into chunks of kChunk positions, whatever the batch and the threads are, so that
// the result of a sequence depends on nothing but itself. A chunk leaves its sum of values, its
// largest score and its sum of weights per head; the chunks of a sequence are then joined in order
// (Flash-Decoding, Dao et al. 2023). Products and sums are float32.

// score[i] of one query and kTile keys; short tiles repeat their last key.
template <typename T>
static inline void score_tile(const T* query, const T* const* keys, int head_dim, float* scores) {
  for (int i = 0; i < kTile; i += 4) {
    Floats sums[4] = {};
    int d = 0;
    for (; d + kWidth <= head_dim; d += kWidth) {
      const Floats q = load(query + d);
      for (int j = 0; j < 4; ++j) sums[j] += q * load(keys[i + j] + d);
    }
    for (int j = 0; j < 4; ++j) {
      float total = sum(sums[j]);
      for (int rest = d; rest < head_dim; ++rest) total += widen(query[rest]) * widen(keys[i + j][rest]);
      scores[i + j] = total;
    }
  }
}

#ifdef DOT_BFLOAT16
// What `join` makes of the lanes of each of sixteen vectors, by four rounds of joining halves.
template <typename Join>
static inline __m512 join_each(const __m512* rows, Join join) {
  __m512 pairs[8], fours[4];
  for (int i = 0; i < 8; ++i)
    pairs[i] = join(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                    _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(pairs[2 * i]), high = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = join(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  const __m512 a = join(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                        _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
  const __m512 b = join(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                        _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
  return join(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

static inline __m512 sum_each(const __m512* rows) {
  return join_each(rows, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
}

static inline __m512 max_each(const __m512* rows) {
  return join_each(rows, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
}

static inline void score_tile(const uint16_t* query, const uint16_t* const* keys, int head_dim,
                              float* scores) {
  __m512 sums[kTile];
  for (int i = 0; i < kTile; ++i) sums[i] = _mm512_setzero_ps();
  for (int d = 0; d < head_dim; d += 32) {
    const int left = head_dim - d;
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
    const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(mask, query + d);
    for (int i = 0; i < kTile; ++i)
      sums[i] = _mm512_dpbf16_ps(sums[i], q, (__m512bh)_mm512_maskz_loadu_epi16(mask, keys[i] + d));
  }
  _mm512_storeu_ps(scores, sum_each(sums));
}
#endif

// Turns products into weights in place; returns the largest score and the sum of the weights.
static inline void weigh(float* scores, int count, const DecodeShape& shape, float* largest,
                         float* total) {
  const int padded = (count + kTile - 1) / kTile * kTile;
  Floats most = broadcast(-INFINITY);
  for (int i = 0; i < padded; i += kWidth) {
    Floats score = load(scores + i) * shape.scale;
    if (shape.softcap > 0) score = cap(score, shape.softcap);
    store(scores + i, score);
    // The repeated keys behind the end do not change the largest.
    most = score > most ? score : most;
  }
  const float top = max_of(most);
  Floats sums{};
  // The repeated keys weigh nothing.
  for (int i = count; i < padded; ++i) scores[i] = -INFINITY;
  for (int i = 0; i < padded; i += kWidth) {
    const Floats weight = exp_of_negative(load(scores + i) - top);
    store(scores + i, weight);
    sums += weight;
  }
  *largest = top;
  *total = sum(sums);
}

// Adds weights[i] * values[i] of one tile to the outputs of kQueries queries, which share what is
// read. Weights of the next query are kChunk further, outputs head_dim + 2.
template <int kQueries, int kVectors, typename T>
static inline void add_block(const float* weights, const T* const* values, int count, int d,
                             int stride, float* output) {
  Floats sums[kQueries][kVectors];
  for (int q = 0; q < kQueries; ++q)
    for (int v = 0; v < kVectors; ++v) sums[q][v] = load(output + q * stride + d + v * kWidth);
  for (int i = 0; i < count; ++i) {
    Floats value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load(values[i] + d + v * kWidth);
    for (int q = 0; q < kQueries; ++q)
      for (int v = 0; v < kVectors; ++v) sums[q][v] += weights[q * kChunk + i] * value[v];
  }
  for (int q = 0; q < kQueries; ++q)
    for (int v = 0; v < kVectors; ++v) store(output + q * stride + d + v * kWidth, sums[q][v]);
}

template <int kQueries, typename T>
static inline void add_tile(const float* weights, const T* const* values, int count, int head_dim,
                            float* output) {
  const int stride = head_dim + 2;
  int d = 0;
  for (; d + kAtOnce * kWidth <= head_dim; d += kAtOnce * kWidth)
    add_block<kQueries, kAtOnce>(weights, values, count, d, stride, output);
  for (; d + kWidth <= head_dim; d += kWidth)
    add_block<kQueries, 1>(weights, values, count, d, stride, output);
  for (; d < head_dim; ++d)
    for (int q = 0; q < kQueries; ++q)
      for (int i = 0; i < count; ++i)
        output[q * stride + d] += weights[q * kChunk + i] * widen(values[i][d]);
}

// Asks for what is read next of each row. Blocks lie anywhere, which hardware does not foresee.
template <typename T>
static inline void prefetch(const T* rows, const int64_t* slots, int count, int64_t row, int64_t d,
                            int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int i = 0; i < count; ++i)
    for (int64_t part = 0; part < head_dim; part += kLine)
      __builtin_prefetch(rows + slots[i] * row + d + part);
}

static inline void find_slots(const DecodeShape& shape, const int64_t* table, const Chunk& chunk,
                              int64_t* slots) {
  int64_t block = chunk.first / shape.block_size, offset = chunk.first % shape.block_size;
  for (int i = 0; i < chunk.count; ++i) {
    slots[i] = table[block] * shape.block_size + offset;
    if (++offset < shape.block_size) continue;
    offset = 0;
    ++block;
  }
}

// One chunk of one sequence, all heads: the cache is read in the order in which it lies.
template <typename T>
static void attend_chunk(const DecodeShape& shape, const T* query, const T* keys, const T* values,
                         const int64_t* table, const Chunk& chunk, float* scores,
                         float* partial) {
  const int64_t head_dim = shape.head_dim, group = shape.num_q_heads / shape.num_kv_heads;
  const int64_t row = shape.num_kv_heads * head_dim;
  const T *key_rows[kTile], *value_rows[kTile];
  const int count = chunk.count;
  int64_t slots[kChunk];
  find_slots(shape, table, chunk, slots);
  for (int start = 0; start < count; start += kTile) {
    const int next = start + kTile < count ? start + kTile : 0;
    const T* ahead = next ? keys : values;
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      prefetch(ahead, slots + next, std::min(kTile, count - next), row, head * head_dim, head_dim);
      for (int i = 0; i < kTile; ++i)
        key_rows[i] = keys + slots[std::min(start + i, count - 1)] * row + head * head_dim;
      for (int64_t q = head * group; q < (head + 1) * group; ++q)
        score_tile(query + q * head_dim, key_rows, static_cast<int>(head_dim),
                   scores + q * kChunk + start);
    }
  }
  for (int64_t q = 0; q < shape.num_q_heads; ++q) {
    float* head_partial = partial + q * (head_dim + 2);
    std::fill(head_partial, head_partial + head_dim, 0.0f);
    weigh(scores + q * kChunk, count, shape, head_partial + head_dim, head_partial + head_dim + 1);
  }
  for (int start = 0; start < count; start += kTile) {
    const int length = std::min(kTile, count - start), next = start + length;
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      prefetch(values, slots + next, std::min(kTile, count - next), row, head * head_dim, head_dim);
      for (int i = 0; i < length; ++i)
        value_rows[i] = values + slots[start + i] * row + head * head_dim;
      const float* weights = scores + head * group * kChunk + start;
      float* outputs = partial + head * group * (head_dim + 2);
      const int width = static_cast<int>(head_dim);
      int64_t q = 0;
      for (; q + 4 <= group; q += 4)
        add_tile<4>(weights + q * kChunk, value_rows, length, width, outputs + q * (width + 2));
      for (; q + 2 <= group; q += 2)
        add_tile<2>(weights + q * kChunk, value_rows, length, width, outputs + q * (width + 2));
      for (; q < group; ++q)
        add_tile<1>(weights + q * kChunk, value_rows, length, width, outputs + q * (width + 2));
    }
  }
}

// Attends to all chunks, which threads take in order; called by all threads of a team.
template <typename T>
static void attend_chunks(const DecodeShape& shape, const T* query, const T* keys, const T* values,
                          const int64_t* tables, const std::vector<Chunk>& chunks,
                          std::atomic<int64_t>& taken, float* partials) {
  std::vector<float> scores(shape.num_q_heads * kChunk);
  const int64_t stride = shape.num_q_heads * (shape.head_dim + 2), count = chunks.size();
  for (int64_t c; (c = taken.fetch_add(1, std::memory_order_relaxed)) < count;)
    attend_chunk(shape, query + chunks[c].sequence * shape.query_stride, keys, values,
                 tables + chunks[c].sequence * shape.table_stride, chunks[c], scores.data(),
                 partials + c * stride);
}

#ifdef TILES
#include "decode_tiles.h"
#endif

// Joins the chunks of one head in order; `sums` has room for head_dim floats.
template <typename T>
static void join_chunks(const float* partials, int64_t stride, int64_t num_chunks, int64_t head_dim,
                        float* sums, T* output) {
  float top = -INFINITY, total = 0;
  for (int64_t c = 0; c < num_chunks; ++c) top = std::max(top, partials[c * stride + head_dim]);
  std::fill(sums, sums + head_dim, 0.0f);
  for (int64_t c = 0; c < num_chunks; ++c) {
    const float* chunk = partials + c * stride;
    const float factor = std::exp(chunk[head_dim] - top);
    total += factor * chunk[head_dim + 1];
    for (int64_t d = 0; d < head_dim; ++d) sums[d] += factor * chunk[d];
  }
  for (int64_t d = 0; d < head_dim; ++d) narrow(sums[d] / total, output + d);
}

template <typename T>
static void decode(const DecodeShape& shape, const void* query_data, const void* key_data,
                   const void* value_data, const int64_t* tables, const int64_t* lengths,
                   void* output_data) {
  const T *query = static_cast<const T*>(query_data), *keys = static_cast<const T*>(key_data);
  const T* values = static_cast<const T*>(value_data);
  T* output = static_cast<T*>(output_data);
  const int64_t stride = shape.num_q_heads * (shape.head_dim + 2);
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunks;
  for (int64_t s = 0; s < shape.num_sequences; ++s) {
    first_chunks.push_back(chunks.size());
    int64_t first = shape.window > 0 ? std::max<int64_t>(0, lengths[s] - shape.window) : 0;
    for (; first < lengths[s]; first += kChunk)
      chunks.push_back({s, first, static_cast<int>(std::min<int64_t>(kChunk, lengths[s] - first))});
  }
  first_chunks.push_back(chunks.size());
  const int64_t num_chunks = chunks.size();
  std::vector<float> partials(num_chunks * stride);
  std::atomic<int64_t> taken(0);
#pragma omp parallel
  {
    attend_chunks(shape, query, keys, values, tables, chunks, taken, partials.data());
    std::vector<float> sums(shape.head_dim);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < shape.num_sequences * shape.num_q_heads; ++i) {
      const int64_t sequence = i / shape.num_q_heads, head = i % shape.num_q_heads;
      const int64_t begin = first_chunks[sequence];
      join_chunks(partials.data() + begin * stride + head * (shape.head_dim + 2), stride,
                  first_chunks[sequence + 1] - begin, shape.head_dim, sums.data(),
                  output + i * shape.head_dim);
    }
  }
}
