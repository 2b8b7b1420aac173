// Decode attention in bfloat16 with tiles: the queries of a key head are multiplied at once.
// Included where TILES is defined, inside the namespace of that instruction set.
//
//   scores  [key][query]            = keys    [key][d]              * queries [d / 2][query][2]
//   outputs [parity, query][d / 2]  = weights [parity, query][key]  * values  [key][d / 2][2]
//
// Both products read 16 rows of the cache as they lie there. The second one expects pairs of keys
// where a row of values has pairs of columns; so a weight is a pair too, of itself and a zero, and
// there is one row of weights for even columns and one for odd ones. Sums are float32, weights
// bfloat16. A sequence's context is cut as in paged_decode.h.

constexpr int kTileColumns = 32;  // Values of bfloat16 in a row of a tile.
constexpr int kMostQueries = 8;   // Their weights, for both parities, are the rows of a tile.
constexpr int kTiles = kChunk / kTile;

// One chunk of one sequence, and where its positions lie.
struct ChunkRows {
  const Chunk* chunk = nullptr;
  int64_t slots[kChunk];
};

// Rows of a tile as they lie, and the bytes from one to the next.
struct TileRows {
  const uint16_t* data;
  int64_t stride;
};

// Asks for the rows of a chunk in order, a few lines at a time. Blocks lie anywhere, which hardware
// does not foresee.
class RowsAhead {
 public:
  // `steps` is how often `fetch` will be called.
  RowsAhead(const void* rows, int64_t row_bytes, const ChunkRows& chunk, int64_t steps)
      : rows_(static_cast<const char*>(rows)), row_bytes_(row_bytes), slots_(chunk.slots) {
    left_ = chunk.chunk == nullptr ? 0 : chunk.chunk->count;
    const int64_t lines = left_ * ((row_bytes + 63) / 64);
    lines_per_step_ = (lines + steps - 1) / std::max<int64_t>(steps, 1);
  }

  void fetch() {
    for (int64_t lines = lines_per_step_; lines > 0 && left_ > 0;) {
      const char* row = rows_ + *slots_ * row_bytes_;
      const int64_t end = std::min(row_bytes_, byte_ + lines * 64);
      for (; byte_ < end; byte_ += 64, --lines) _mm_prefetch(row + byte_, _MM_HINT_T1);
      if (byte_ < row_bytes_) return;
      byte_ = 0;
      ++slots_;
      --left_;
    }
  }

 private:
  const char* rows_;
  int64_t row_bytes_, byte_ = 0, left_, lines_per_step_;
  const int64_t* slots_;
};

// From 16 rows of kColumns words to kColumns rows of 16, which are `stride` words apart. Each step
// moves the lowest bit of a word's place to the top.
template <int kColumns>
static inline void separate(const float* source, float* target, int64_t stride) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  __m512 rows[kColumns], next[kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) rows[i] = _mm512_loadu_ps(source + i * 16);
#pragma GCC unroll 3
  for (int step = 1; step < kColumns; step *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < kColumns / 2; ++i) {
      next[i] = _mm512_permutex2var_ps(rows[2 * i], even, rows[2 * i + 1]);
      next[kColumns / 2 + i] = _mm512_permutex2var_ps(rows[2 * i], odd, rows[2 * i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) _mm512_storeu_ps(target + i * stride, rows[i]);
}

static inline __m512i low_pairs() {
  return _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

static inline __m512i high_pairs() { return _mm512_add_epi32(low_pairs(), _mm512_set1_epi32(8)); }

// The way back: from kColumns rows of `num_values`, of which there are `count`, to 16 rows of
// kColumns words; others are 0.
template <int kColumns>
static inline void interleave(const uint16_t* source, int64_t stride, int count, int num_values,
                              int32_t* target) {
  const __m512i low = low_pairs(), high = high_pairs();
  const __mmask32 mask = num_values >= 32 ? ~0u : (1u << num_values) - 1;
  __m512i rows[kColumns], next[kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i)
    rows[i] = _mm512_maskz_loadu_epi16(i < count ? mask : 0, source + i * stride);
#pragma GCC unroll 3
  for (int step = 1; step < kColumns; step *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < kColumns / 2; ++i) {
      next[2 * i] = _mm512_permutex2var_epi32(rows[i], low, rows[kColumns / 2 + i]);
      next[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], high, rows[kColumns / 2 + i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) _mm512_storeu_si512(target + i * 16, rows[i]);
}

// Calls body with the number of columns as a constant.
template <typename Body>
static inline void with_columns(int columns, Body body) {
  if (columns == 1) body(std::integral_constant<int, 1>());
  if (columns == 2) body(std::integral_constant<int, 2>());
  if (columns == 4) body(std::integral_constant<int, 4>());
  if (columns == 8) body(std::integral_constant<int, 8>());
}

// What one thread attends with.
class TileDecoder {
 public:
  TileDecoder(const DecodeShape& shape, const uint16_t* keys, const uint16_t* values)
      : shape_(shape),
        keys_(keys),
        values_(values),
        head_dim_(shape.head_dim),
        group_(shape.num_q_heads / shape.num_kv_heads),
        row_(shape.num_kv_heads * shape.head_dim),
        num_steps_((head_dim_ + kTileColumns - 1) / kTileColumns),
        together_(static_cast<int>(std::min<int64_t>(group_, kMostQueries))),
        columns_(together_ > 4 ? 8 : together_ > 2 ? 4 : together_),
        parts_((group_ + together_ - 1) / together_),
        num_parts_(shape.num_kv_heads * parts_),
        queries_(num_parts_ * num_steps_ * kTile * columns_),
        products_(num_parts_ * kChunk * columns_),
        scores_(kMostQueries * kChunk),
        weights_(2 * kMostQueries * kChunk),
        copies_(kChunk * num_steps_ * kTileColumns) {
    for_scores_.set({0, 1, 2, 3, 4}, kTile, 4 * columns_);
    for_scores_.set({5, 6}, kTile, 64);
    for_values_.set({0, 1, 2, 3, 4, 7}, 2 * together_, 64);
    for_values_.set({5, 6}, kTile, 64);
    // Rows of queries that there are not, and what is behind the width of a head.
    std::fill_n(weights_.data(), 2 * kMostQueries * kChunk, 0);
    std::fill_n(copies_.data(), kChunk * num_steps_ * kTileColumns, 0);
  }
  ~TileDecoder() { _tile_release(); }
  TileDecoder(const TileDecoder&) = delete;
  TileDecoder& operator=(const TileDecoder&) = delete;

  // Keys of the chunk that comes first; those of the others are fetched with the chunk before.
  void fetch_keys(const ChunkRows& rows) { RowsAhead(keys_, row_ * 2, rows, 1).fetch(); }

  // Attends to `rows` and fetches the keys of `next`.
  void attend(const uint16_t* query, const ChunkRows& rows, const ChunkRows& next, float* partial) {
    const int count = rows.chunk->count, num_tiles = (count + kTile - 1) / kTile;
    const bool in_place = head_dim_ % kTileColumns == 0 && shape_.block_size % kTile == 0 &&
                          rows.chunk->first % kTile == 0;
    const int64_t products = num_parts_ * num_steps_ * num_tiles;
    TileRows tiles[kTiles];
    pack_queries(query);
    for_scores_.use();
    RowsAhead values_ahead(values_, row_ * 2, rows, products);
    for (int first = 0; first < num_tiles; first += 4)
      for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
        const int together = std::min(4, num_tiles - first);
        for (int i = 0; i < together; ++i)
          tiles[i] = find_tile(keys_ + head * head_dim_, rows, first + i, in_place);
        for (int64_t part = head * parts_; part < (head + 1) * parts_; ++part)
          score(tiles, together, part, first, values_ahead);
      }
    for_values_.use();
    RowsAhead keys_ahead(keys_, row_ * 2, next, products + num_parts_);
    for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
      for (int tile = 0; tile < num_tiles; ++tile)
        tiles[tile] = find_tile(values_ + head * head_dim_, rows, tile, in_place);
      for (int64_t part = 0; part < parts_; ++part) {
        const int num_queries =
            static_cast<int>(std::min<int64_t>(together_, group_ - part * together_));
        float* target = partial + (head * group_ + part * together_) * (head_dim_ + 2);
        keys_ahead.fetch();
        make_weights(head * parts_ + part, num_queries, count, target);
        add_values(tiles, num_tiles, num_queries, keys_ahead, target);
      }
    }
  }

 private:
  // From [query][d] to [d / 2][query][2], for each part of each key head.
  void pack_queries(const uint16_t* query) {
    int32_t* target = queries_.data();
    for (int64_t part = 0; part < num_parts_; ++part) {
      const int64_t in_group = part % parts_ * together_;
      const uint16_t* source = query + (part / parts_ * group_ + in_group) * head_dim_;
      const int count = static_cast<int>(std::min<int64_t>(together_, group_ - in_group));
      for (int64_t d = 0; d < head_dim_; d += kTileColumns, target += kTile * columns_)
        with_columns(columns_, [&](auto columns) {
          const int width = static_cast<int>(std::min<int64_t>(kTileColumns, head_dim_ - d));
          interleave<columns>(source + d, head_dim_, count, width, target);
        });
    }
  }

  // Finds 16 rows of one head, or copies what does not lie as a tile reads it, the last row
  // repeated behind the end.
  TileRows find_tile(const uint16_t* data, const ChunkRows& rows, int tile, bool in_place) {
    const int64_t* slots = rows.slots + tile * kTile;
    const int count = rows.chunk->count - tile * kTile;
    if (in_place && count >= kTile) return {data + slots[0] * row_, row_ * 2};
    const int64_t width = num_steps_ * kTileColumns;
    uint16_t* copy = copies_.data() + tile * kTile * width;
    for (int i = 0; i < kTile; ++i)
      std::memcpy(copy + i * width, data + slots[std::min(i, count - 1)] * row_, head_dim_ * 2);
    return {copy, width * 2};
  }

  // Products of up to four tiles of keys, `first` the first, and the queries of a part.
  void score(const TileRows* tiles, int count, int64_t part, int first, RowsAhead& ahead) {
    const int32_t* queries = queries_.data() + part * num_steps_ * kTile * columns_;
    publish();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < num_steps_; ++step) {
      const int64_t d = step * kTileColumns;
      _tile_loadd(4, queries + step * kTile * columns_, columns_ * 4);
      _tile_loadd(5, tiles[0].data + d, tiles[0].stride);
      _tile_dpbf16ps(0, 5, 4);
      ahead.fetch();
      if (count < 2) continue;
      _tile_loadd(6, tiles[1].data + d, tiles[1].stride);
      _tile_dpbf16ps(1, 6, 4);
      ahead.fetch();
      if (count < 3) continue;
      _tile_loadd(5, tiles[2].data + d, tiles[2].stride);
      _tile_dpbf16ps(2, 5, 4);
      ahead.fetch();
      if (count < 4) continue;
      _tile_loadd(6, tiles[3].data + d, tiles[3].stride);
      _tile_dpbf16ps(3, 6, 4);
      ahead.fetch();
    }
    float* products = products_.data() + (part * kChunk + first * kTile) * columns_;
    const int64_t stride = columns_ * 4, size = kTile * columns_;
    _tile_stored(0, products, stride);
    if (count > 1) _tile_stored(1, products + size, stride);
    if (count > 2) _tile_stored(2, products + 2 * size, stride);
    if (count > 3) _tile_stored(3, products + 3 * size, stride);
  }

  // Turns the products of a part into weights, and puts weights and zeros in pairs: first those for
  // even columns of values, then those for odd ones.
  void make_weights(int64_t part, int num_queries, int count, float* partial) {
    const float* products = products_.data() + part * kChunk * columns_;
    with_columns(columns_, [&](auto columns) {
      for (int i = 0; i < count; i += kTile)
        separate<columns>(products + i * columns, scores_.data() + i, kChunk);
    });
    for (int q = 0; q < num_queries; ++q) {
      float *scores = scores_.data() + q * kChunk, *end = partial + q * (head_dim_ + 2) + head_dim_;
      weigh(scores, count, shape_, end, end + 1);
      int32_t *even = weights_.data() + q * kChunk, *odd = even + together_ * kChunk;
      for (int i = 0; i < count; i += kTile) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(scores + i));
        const __m512i words = _mm512_cvtepu16_epi32((__m256i)rounded);
        _mm512_storeu_si512(even + i, words);
        _mm512_storeu_si512(odd + i, _mm512_slli_epi32(words, 16));
      }
    }
  }

  // Sums of the values of one key head, weighed for its queries. Even and odd tiles have sums of
  // their own, so that they do not wait for each other.
  void add_values(const TileRows* tiles, int num_tiles, int num_queries, RowsAhead& ahead,
                  float* partial) {
    publish();
    for (int64_t step = 0; step < num_steps_; step += 2) {
      const int64_t d = step * kTileColumns;
      const bool has_second = step + 1 < num_steps_;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int tile = 0; tile < num_tiles; tile += 2) {
        const TileRows &even = tiles[tile], &odd = tiles[tile + 1];
        _tile_loadd(4, weights_.data() + tile * kTile, kChunk * 4);
        _tile_loadd(5, even.data + d, even.stride);
        _tile_dpbf16ps(0, 4, 5);
        ahead.fetch();
        if (has_second) {
          _tile_loadd(6, even.data + d + kTileColumns, even.stride);
          _tile_dpbf16ps(1, 4, 6);
          ahead.fetch();
        }
        if (tile + 1 == num_tiles) break;
        _tile_loadd(7, weights_.data() + (tile + 1) * kTile, kChunk * 4);
        _tile_loadd(5, odd.data + d, odd.stride);
        _tile_dpbf16ps(2, 7, 5);
        ahead.fetch();
        if (has_second) {
          _tile_loadd(6, odd.data + d + kTileColumns, odd.stride);
          _tile_dpbf16ps(3, 7, 6);
          ahead.fetch();
        }
      }
      alignas(64) float sums[4][2 * kMostQueries * 16];
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      for (int q = 0; q < num_queries; ++q)
        for (int i = 0; i < (has_second ? 2 : 1); ++i)
          store_sums(sums[i] + q * 16, sums[2 + i] + q * 16, d + i * kTileColumns,
                     partial + q * (head_dim_ + 2));
    }
  }

  // Adds sums of even and of odd tiles, and brings those of even and of odd columns together.
  void store_sums(const float* first, const float* second, int64_t d, float* target) {
    const int64_t odd_columns = together_ * 16;
    const __m512 even = _mm512_add_ps(_mm512_loadu_ps(first), _mm512_loadu_ps(second));
    const __m512 odd = _mm512_add_ps(_mm512_loadu_ps(first + odd_columns),
                                     _mm512_loadu_ps(second + odd_columns));
    const uint32_t mask = head_dim_ - d >= 32 ? ~0u : (1u << (head_dim_ - d)) - 1;
    const __m512 low = _mm512_permutex2var_ps(even, low_pairs(), odd);
    const __m512 high = _mm512_permutex2var_ps(even, high_pairs(), odd);
    _mm512_mask_storeu_ps(target + d, mask & 0xffff, low);
    _mm512_mask_storeu_ps(target + d + 16, mask >> 16, high);
  }

  const DecodeShape& shape_;
  const uint16_t *keys_, *values_;
  const int64_t head_dim_, group_, row_;
  const int64_t num_steps_;  // Tiles beside each other in the rows of a head.
  const int together_, columns_;  // Queries that are multiplied at once, and columns for them.
  const int64_t parts_, num_parts_;  // Of a group, each multiplied at once; and of all groups.
  TileShapes for_scores_, for_values_;
  Aligned<int32_t> queries_;
  Aligned<float> products_, scores_;
  Aligned<int32_t> weights_;
  Aligned<uint16_t> copies_;
};

// Attends to all chunks, which threads take in order; called by all threads of a team.
static void attend_chunks(const DecodeShape& shape, const uint16_t* query, const uint16_t* keys,
                          const uint16_t* values, const int64_t* tables,
                          const std::vector<Chunk>& chunks, std::atomic<int64_t>& taken,
                          float* partials) {
  TileDecoder decoder(shape, keys, values);
  const int64_t stride = shape.num_q_heads * (shape.head_dim + 2);
  ChunkRows rows[2];
  const auto take = [&](ChunkRows& target) {
    const int64_t index = taken.fetch_add(1, std::memory_order_relaxed);
    if (index >= static_cast<int64_t>(chunks.size())) {
      target.chunk = nullptr;
      return;
    }
    target.chunk = &chunks[index];
    find_slots(shape, tables + target.chunk->sequence * shape.table_stride, *target.chunk,
               target.slots);
  };
  take(rows[0]);
  decoder.fetch_keys(rows[0]);
  for (int at = 0; rows[at].chunk != nullptr; at ^= 1) {
    take(rows[at ^ 1]);
    const Chunk* chunk = rows[at].chunk;
    decoder.attend(query + chunk->sequence * shape.query_stride, rows[at], rows[at ^ 1],
                   partials + (chunk - chunks.data()) * stride);
  }
}
