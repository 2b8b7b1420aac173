// Packs queries, keys and values for the products of paged_prefill.h, which draws the layouts.
// Included once per instruction set, inside its namespace.

// What elements are packed as; one word of 32 bits of a row is multiplied at once.
template <typename T>
struct Packed {
  typedef float Type;
};

#ifdef DOT_BFLOAT16
template <>
struct Packed<uint16_t> {
  typedef uint16_t Type;
};

// Transposes sixteen rows of sixteen words of 32 bits.
static inline void transpose(__m512i* rows) {
  __m512i halves[16];
  for (int i = 0; i < 16; i += 2) {
    halves[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    halves[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  __m512i fours[16];  // Column c of each of the four lanes, of four rows, in 4 * i + c.
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(halves[i + j], halves[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(halves[i + j], halves[i + 2 + j]);
    }
  for (int c = 0; c < 4; ++c) {
    const __m512i low_even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
    rows[12 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

// A word is one float or a pair of bfloat16. Keys that nobody sees are 0.
template <typename T>
static void pack_keys(const T* const* keys, int64_t head_dim, void* packed) {
  const int64_t num_bytes = head_dim * sizeof(T), num_words = (num_bytes + 3) / 4;
  int32_t* words = static_cast<int32_t*>(packed);
  for (int64_t word = 0; word < num_words; word += 16) {
    const int64_t left = num_bytes - word * 4;
    const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
    for (int key = 0; key < kKeys; key += 16) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i)
        rows[i] = keys[key + i] == nullptr
                      ? _mm512_setzero_si512()
                      : _mm512_maskz_loadu_epi8(
                            mask, reinterpret_cast<const char*>(keys[key + i]) + word * 4);
      transpose(rows);
      for (int64_t i = 0; i < std::min<int64_t>(16, num_words - word); ++i)
        _mm512_storeu_si512(words + (word + i) * kKeys + key, rows[i]);
    }
  }
}

#ifndef TILES
static void pack_values(const uint16_t* const* values, int64_t count, int64_t head_dim,
                        int64_t width, uint16_t* packed) {
  for (int64_t key = 0; key < count; key += 2, packed += 2 * width) {
    const uint16_t *even = values[key], *odd = key + 1 < count ? values[key + 1] : nullptr;
    for (int64_t d = 0; d < width; d += 16) {
      const int64_t left = head_dim - d;
      const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
      const __m256i none = _mm256_setzero_si256();
      const __m256i low = even == nullptr ? none : _mm256_maskz_loadu_epi16(mask, even + d);
      const __m256i high = odd == nullptr ? none : _mm256_maskz_loadu_epi16(mask, odd + d);
      const __m512i pairs = _mm512_or_si512(
          _mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      _mm512_storeu_si512(packed + 2 * d, pairs);
    }
  }
}
#endif

#ifdef TILES
// Packs sixteen keys as tiles, one behind the other, of sixteen pairs of elements each.
static void pack_key_tiles(const uint16_t* const* keys, int64_t head_dim, uint16_t* packed) {
  for (int64_t d = 0; d < head_dim; d += 32, packed += 512) {
    const int64_t left = head_dim - d;
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
    __m512i rows[16];
    for (int i = 0; i < 16; ++i)
      rows[i] = keys[i] == nullptr ? _mm512_setzero_si512()
                                   : _mm512_maskz_loadu_epi16(mask, keys[i] + d);
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + 32 * i, rows[i]);
  }
}

// Packs 32 values as tiles, `stride` tiles apart, of sixteen elements of each.
static void pack_value_tiles(const uint16_t* const* values, int64_t head_dim, int64_t stride,
                             uint16_t* packed) {
  for (int64_t d = 0; d < head_dim; d += 16, packed += 512 * stride) {
    const int64_t left = head_dim - d;
    const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
    __m512i rows[32];
    for (int i = 0; i < 32; ++i)
      rows[i] = values[i] == nullptr
                    ? _mm512_setzero_si512()
                    : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values[i] + d));
    for (int i = 0; i < 16; ++i)
      _mm512_store_si512(packed + 32 * i, _mm512_or_si512(rows[2 * i], _mm512_slli_epi32(
                                                                         rows[2 * i + 1], 16)));
  }
}
#endif
#else
template <typename T>
static void pack_keys(const T* const* keys, int64_t head_dim, void* packed) {
  float* columns = static_cast<float*>(packed);
  for (int key = 0; key < kKeys; ++key)
    for (int64_t d = 0; d < head_dim; ++d)
      columns[d * kKeys + key] = keys[key] == nullptr ? 0.0f : widen(keys[key][d]);
}
#endif

template <typename T>
static void pack_values(const T* const* values, int64_t count, int64_t head_dim, int64_t width,
                        float* packed) {
  for (int64_t key = 0; key < count; ++key, packed += width) {
    int64_t d = 0;
    if (values[key] != nullptr) {
      for (; d + kWidth <= head_dim; d += kWidth) store(packed + d, load(values[key] + d));
      for (; d < head_dim; ++d) packed[d] = widen(values[key][d]);
    }
    std::fill(packed + d, packed + width, 0.0f);
  }
}

static inline void pack_row(const uint16_t* row, int64_t head_dim, uint16_t* packed) {
  std::memcpy(packed, row, head_dim * sizeof *row);
}

template <typename T>
static inline void pack_row(const T* row, int64_t head_dim, float* packed) {
  for (int64_t d = 0; d < head_dim; ++d) packed[d] = widen(row[d]);
}
