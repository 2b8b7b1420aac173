// Products of rows with a constant matrix of 8-bit integers.
// Included once per instruction set, inside its namespace.
//
//   scale[i]      = max_k |row[i][k]| / 127
//   integer[i][k] = nearest(row[i][k] * (127 / max_k |row[i][k]|)), ties to even
//   value[i][j]   = (sum_k integer[i][k] * weight[j][k]) * weight_scale[j] * scale[i] + bias[j]
//
//   packed weight   [j / kHalf][k / 4][j % kHalf][k % 4]   filled up with zeros: inputs to 64,
//                                                          outputs to kPanel
//
// So four inputs of a row are multiplied with those of all outputs of a panel without sums across
// vectors. A panel is read from memory once and stays in the cache while all rows pass it. Sums are
// exact, and what follows them is computed one by one and never contracted: neither other rows nor
// threads nor the instruction set change a value. See outputs.h for what becomes of values.

// VPDPBUSD multiplies unsigned by signed integers: rows are held as integers around 128, and 128
// times the sum of each output's weights is subtracted.
constexpr int32_t kZeroPoint = kWidth == 16 ? 128 : 0;
constexpr int kTileRows = kWidth == 16 ? 6 : 2;  // Rows whose sums fit the registers.

// A product to which something is added without being contracted with it.
static inline Floats rounded(Floats product) {
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#endif
  return product;
}

// Writes the low byte of each of the first `count` integers.
static inline void store_bytes(uint8_t* target, Ints integers, int64_t count) {
#if VECTOR_FLOATS == 16
  _mm512_mask_cvtepi32_storeu_epi8(target, (1u << count) - 1, (__m512i)integers);
#else
  for (int64_t i = 0; i < count; ++i) target[i] = static_cast<uint8_t>(integers[i]);
#endif
}

// The largest size in a row, which is not finite if the row is not.
template <typename T>
static inline float top_of(const T* row, int64_t width) {
  // Without their sign, floats are ordered as integers, with NaN above infinity.
  Ints tops{};
  for_vectors(width, [&](int64_t i, auto count) {
    const Ints sizes = (Ints)load_part(row + i, count) & 0x7fffffff;
    tops = sizes > tops ? sizes : tops;
  });
  int32_t top_bits = 0;
  for (int i = 0; i < kWidth; ++i) top_bits = std::max(top_bits, tops[i]);
  float top;
  std::memcpy(&top, &top_bits, sizeof top);
  return top < kLeastTop ? kLeastTop : top;
}

// Writes `count` integers of a row, those from k on to place(k) for every vector. What is behind
// the last integer stays: the weights that it meets are 0.
template <typename T, typename Place>
static inline void quantize(const T* row, int64_t count, float top, Place place) {
  const float factor = 127.0f / top;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Floats magic = broadcast(12582912.0f + kZeroPoint);
  for_vectors(count, [&](int64_t i, auto part) {
    const Floats shifted = rounded(load_part(row + i, part) * factor) + magic;
    store_bytes(place(i), (Ints)shifted, part);
  });
}

// What is read next, and how many cache lines of it are fetched with every quad.
struct Ahead {
  const int8_t* next;
  int lines;
};

// sums[i][j] = sum_k integers[i][k] * panel[j][k], for kCount rows, `stride` bytes apart.
// Unless it is told to unroll early, GCC 12 stores every sum with every step.
#if VECTOR_FLOATS == 16
template <int kCount>
static inline void multiply_panel(const uint8_t* integers, int64_t stride, const int8_t* panel,
                                  int64_t num_quads, Ahead ahead, int32_t (*sums)[kPanel]) {
  __m512i parts[kCount][4];
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) parts[i][v] = _mm512_setzero_si512();
  const int8_t* halves[2] = {panel, panel + 4 * kHalf * num_quads};
  for (int64_t quad = 0; quad < num_quads; ++quad) {
    if constexpr (kCount > 2)  // Fewer are always the only tile.
      for (int i = 0; i < ahead.lines; ++i, ahead.next += 64) __builtin_prefetch(ahead.next);
    __m512i weights[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      weights[v] = _mm512_loadu_si512(halves[v / 2] + 4 * kHalf * quad + v % 2 * 64);
#pragma GCC unroll 6
    for (int i = 0; i < kCount; ++i) {
      int32_t four;
      std::memcpy(&four, integers + i * stride + 4 * quad, sizeof four);
      const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) parts[i][v] = _mm512_dpbusd_epi32(parts[i][v], row, weights[v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_storeu_si512(sums[i] + 16 * v, parts[i][v]);
}
#elif VECTOR_FLOATS == 8
template <int kCount>
static inline void multiply_panel(const uint8_t* integers, int64_t stride, const int8_t* panel,
                                  int64_t num_quads, Ahead, int32_t (*sums)[kPanel]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int first = 0; first < kPanel; first += kHalf, panel += 4 * kHalf * num_quads) {
    __m256i parts[kCount][4];
    for (int i = 0; i < kCount; ++i)
      for (int v = 0; v < 4; ++v) parts[i][v] = _mm256_setzero_si256();
    for (int64_t quad = 0; quad < num_quads; ++quad) {
      const int8_t* columns = panel + 4 * kHalf * quad;
      for (int v = 0; v < 4; ++v) {
        __m256i weights;
        std::memcpy(&weights, columns + v * 32, sizeof weights);
        const __m256i sizes = _mm256_abs_epi8(weights);
        for (int i = 0; i < kCount; ++i) {
          int32_t four;
          std::memcpy(&four, integers + i * stride + 4 * quad, sizeof four);
          // Two products of at most 127 * 127 do not saturate 16 bits.
          const __m256i row = _mm256_sign_epi8(_mm256_set1_epi32(four), weights);
          const __m256i pairs = _mm256_maddubs_epi16(sizes, row);
          parts[i][v] = _mm256_add_epi32(parts[i][v], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    for (int i = 0; i < kCount; ++i)
      std::memcpy(sums[i] + first, parts[i], sizeof parts[i]);
  }
}
#else
template <int kCount>
static inline void multiply_panel(const uint8_t* integers, int64_t stride, const int8_t* panel,
                                  int64_t num_quads, Ahead, int32_t (*sums)[kPanel]) {
  for (int i = 0; i < kCount; ++i) {
    std::fill_n(sums[i], kPanel, 0);
    const int8_t* row = reinterpret_cast<const int8_t*>(integers + i * stride);
    for (int64_t quad = 0; quad < num_quads; ++quad)
      for (int j = 0; j < kPanel; ++j)
        for (int k = 0; k < 4; ++k) {
          const int64_t word = (j / kHalf * num_quads + quad) * kHalf + j % kHalf;
          sums[i][j] += row[4 * quad + k] * panel[4 * word + k];
        }
  }
}
#endif

typedef void (*MultiplyPanel)(const uint8_t*, int64_t, const int8_t*, int64_t, Ahead,
                              int32_t (*)[kPanel]);

template <int kMost = kTileRows>
static inline MultiplyPanel multiply_panel_for(int64_t count) {
  if constexpr (kMost > 1)
    if (count < kMost) return multiply_panel_for<kMost - 1>(count);
  return multiply_panel<kMost>;
}

// Turns `count` sums of one row, those from `column` on, into outputs.
template <typename T>
static inline void scale_sums(const QuantizedShape& shape, const int32_t* sums, float scale,
                              int64_t column, int64_t count, T* row) {
  write_outputs(
      shape.gate, shape.num_outputs, column, count, row, [&](int64_t j) {
        Ints exact, weights;
        std::memcpy(&exact, sums + j, sizeof exact);
        std::memcpy(&weights, shape.sums + column + j, sizeof weights);
        const Floats products = __builtin_convertvector(exact - kZeroPoint * weights, Floats);
        const Floats values = products * load(shape.scales + column + j) * scale;
        return shape.bias ? rounded(values) + load(shape.bias + column + j) : values;
      });
}

#ifdef TILES
template <typename T>
static void quantized_linear(const QuantizedShape& shape, int64_t num_rows, const void* row_data,
                             void* output_data) {
  const T* rows = static_cast<const T*>(row_data);
  T* output = static_cast<T*>(output_data);
  const TileWeight weight = {shape.weight, (shape.num_inputs + 63) / 64,
                             num_panels_of(shape.gate, shape.num_outputs)};
  const auto prepare = [&](int64_t row, const Part& part, auto line, float* top) {
    const T* source = rows + row * shape.num_inputs;
    if (part.is_first) *top = top_of(source, shape.num_inputs);
    const int64_t first = 64 * part.first_step;
    const int64_t count = std::min(64 * part.num_steps, shape.num_inputs - first);
    quantize(source + first, count, *top, [&](int64_t k) {
      return reinterpret_cast<uint8_t*>(line(part.first_step + k / 64)) + k % 64;
    });
  };
  const auto finish = [&](int64_t row, int64_t column, const int32_t* sums, float top) {
    scale_sums(shape, sums, top / 127.0f, column, kHalf, output + row * shape.num_outputs);
  };
  multiply_by_tiles<true>(weight, num_rows, prepare, finish);
}
#else
// Rows as integers, and what belongs to them.
struct QuantizedRows {
  const uint8_t* integers;
  const float* scales;
  int64_t stride;  // Bytes from one row to the next.
};

// Computes the outputs of one panel for the rows from `first` to before `last`.
template <typename T>
static inline void multiply_rows(const QuantizedShape& shape, const QuantizedRows& rows,
                                 int64_t panel, int64_t first, int64_t last, T* output) {
  const int64_t num_quads = (shape.num_inputs + 63) / 64 * 16, column = panel * kPanel;
  const int64_t num_bytes = kPanel * 4 * num_quads;
  const int8_t* weight = shape.weight + panel * num_bytes;
  int64_t tiles = (last - first + kTileRows - 1) / kTileRows;
  // The first tiles fetch the next panel, so that memory does not rest while they are computed. One
  // tile alone waits for memory only, and the processor reads ahead by itself.
  const bool is_last = panel + 1 == num_panels_of(shape.gate, shape.num_outputs);
  Ahead ahead = {weight + num_bytes, is_last || tiles == 1 ? 0 : tiles < 4 ? 2 : 1};
  int32_t sums[kTileRows][kPanel];
  // Tiles of about the same number of rows.
  for (; tiles > 0; --tiles) {
    const int64_t count = (last - first + tiles - 1) / tiles;
    multiply_panel_for(count)(rows.integers + first * rows.stride, rows.stride, weight, num_quads,
                              ahead, sums);
    ahead.next += ahead.lines * 64 * num_quads;
    if (ahead.next >= weight + 2 * num_bytes) ahead.lines = 0;
    for (int64_t i = 0; i < count; ++i, ++first)
      scale_sums(shape, sums[i], rows.scales[first], column, kPanel,
                 output + first * shape.num_outputs);
  }
}

template <typename T>
static void quantized_linear(const QuantizedShape& shape, int64_t num_rows, const void* row_data,
                             void* output_data) {
  const T* source = static_cast<const T*>(row_data);
  T* output = static_cast<T*>(output_data);
  const int64_t stride = (shape.num_inputs + 63) / 64 * 64;
  Aligned<uint8_t> integers(num_rows * stride);
  Aligned<float> scales(num_rows);
  for_rows(num_rows, shape.num_inputs, [&](int64_t i) {
    const T* row = source + i * shape.num_inputs;
    const float top = top_of(row, shape.num_inputs);
    quantize(row, shape.num_inputs, top,
             [&](int64_t k) { return integers.data() + i * stride + k; });
    scales.data()[i] = top / 127.0f;
  });
  const QuantizedRows rows = {integers.data(), scales.data(), stride};
  const int64_t num_panels = num_panels_of(shape.gate, shape.num_outputs);
  const int64_t num_blocks = (num_rows + kSharedRows - 1) / kSharedRows;
  const int64_t num_shared = num_blocks == 0 ? 0 : (num_rows + num_blocks - 1) / num_blocks;
  const int64_t num_products = num_rows * shape.num_inputs * num_panels * kPanel;
  // One after the other, blocks have the same panel.
#pragma omp parallel for schedule(static) if (num_products >= kParallelProducts)
  for (int64_t item = 0; item < num_panels * num_blocks; ++item) {
    const int64_t first = item % num_blocks * num_shared;
    multiply_rows(shape, rows, item / num_blocks, first, std::min(first + num_shared, num_rows),
                  output);
  }
}

#endif

static void quantized_linear(const QuantizedShape& shape, int64_t num_rows, const void* rows,
                             void* output) {
  (shape.is_bfloat16 ? quantized_linear<uint16_t> : quantized_linear<float>)(shape, num_rows, rows,
                                                                              output);
}
