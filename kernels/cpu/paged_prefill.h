// Attention of the query rows of chunks of prompts over their paged contexts, read where they lie.
// Included once per instruction set, inside its namespace.
//
//   score[i][t] = softcap * tanh(query[i] . key[t] * scale / softcap)      t that row i sees
//   output[i]   = sum_t softmax(score[i])[t] * value[t]
//
// Row i sees the positions from seen[i][0] to before seen[i][1]. Its context is cut at multiples of
// kKeys, and each part corrects the sums of those before it (FlashAttention-2, Dao 2023). Neither
// chunks nor batches nor threads change a row.
//
//   packed queries   [row][d]                    rows of a block: token by token, head by head
//   packed keys      [d / depth][key][depth]     depth: elements per word of 32 bits
//   packed values    [key / depth][d][depth]
//   weights          [row][key]                  kRows rows
//
// So both products are rows of one matrix times vectors of another, without sums across vectors.
// Sums are float32; with bfloat16 dot products, weights are rounded to bfloat16.

// output[i] = factors[i] * output[i] + left[i] * right, kRows rows of kVectors vectors; without
// factors the output is only written.
template <int kVectors>
static inline void multiply_tile(const float* left, int64_t left_stride, const float* right,
                                 int64_t right_stride, int64_t steps, const float* factors,
                                 float* output, int64_t output_stride) {
  Floats sums[kRows][kVectors] = {};
  if (factors != nullptr)
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v)
        sums[i][v] = load(output + i * output_stride + v * kWidth) * factors[i];
  for (int64_t k = 0; k < steps; ++k) {
    Floats columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load(right + k * right_stride + v * kWidth);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) sums[i][v] += left[i * left_stride + k] * columns[v];
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) store(output + i * output_stride + v * kWidth, sums[i][v]);
}

#ifdef DOT_BFLOAT16
// Unless it is told to unroll early, GCC 12 stores every sum with every step.
template <int kVectors>
static inline void multiply_tile(const uint16_t* left, int64_t left_stride, const uint16_t* right,
                                 int64_t right_stride, int64_t steps, const float* factors,
                                 float* output, int64_t output_stride) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = _mm512_setzero_ps();
      if (factors != nullptr)
        sums[i][v] = _mm512_mul_ps(_mm512_loadu_ps(output + i * output_stride + v * kWidth),
                                   _mm512_set1_ps(factors[i]));
    }
  for (int64_t k = 0; k < steps; ++k) {
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      columns[v] = (__m512bh)_mm512_loadu_si512(right + k * right_stride + v * 2 * kWidth);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, left + i * left_stride + 2 * k, sizeof pair);
      const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], row, columns[v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_ps(output + i * output_stride + v * kWidth, sums[i][v]);
}
#endif

// multiply_tile for any number of vectors, in parts of about the same size.
template <typename E>
static inline void multiply(const E* left, int64_t left_stride, const E* right,
                            int64_t right_stride, int64_t steps, int64_t num_vectors,
                            const float* factors, float* output, int64_t output_stride) {
  for (int64_t parts = (num_vectors + kAtOnce - 1) / kAtOnce; parts > 0; --parts) {
    const int64_t count = (num_vectors + parts - 1) / parts;
    void (*run)(const E*, int64_t, const E*, int64_t, int64_t, const float*, float*, int64_t) =
        multiply_tile<1>;
    if (count == 2) run = multiply_tile<2>;
    if constexpr (kAtOnce > 2) {
      if (count == 3) run = multiply_tile<3>;
      if (count == 4) run = multiply_tile<4>;
    }
    run(left, left_stride, right, right_stride, steps, factors, output, output_stride);
    num_vectors -= count;
    right += count * kWidth * (4 / sizeof(E));
    output += count * kWidth;
  }
}

struct Span {
  int64_t first, last;
};

// Rows of one chunk that share a key head: token by token, head by head.
template <typename T>
class SharedRows {
 public:
  SharedRows(const PrefillShape& shape, const QueryBlock& block, const int64_t* seen)
      : shape_(shape),
        block_(block),
        seen_(seen + 2 * block.first),
        group_(shape.num_q_heads / shape.num_kv_heads),
        count_(block.count * group_) {}

  const PrefillShape& shape() const { return shape_; }
  int64_t count() const { return count_; }

  // The positions that a row sees.
  Span seen(int64_t row) const {
    const int64_t* seen = seen_ + 2 * (row / group_);
    return {seen[0], seen[1]};
  }

  // What any of the rows sees.
  Span span(int64_t row, int64_t end) const {
    Span span = {INT64_MAX, 0};
    for (int64_t token = row / group_; token <= (end - 1) / group_; ++token) {
      span.first = std::min(span.first, seen_[2 * token]);
      span.last = std::max(span.last, seen_[2 * token + 1]);
    }
    return span;
  }

  const T* query(const T* query, int64_t row) const {
    return query + (block_.first + row / group_) * shape_.query_stride +
           (block_.head * group_ + row % group_) * shape_.query_head_stride;
  }

  T* output(T* output, int64_t row) const {
    return output + ((block_.first + row / group_) * shape_.num_q_heads + block_.head * group_ +
                     row % group_) * shape_.head_dim;
  }

  // Where the keys, or values, of the positions of `span` lie.
  void locate(const T* cached, const int64_t* table, Span span, const T** rows) const {
    int64_t entry = span.first / shape_.block_size, offset = span.first % shape_.block_size;
    for (int64_t position = span.first; position < span.last; ++position) {
      const int64_t slot = table[entry] * shape_.block_size + offset;
      *rows++ = cached + slot * shape_.slot_stride + block_.head * shape_.head_dim;
      if (++offset == shape_.block_size) {
        offset = 0;
        ++entry;
      }
    }
  }

 private:
  const PrefillShape& shape_;
  const QueryBlock& block_;
  const int64_t* seen_;
  const int64_t group_, count_;
};

// What one thread works with.
template <typename E>
struct PrefillScratch {
  static constexpr int64_t kDepth = 4 / sizeof(E);

  PrefillScratch(int64_t head_dim, int64_t max_rows)
      : depth((head_dim + kDepth - 1) / kDepth * kDepth),
        width((head_dim + kWidth - 1) / kWidth * kWidth),
        queries(max_rows * depth),
        keys(kKeys * depth),
        values(kKeys * width),
        weights(kRows * kKeys),
        scores(kRows * kKeys),
        outputs(max_rows * width),
        tops(max_rows),
        totals(max_rows * kWidth) {}

  const int64_t depth, width;  // Elements of a packed query; floats of an output.
  Aligned<E> queries, keys, values, weights;
  Aligned<float> scores, outputs, tops, totals;  // Totals are summed up across vectors at the end.
};

// Turns the products of one row into weights, and its largest score and total into those that
// include them. Only keys from `first` to before `last` count. Returns the factor of what the row
// has summed up so far.
template <typename E>
static inline float weigh_row(const PrefillShape& shape, int64_t first, int64_t last,
                              int64_t num_vectors, float* scores, float* top, float* total,
                              E* weights) {
  Ints lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  const bool sees_all = first <= 0 && last >= num_vectors * kWidth;
  const int low = static_cast<int>(std::clamp<int64_t>(first, 0, kKeys));
  const int high = static_cast<int>(std::clamp<int64_t>(last, 0, kKeys));
  Floats most = broadcast(-INFINITY);
  for (int v = 0; v < num_vectors; ++v) {
    Floats score = load(scores + v * kWidth) * shape.scale;
    if (shape.softcap > 0) score = cap(score, shape.softcap);
    if (!sees_all) {
      const Ints position = lanes + v * kWidth;
      score = (position >= low) & (position < high) ? score : broadcast(-INFINITY);
    }
    store(scores + v * kWidth, score);
    most = score > most ? score : most;
  }
  const float before = *top, now = std::max(before, max_of(most));
  // A row that has seen nothing yet has only weights of 0.
  const float base = now == -INFINITY ? 0.0f : now;
  const Floats factor = exp_of_negative(broadcast(before - base));
  Floats sums = load(total) * factor;
  for (int v = 0; v < num_vectors; ++v) {
    const Floats weight = exp_of_negative(load(scores + v * kWidth) - base);
    sums += weight;
    store(weights + v * kWidth, weight);
  }
  *top = now;
  store(total, sums);
  return factor[0];
}

// Attends with rows that share a key head.
template <typename T>
class VectorBlock {
  typedef typename Packed<T>::Type E;

 public:
  typedef PrefillScratch<E> Scratch;
  // Rows that share what is packed, and those that may fill up the last.
  static constexpr int64_t kMostRows = kBlockRows, kLeftOver = kRows;

  VectorBlock(const SharedRows<T>& rows, Scratch& scratch)
      : rows_(rows), num_padded_((rows.count() + kRows - 1) / kRows * kRows), scratch_(scratch) {}

  void attend(const T* query, const T* keys, const T* values, const int64_t* table, T* output) {
    pack_queries(query);
    std::fill_n(scratch_.outputs.data(), num_padded_ * scratch_.width, 0.0f);
    std::fill_n(scratch_.tops.data(), num_padded_, -INFINITY);
    std::fill_n(scratch_.totals.data(), num_padded_ * kWidth, 0.0f);
    const Span all = rows_.span(0, rows_.count());
    for (int64_t base = all.first / kKeys * kKeys; base < all.last; base += kKeys) {
      const int64_t last = std::min(all.last, base + kKeys);
      pack_context(keys, values, table, base, {std::max(all.first, base), last});
      for (int64_t row = 0; row < rows_.count(); row += kRows) {
        const Span span = rows_.span(row, std::min(row + kRows, rows_.count()));
        if (span.first < base + kKeys && span.last > base)
          attend_tile(row, base, std::min<int64_t>(kKeys, span.last - base));
      }
    }
    write(output);
  }

 private:
  void pack_queries(const T* query) {
    std::fill_n(scratch_.queries.data(), num_padded_ * scratch_.depth, E{});
    for (int64_t row = 0; row < rows_.count(); ++row)
      pack_row(rows_.query(query, row), rows_.shape().head_dim,
               scratch_.queries.data() + row * scratch_.depth);
  }

  // Packs the positions of `span`; those from `base` to it become 0.
  void pack_context(const T* keys, const T* values, const int64_t* table, int64_t base,
                    Span span) {
    const T *key_rows[kKeys] = {}, *value_rows[kKeys] = {};
    rows_.locate(keys, table, span, key_rows + span.first - base);
    rows_.locate(values, table, span, value_rows + span.first - base);
    const int64_t head_dim = rows_.shape().head_dim;
    pack_keys(key_rows, head_dim, scratch_.keys.data());
    pack_values(value_rows, span.last - base, head_dim, scratch_.width, scratch_.values.data());
  }

  // kRows rows from `row` and the first `count` keys from `base`.
  void attend_tile(int64_t row, int64_t base, int64_t count) {
    constexpr int64_t kDepth = PrefillScratch<E>::kDepth;
    PrefillScratch<E>& scratch = scratch_;
    const int64_t num_vectors = (count + kWidth - 1) / kWidth;
    multiply(scratch.queries.data() + row * scratch.depth, scratch.depth, scratch.keys.data(),
             kKeys * kDepth, scratch.depth / kDepth, num_vectors, nullptr, scratch.scores.data(),
             kKeys);
    float factors[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      // Rows that fill up the last tile see nothing.
      const Span seen = row + i < rows_.count() ? rows_.seen(row + i) : Span{base + kKeys, base};
      factors[i] = weigh_row(rows_.shape(), seen.first - base, seen.last - base, num_vectors,
                             scratch.scores.data() + i * kKeys,
                             scratch.tops.data() + row + i,
                             scratch.totals.data() + (row + i) * kWidth,
                             scratch.weights.data() + i * kKeys);
    }
    multiply(scratch.weights.data(), kKeys, scratch.values.data(), scratch.width * kDepth,
             (count + kDepth - 1) / kDepth, scratch.width / kWidth, factors,
             scratch.outputs.data() + row * scratch.width, scratch.width);
  }

  void write(T* output) {
    const int64_t head_dim = rows_.shape().head_dim;
    for (int64_t row = 0; row < rows_.count(); ++row) {
      const float* sums = scratch_.outputs.data() + row * scratch_.width;
      const float total = sum(load(scratch_.totals.data() + row * kWidth));
      T* target = rows_.output(output, row);
      int64_t d = 0;
      for (; d + kWidth <= head_dim; d += kWidth) store(target + d, load(sums + d) / total);
      for (; d < head_dim; ++d) narrow(sums[d] / total, target + d);
    }
  }

  const SharedRows<T>& rows_;
  const int64_t num_padded_;
  Scratch& scratch_;
};

// What attends to elements of a type.
template <typename T>
struct BlockOf {
  typedef VectorBlock<T> Type;
};

template <typename T>
static void prefill(const PrefillShape& shape, const void* query, const void* keys,
                    const void* values, const int64_t* tables, const int64_t* chunks,
                    const int64_t* seen, void* output) {
  typedef typename BlockOf<T>::Type Block;
  const int64_t group = shape.num_q_heads / shape.num_kv_heads;
  const int64_t tokens = std::max<int64_t>(1, Block::kMostRows / group);
  std::vector<QueryBlock> blocks;
  for (int64_t s = 0; s < shape.num_chunks; ++s) {
    const int64_t first = chunks[2 * s], count = chunks[2 * s + 1];
    // From the end, where rows see most: short work last lets the threads end together.
    for (int64_t start = (count - 1) / tokens * tokens; start >= 0; start -= tokens)
      for (int64_t head = 0; head < shape.num_kv_heads; ++head)
        blocks.push_back({s, head, first + start, std::min(tokens, count - start)});
  }
  const int64_t num_blocks = blocks.size();
  const int64_t max_rows = tokens * group + Block::kLeftOver;
#pragma omp parallel
  {
    typename Block::Scratch scratch(shape.head_dim, max_rows);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < num_blocks; ++b) {
      const SharedRows<T> rows(shape, blocks[b], seen);
      Block(rows, scratch)
          .attend(static_cast<const T*>(query), static_cast<const T*>(keys),
                  static_cast<const T*>(values), tables + blocks[b].chunk * shape.table_stride,
                  static_cast<T*>(output));
    }
  }
}
