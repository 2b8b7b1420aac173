// Attention of paged_prefill.h by tiles (AMX), of bfloat16.
// Included where TILES is defined, inside the namespace of that instruction set.
//
// All that is multiplied lies in tiles of 1 KiB, 16 rows of 64 bytes, one behind the other:
//
//   queries   [row / 16][d / 32]     each [row][d]
//   keys      [key / 16][d / 32]     each [d / 2][key][2]
//   scores    [row / 16][key / 16]   each [row][key], float32
//   weights   [row / 16][key / 32]   each [row][key]
//   values    [d / 16][key / 32]     each [key / 2][d][2]
//   outputs   [row / 16][d / 16]     each [row][d], float32
//
// What fills up the last tiles of a row is 0. The context is cut at multiples of kPart. Scores are
// kept as powers of 2, which cost less than those of e.

constexpr int64_t kTileDepth = 32;       // Elements of bfloat16 of a row of a tile.
constexpr int64_t kPart = 256;           // Keys whose scores are weighed at once.
constexpr int64_t kTileFloats = 256, kTileHalves = 512;
constexpr int64_t kMaxBlockRows = 512;

// output[i][j] = sum_k left[i][k] * right[j][k], of tiles; with `adds`, added to what is there.
// Strides are tiles.
template <int kLefts, int kRights>
static inline void multiply_tiles(const uint16_t* left, int64_t left_stride, const uint16_t* right,
                                  int64_t right_stride, int64_t steps, bool adds, float* output,
                                  int64_t output_stride) {
  const uint16_t* low = left + left_stride * kTileHalves;
  const uint16_t* next = right + right_stride * kTileHalves;
  float* low_output = output + output_stride * kTileFloats;
  publish();
  if (adds) {
    _tile_loadd(0, output, 64);
    if constexpr (kRights > 1) _tile_loadd(1, output + kTileFloats, 64);
    if constexpr (kLefts > 1) _tile_loadd(2, low_output, 64);
    if constexpr (kLefts > 1 && kRights > 1) _tile_loadd(3, low_output + kTileFloats, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps * kTileHalves; k += kTileHalves) {
    _tile_loadd(4, left + k, 64);
    _tile_loadd(6, right + k, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRights > 1) {
      _tile_loadd(7, next + k, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kLefts > 1) {
      _tile_loadd(5, low + k, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRights > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, output, 64);
  if constexpr (kRights > 1) _tile_stored(1, output + kTileFloats, 64);
  if constexpr (kLefts > 1) _tile_stored(2, low_output, 64);
  if constexpr (kLefts > 1 && kRights > 1) _tile_stored(3, low_output + kTileFloats, 64);
}

// 2 to the power of x, to about 3e-6; exactly 1 for 0, and 0 for -infinity.
static inline __m512 power_of_2(__m512 x) {
  constexpr int kToFloor = 0x09;
  const __m512 rest = _mm512_reduce_ps(x, kToFloor);
  __m512 series = _mm512_set1_ps(0.01342668f);
  series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(0.05224248f));
  series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(0.2412802f));
  series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(0.69304484f));
  series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(series, x);
}

// The first `count` lanes.
static inline __mmask16 lanes_before(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kTileSide)) - 1);
}

// What one thread works with.
struct TiledScratch {
  TiledScratch(int64_t head_dim, int64_t max_rows)
      : depth((head_dim + kTileDepth - 1) / kTileDepth),
        width((head_dim + kTileSide - 1) / kTileSide),
        queries(max_rows * depth * kTileDepth),
        keys(kPart * depth * kTileDepth),
        values(kPart * width * kTileSide),
        weights(2 * kTileSide * kPart),
        scores(2 * kTileSide * kPart),
        outputs(max_rows * width * kTileSide),
        tops(max_rows),
        totals(max_rows * kTileSide) {}

  const Tiles held;
  const int64_t depth, width;  // Tiles of a query, and of an output.
  Aligned<uint16_t> queries, keys, values, weights;
  Aligned<float> scores, outputs, tops, totals;  // Totals are summed up across vectors at the end.
};

// Rows of one chunk that share a key head, by tiles.
class TiledBlock {
 public:
  typedef TiledScratch Scratch;
  static constexpr int64_t kMostRows = kMaxBlockRows, kLeftOver = 2 * kTileSide;

  TiledBlock(const SharedRows<uint16_t>& rows, Scratch& scratch)
      : rows_(rows), num_tiles_((rows.count() + kTileSide - 1) / kTileSide), scratch_(scratch) {}

  void attend(const uint16_t* query, const uint16_t* keys, const uint16_t* values,
              const int64_t* table, uint16_t* output) {
    pack_queries(query);
    std::fill_n(scratch_.tops.data(), num_tiles_ * kTileSide, -INFINITY);
    std::fill_n(scratch_.totals.data(), num_tiles_ * kTileFloats, 0.0f);
    const Span all = rows_.span(0, rows_.count());
    for (int64_t base = all.first / kPart * kPart; base < all.last; base += kPart) {
      pack_context(keys, values, table, base,
                   {std::max(all.first, base), std::min(all.last, base + kPart)});
      for (int64_t tile = 0; tile < num_tiles_; tile += 2)
        if (tile + 1 < num_tiles_)
          attend_part<2>(tile, base);
        else
          attend_part<1>(tile, base);
    }
    write(output);
  }

 private:
  Span span_of_tiles(int64_t tile, int64_t count) const {
    return rows_.span(tile * kTileSide, std::min((tile + count) * kTileSide, rows_.count()));
  }

  void pack_queries(const uint16_t* query) {
    const int64_t head_dim = rows_.shape().head_dim;
    for (int64_t row = 0; row < num_tiles_ * kTileSide; ++row) {
      uint16_t* packed = scratch_.queries.data() +
                         row / kTileSide * scratch_.depth * kTileHalves +
                         row % kTileSide * kTileDepth;
      const uint16_t* source = rows_.query(query, std::min(row, rows_.count() - 1));
      for (int64_t d = 0; d < head_dim; d += kTileDepth, packed += kTileHalves) {
        const __mmask32 mask = head_dim - d >= 32 ? ~0u : (1u << (head_dim - d)) - 1;
        _mm512_store_si512(packed, _mm512_maskz_loadu_epi16(mask, source + d));
      }
    }
  }

  // Packs the positions of `span`; those that share tiles with them become 0.
  void pack_context(const uint16_t* keys, const uint16_t* values, const int64_t* table,
                    int64_t base, Span span) {
    const uint16_t *key_rows[kPart] = {}, *value_rows[kPart] = {};
    rows_.locate(keys, table, span, key_rows + span.first - base);
    rows_.locate(values, table, span, value_rows + span.first - base);
    const int64_t head_dim = rows_.shape().head_dim;
    const int64_t first = (span.first - base) / kTileDepth * kTileDepth;
    for (int64_t key = first; key < span.last - base; key += kTileDepth) {
      for (int64_t half = key; half < key + kTileDepth; half += kTileSide)
        pack_key_tiles(key_rows + half, head_dim,
                       scratch_.keys.data() + half / kTileSide * scratch_.depth * kTileHalves);
      pack_value_tiles(value_rows + key, head_dim, kPart / kTileDepth,
                       scratch_.values.data() + key / kTileDepth * kTileHalves);
    }
  }

  // kTiles tiles of rows from `tile` and the part of the context from `base`.
  template <int kTiles>
  void attend_part(int64_t tile, int64_t base) {
    const Span span = span_of_tiles(tile, kTiles);
    const int64_t first = std::max<int64_t>(0, span.first - base) / kTileDepth;
    const int64_t last = std::min(kPart, span.last - base);
    const int64_t pairs = (last + kTileDepth - 1) / kTileDepth - first;
    if (last <= 0 || pairs <= 0) return;
    TiledScratch& scratch = scratch_;
    const int64_t depth = scratch.depth, width = scratch.width;
    for (int64_t pair = 0; pair < pairs; ++pair)
      multiply_tiles<kTiles, 2>(scratch.queries.data() + tile * depth * kTileHalves, depth,
                                scratch.keys.data() + 2 * (first + pair) * depth * kTileHalves,
                                depth, depth, false, scratch.scores.data() + 2 * pair * kTileFloats,
                                kPart / kTileSide);
    const bool adds = span.first < base;
    for (int64_t i = 0; i < kTiles; ++i)
      weigh_tile(tile + i, base + first * kTileDepth, 2 * pairs, adds,
                 scratch.scores.data() + i * kTileSide * kPart,
                 scratch.weights.data() + i * kTileSide * kPart);
    constexpr int64_t kSteps = kPart / kTileDepth;
    const uint16_t* values = scratch.values.data() + first * kTileHalves;
    float* outputs = scratch.outputs.data() + tile * width * kTileFloats;
    int64_t d = 0;
    for (; d + 2 <= width; d += 2)
      multiply_tiles<kTiles, 2>(scratch.weights.data(), kSteps, values + d * kSteps * kTileHalves,
                                kSteps, pairs, adds, outputs + d * kTileFloats, width);
    if (d < width)
      multiply_tiles<kTiles, 1>(scratch.weights.data(), kSteps, values + d * kSteps * kTileHalves,
                                kSteps, pairs, adds, outputs + d * kTileFloats, width);
  }

  // Turns products of one tile of rows with the keys from `base` into weights.
  void weigh_tile(int64_t tile, int64_t base, int64_t num_vectors, bool adds, float* scores,
                  uint16_t* weights) {
    const PrefillShape& shape = rows_.shape();
    float factor = 1.44269504f * shape.scale;
    if (shape.softcap > 0 || shape.scale <= 0) {
      factor = 1.44269504f;
      for (int64_t i = 0; i < num_vectors * kTileFloats; i += kTileSide) {
        Floats score = load(scores + i) * shape.scale;
        if (shape.softcap > 0) score = cap(score, shape.softcap);
        store(scores + i, score);
      }
    }
    for (int64_t row = 0; row < kTileSide && tile * kTileSide + row < rows_.count(); ++row) {
      const Span seen = rows_.seen(tile * kTileSide + row);
      if (seen.first > base || seen.last < base + num_vectors * kTileSide)
        hide(scores + row * kTileSide, seen.first - base, seen.last - base, num_vectors);
    }
    __m512 mosts[kTileSide];
#pragma GCC unroll 16
    for (int64_t row = 0; row < kTileSide; ++row) mosts[row] = _mm512_set1_ps(-INFINITY);
    for (int64_t v = 0; v < num_vectors; ++v)
#pragma GCC unroll 16
      for (int64_t row = 0; row < kTileSide; ++row)
        // The second if one is not a number.
        mosts[row] = _mm512_max_ps(
            _mm512_load_ps(scores + v * kTileFloats + row * kTileSide), mosts[row]);
    float* tops = scratch_.tops.data() + tile * kTileSide;
    const __m512 before = _mm512_load_ps(tops);
    const __m512 now =
        _mm512_max_ps(before, _mm512_mul_ps(max_each(mosts), _mm512_set1_ps(factor)));
    _mm512_store_ps(tops, now);
    // A row that has seen nothing yet has only weights of 0.
    const __mmask16 is_blind = _mm512_cmp_ps_mask(now, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
    const __m512 bases = _mm512_maskz_mov_ps(_knot_mask16(is_blind), now);
    const __m512 shrunk = power_of_2(_mm512_sub_ps(before, bases));
    alignas(64) float base_of[kTileSide], factors[kTileSide];
    _mm512_store_ps(base_of, bases);
    _mm512_store_ps(factors, shrunk);
    float* totals = scratch_.totals.data() + tile * kTileFloats;
    for (int64_t row = 0; row < kTileSide; ++row, totals += kTileSide) {
      const __m512 sums = weigh(scores + row * kTileSide, factor, base_of[row], num_vectors,
                                weights + row * kTileDepth);
      _mm512_store_ps(totals, _mm512_fmadd_ps(_mm512_load_ps(totals), _mm512_set1_ps(factors[row]),
                                              sums));
    }
    if (adds && _mm512_cmp_ps_mask(shrunk, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0)
      for (int64_t d = 0; d < scratch_.width; ++d) {
        float* output = scratch_.outputs.data() + (tile * scratch_.width + d) * kTileFloats;
        for (int64_t row = 0; row < kTileSide; ++row, output += kTileSide)
          _mm512_store_ps(
              output, _mm512_mul_ps(_mm512_load_ps(output), _mm512_set1_ps(factors[row])));
      }
  }

  static void hide(float* scores, int64_t first, int64_t last, int64_t num_vectors) {
    for (int64_t v = 0; v < num_vectors;
         ++v, scores += kTileFloats, first -= kTileSide, last -= kTileSide) {
      if (first <= 0 && last >= kTileSide) continue;
      const __mmask16 is_seen = lanes_before(last) & ~lanes_before(first);
      _mm512_store_ps(scores, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), is_seen,
                                                 _mm512_load_ps(scores)));
    }
  }

  // Writes the weights of one row and returns their sums.
  static inline __m512 weigh(const float* scores, float factor, float base, int64_t num_vectors,
                             uint16_t* weights) {
    const __m512 factors = _mm512_set1_ps(factor), bases = _mm512_set1_ps(base);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t v = 0; v < num_vectors;
         v += 2, scores += 2 * kTileFloats, weights += kTileHalves) {
      const __m512 low = power_of_2(_mm512_fmsub_ps(_mm512_load_ps(scores), factors, bases));
      const __m512 high =
          power_of_2(_mm512_fmsub_ps(_mm512_load_ps(scores + kTileFloats), factors, bases));
      sums = _mm512_add_ps(sums, _mm512_add_ps(low, high));
      _mm512_store_si512(weights, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    return sums;
  }

  void write(uint16_t* output) {
    const int64_t head_dim = rows_.shape().head_dim, width = scratch_.width;
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      __m512 sums[kTileSide];
      for (int64_t row = 0; row < kTileSide; ++row)
        sums[row] = _mm512_load_ps(scratch_.totals.data() + (tile * kTileSide + row) * kTileSide);
      alignas(64) float inverse[kTileSide];
      _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.0f), sum_each(sums)));
      for (int64_t row = 0; row < std::min(kTileSide, rows_.count() - tile * kTileSide); ++row) {
        uint16_t* target = rows_.output(output, tile * kTileSide + row);
        const float* source =
            scratch_.outputs.data() + tile * width * kTileFloats + row * kTileSide;
        for (int64_t d = 0; d < head_dim; d += kTileSide, source += kTileFloats)
          _mm256_mask_storeu_epi16(
              target + d, lanes_before(head_dim - d),
              (__m256i)_mm512_cvtneps_pbh(
                  _mm512_mul_ps(_mm512_load_ps(source), _mm512_set1_ps(inverse[row]))));
      }
    }
  }

  const SharedRows<uint16_t>& rows_;
  const int64_t num_tiles_;
  TiledScratch& scratch_;
};

template <>
struct BlockOf<uint16_t> {
  typedef TiledBlock Type;
};
