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
// Sums of sixteen vectors, by four rounds of adding halves.
static inline __m512 sum_each(const __m512* rows) {
  __m512 pairs[8], fours[4];
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                             _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(pairs[2 * i]), high = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                                 _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                                 _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
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
    if (shape.softcap > 0) {
      const Floats twice = score * (2.0f / shape.softcap);
      const Ints is_negative = twice < Floats{};
      const Floats power = exp_of_negative(is_negative ? twice : -twice);
      const Floats tanh = (1.0f - power) / (1.0f + power);
      score = (is_negative ? -tanh : tanh) * shape.softcap;
    }
    store(scores + i, score);
    // The repeated keys behind the end do not change the largest.
    most = score > most ? score : most;
  }
  float top = most[0];
  for (int i = 1; i < kWidth; ++i) top = most[i] > top ? most[i] : top;
  Floats sums{};
  for (int i = 0; i < padded; i += kWidth) {
    Floats weight = exp_of_negative(load(scores + i) - top);
    for (int j = 0; j < kWidth; ++j)
      if (i + j >= count) weight[j] = 0;
    store(scores + i, weight);
    sums += weight;
  }
  *largest = top;
  *total = sum(sums);
}

// Adds weights[i] * values[i] of one tile to the output.
template <int kVectors, typename T>
static inline void add_block(const float* weights, const T* const* values, int count, int d,
                             float* output) {
  Floats sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = load(output + d + v * kWidth);
  for (int i = 0; i < count; ++i)
    for (int v = 0; v < kVectors; ++v) sums[v] += weights[i] * load(values[i] + d + v * kWidth);
  for (int v = 0; v < kVectors; ++v) store(output + d + v * kWidth, sums[v]);
}

template <typename T>
static inline void add_tile(const float* weights, const T* const* values, int count, int head_dim,
                            float* output) {
  int d = 0;
  for (; d + 4 * kWidth <= head_dim; d += 4 * kWidth) add_block<4>(weights, values, count, d, output);
  for (; d + kWidth <= head_dim; d += kWidth) add_block<1>(weights, values, count, d, output);
  for (; d < head_dim; ++d)
    for (int i = 0; i < count; ++i) output[d] += weights[i] * widen(values[i][d]);
}

// One chunk of one sequence, all heads: the cache is read in the order in which it lies.
template <typename T>
static void attend_chunk(const DecodeShape& shape, const T* query, const T* keys, const T* values,
                         const int64_t* table, int64_t first, int count, float* scores,
                         float* partial) {
  const int64_t head_dim = shape.head_dim, group = shape.num_q_heads / shape.num_kv_heads;
  const int64_t row = shape.num_kv_heads * head_dim;
  const T *key_rows[kTile], *value_rows[kTile];
  int64_t slots[kChunk];
  for (int i = 0; i < count; ++i) {
    const int64_t position = first + i;
    slots[i] = table[position / shape.block_size] * shape.block_size + position % shape.block_size;
  }
  for (int start = 0; start < count; start += kTile) {
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
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
    const int length = std::min(kTile, count - start);
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      for (int i = 0; i < length; ++i)
        value_rows[i] = values + slots[start + i] * row + head * head_dim;
      for (int64_t q = head * group; q < (head + 1) * group; ++q)
        add_tile(scores + q * kChunk + start, value_rows, length, static_cast<int>(head_dim),
                 partial + q * (head_dim + 2));
    }
  }
}

// Joins the chunks of one head in order.
template <typename T>
static void join_chunks(const float* partials, int64_t stride, int num_chunks, int64_t head_dim,
                        T* output) {
  float top = -INFINITY, total = 0;
  for (int c = 0; c < num_chunks; ++c) top = std::max(top, partials[c * stride + head_dim]);
  for (int c = 0; c < num_chunks; ++c)
    total += std::exp(partials[c * stride + head_dim] - top) * partials[c * stride + head_dim + 1];
  for (int64_t d = 0; d < head_dim; ++d) {
    float value = 0;
    for (int c = 0; c < num_chunks; ++c)
      value += std::exp(partials[c * stride + head_dim] - top) * partials[c * stride + d];
    narrow(value / total, output + d);
  }
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
#pragma omp parallel
  {
    std::vector<float> scores(shape.num_q_heads * kChunk);
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < num_chunks; ++c) {
      const Chunk& chunk = chunks[c];
      attend_chunk(shape, query + chunk.sequence * shape.query_stride, keys, values,
                   tables + chunk.sequence * shape.table_stride, chunk.first, chunk.count,
                   scores.data(), partials.data() + c * stride);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < shape.num_sequences * shape.num_q_heads; ++i) {
      const int64_t sequence = i / shape.num_q_heads, head = i % shape.num_q_heads;
      const int64_t begin = first_chunks[sequence];
      join_chunks(partials.data() + begin * stride + head * (shape.head_dim + 2), stride,
                  static_cast<int>(first_chunks[sequence + 1] - begin), shape.head_dim,
                  output + i * shape.head_dim);
    }
  }
}
