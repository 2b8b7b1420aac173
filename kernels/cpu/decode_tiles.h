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

// Tiles 0 and 1 are scores, 2 is queries, 3 and 7 are rows of the cache, 4 is weights, 5 and 6 are
// outputs. The thread has them while it holds this.
class DecodeTiles {
 public:
  // `num_queries` is how many are multiplied at once, `columns` how many have room in a row.
  DecodeTiles(int num_queries, int columns) {
    Shapes shapes = {};
    shapes.palette = 1;
    for (int i : {0, 1, 2}) shapes.set(i, kTile, 4 * columns);
    for (int i : {3, 7}) shapes.set(i, kTile, 64);
    for (int i : {4, 5, 6}) shapes.set(i, 2 * num_queries, 64);
    _tile_loadconfig(&shapes);
  }
  ~DecodeTiles() { _tile_release(); }
  DecodeTiles(const DecodeTiles&) = delete;
  DecodeTiles& operator=(const DecodeTiles&) = delete;

 private:
  // As the processor reads it.
  struct Shapes {
    uint8_t palette, first_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
    void set(int tile, int num_rows, int num_bytes) {
      rows[tile] = static_cast<uint8_t>(num_rows);
      row_bytes[tile] = static_cast<uint16_t>(num_bytes);
    }
  };
};

// The compiler does not know that tiles read memory; what is written before this, they see.
static inline void publish() { asm volatile("" ::: "memory"); }

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
    for (int64_t i = 0; i < lines_per_step_ && left_ > 0; ++i) {
      _mm_prefetch(rows_ + *slots_ * row_bytes_ + byte_, _MM_HINT_T1);
      byte_ += 64;
      if (byte_ < row_bytes_) continue;
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

// From scores of 16 keys, [key][kColumns], to kColumns rows of scores that are kChunk apart. Each
// step moves the lowest bit of a value's place to the top.
template <int kColumns>
static inline void separate(const float* source, float* scores) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  __m512 rows[kColumns], halves[kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) rows[i] = _mm512_loadu_ps(source + i * 16);
#pragma GCC unroll 3
  for (int step = 1; step < kColumns; step *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < kColumns / 2; ++i) {
      halves[i] = _mm512_permutex2var_ps(rows[2 * i], even, rows[2 * i + 1]);
      halves[kColumns / 2 + i] = _mm512_permutex2var_ps(rows[2 * i], odd, rows[2 * i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) rows[i] = halves[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) _mm512_storeu_ps(scores + i * kChunk, rows[i]);
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
        tiles_(together_, columns_),
        queries_(shape.num_kv_heads * parts_ * num_steps_ * kTile * columns_),
        scores_((shape.num_q_heads + kMostQueries) * kChunk),
        weights_(2 * kMostQueries * kChunk),
        copies_(kChunk * num_steps_ * kTileColumns) {
    // Columns of queries that there are not.
    std::fill_n(queries_.data(), shape.num_kv_heads * parts_ * num_steps_ * kTile * columns_, 0);
    std::fill_n(weights_.data(), 2 * kMostQueries * kChunk, 0);
    std::fill_n(copies_.data(), kChunk * num_steps_ * kTileColumns, 0);
  }

  // Keys of the chunk that comes first; those of the others are fetched with the chunk before.
  void fetch_keys(const ChunkRows& rows) { RowsAhead(keys_, row_ * 2, rows, 1).fetch(); }

  // Attends to `rows` and fetches the keys of `next`.
  void attend(const uint16_t* query, const ChunkRows& rows, const ChunkRows& next, float* partial) {
    pack_queries(query);
    const int count = rows.chunk->count, num_tiles = (count + kTile - 1) / kTile;
    const bool in_place = head_dim_ % kTileColumns == 0 && shape_.block_size % kTile == 0 &&
                          rows.chunk->first % kTile == 0;
    RowsAhead values_ahead(values_, row_ * 2, rows, num_tiles * shape_.num_kv_heads);
    for (int tile = 0; tile < num_tiles; tile += 2)
      for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
        values_ahead.fetch();
        values_ahead.fetch();
        const uint16_t* head_keys = keys_ + head * head_dim_;
        const TileRows first = find_tile(head_keys, rows, tile, in_place);
        const bool is_last = tile + 1 == num_tiles;
        const TileRows second = is_last ? first : find_tile(head_keys, rows, tile + 1, in_place);
        for (int64_t part = 0; part < parts_; ++part)
          score(first, second, head * parts_ + part, head * group_ + part * together_, tile * kTile);
      }
    for (int64_t q = 0; q < shape_.num_q_heads; ++q) {
      float* end = partial + q * (head_dim_ + 2) + head_dim_;
      weigh(scores_.data() + q * kChunk, count, shape_, end, end + 1);
    }
    const int64_t calls = shape_.num_kv_heads * parts_ * ((num_steps_ + 1) / 2) * num_tiles;
    RowsAhead keys_ahead(keys_, row_ * 2, next, calls);
    for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
      TileRows tiles[kTiles];
      for (int tile = 0; tile < num_tiles; ++tile)
        tiles[tile] = find_tile(values_ + head * head_dim_, rows, tile, in_place);
      for (int64_t part = 0; part < parts_; ++part)
        add_values(tiles, num_tiles, head * group_ + part * together_,
                   std::min<int64_t>(together_, group_ - part * together_), keys_ahead, partial);
    }
  }

 private:
  // From [query][d] to [d / 2][query][2], for each part of each key head.
  void pack_queries(const uint16_t* query) {
    const int64_t part_words = num_steps_ * kTile * columns_;
    for (int64_t head = 0; head < shape_.num_kv_heads; ++head)
      for (int64_t q = 0; q < group_; ++q) {
        const uint16_t* source = query + (head * group_ + q) * head_dim_;
        int32_t* target = queries_.data() + (head * parts_ + q / together_) * part_words;
        target += q % together_;
        for (int64_t d = 0; d < head_dim_; d += 2) {
          const uint32_t second = d + 1 < head_dim_ ? source[d + 1] : 0;
          target[d / 2 * columns_] = static_cast<int32_t>(source[d] | second << 16);
        }
      }
  }

  // Finds 16 rows of one head, or copies what does not lie as a tile reads it, the last row repeated
  // behind the end.
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

  // Scores of two tiles of keys, `start` the first, for the queries of `part`, `first_query` the first.
  void score(const TileRows& first, const TileRows& second, int64_t part, int64_t first_query,
             int start) {
    const int32_t* queries = queries_.data() + part * num_steps_ * kTile * columns_;
    publish();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < num_steps_; ++step) {
      _tile_loadd(2, queries + step * kTile * columns_, columns_ * 4);
      _tile_loadd(3, first.data + step * kTileColumns, first.stride);
      _tile_dpbf16ps(0, 3, 2);
      _tile_loadd(7, second.data + step * kTileColumns, second.stride);
      _tile_dpbf16ps(1, 7, 2);
    }
    alignas(64) float products[2 * kTile * kMostQueries];
    _tile_stored(0, products, columns_ * 4);
    _tile_stored(1, products + kTile * columns_, columns_ * 4);
    float* scores = scores_.data() + first_query * kChunk + start;
    for (int i = 0; i < 2; ++i) {
      const float* source = products + i * kTile * columns_;
      if (columns_ == 1) separate<1>(source, scores + i * kTile);
      if (columns_ == 2) separate<2>(source, scores + i * kTile);
      if (columns_ == 4) separate<4>(source, scores + i * kTile);
      if (columns_ == 8) separate<8>(source, scores + i * kTile);
    }
  }

  // Puts weights and zeros in pairs: first those for even columns of values, then those for odd ones.
  void pack_weights(int64_t first_query, int64_t count, int num_tiles) {
    for (int64_t q = 0; q < count; ++q) {
      const float* source = scores_.data() + (first_query + q) * kChunk;
      int32_t* even = weights_.data() + q * kChunk;
      int32_t* odd = even + together_ * kChunk;
      for (int i = 0; i < num_tiles * kTile; i += kTile) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(source + i));
        const __m512i words = _mm512_cvtepu16_epi32((__m256i)rounded);
        _mm512_storeu_si512(even + i, words);
        _mm512_storeu_si512(odd + i, _mm512_slli_epi32(words, 16));
      }
    }
  }

  // Sums of the values of one key head, weighed for `count` of its queries.
  void add_values(const TileRows* tiles, int num_tiles, int64_t first_query, int64_t count,
                  RowsAhead& keys_ahead, float* partial) {
    pack_weights(first_query, count, num_tiles);
    publish();
    for (int64_t step = 0; step < num_steps_; step += 2) {
      const bool has_second = step + 1 < num_steps_;
      _tile_zero(5);
      _tile_zero(6);
      for (int tile = 0; tile < num_tiles; ++tile) {
        keys_ahead.fetch();
        const uint16_t* values = tiles[tile].data + step * kTileColumns;
        _tile_loadd(4, weights_.data() + tile * kTile, kChunk * 4);
        _tile_loadd(3, values, tiles[tile].stride);
        _tile_dpbf16ps(5, 4, 3);
        if (!has_second) continue;
        _tile_loadd(7, values + kTileColumns, tiles[tile].stride);
        _tile_dpbf16ps(6, 4, 7);
      }
      alignas(64) float sums[2][2 * kMostQueries * 16];
      _tile_stored(5, sums[0], 64);
      _tile_stored(6, sums[1], 64);
      for (int64_t q = 0; q < count; ++q)
        for (int i = 0; i < (has_second ? 2 : 1); ++i)
          store_sums(sums[i] + q * 16, (step + i) * kTileColumns,
                     partial + (first_query + q) * (head_dim_ + 2));
    }
  }

  // Brings sums of even and of odd columns together.
  void store_sums(const float* sums, int64_t d, float* target) {
    const __m512i low =
        _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 even = _mm512_loadu_ps(sums), odd = _mm512_loadu_ps(sums + together_ * 16);
    const uint32_t mask = head_dim_ - d >= 32 ? ~0u : (1u << (head_dim_ - d)) - 1;
    _mm512_mask_storeu_ps(target + d, mask & 0xffff, _mm512_permutex2var_ps(even, low, odd));
    _mm512_mask_storeu_ps(target + d + 16, mask >> 16, _mm512_permutex2var_ps(even, high, odd));
  }

  const DecodeShape& shape_;
  const uint16_t *keys_, *values_;
  const int64_t head_dim_, group_, row_;
  const int64_t num_steps_;  // Tiles beside each other in the rows of a head.
  const int together_, columns_;  // Queries that are multiplied at once, and columns for them.
  const int64_t parts_;           // Of a group, so that each is multiplied at once.
  const DecodeTiles tiles_;
  Aligned<int32_t> queries_;
  Aligned<float> scores_;
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
