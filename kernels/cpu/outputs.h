// Writes what products are made into, next to where they are computed.
// Included once per instruction set, inside its namespace.
//
// Without a gate, output j is value j. With one, values come in blocks of 16 gates and their 16
// factors, and output j is round(round(activation(round(gate))) * round(factor)).

constexpr int64_t kGateBlock = 16;

static inline int64_t num_panels_of(Gate gate, int64_t num_outputs) {
  if (gate != Gate::kNone) num_outputs = (num_outputs + kGateBlock - 1) / kGateBlock * 2 * kGateBlock;
  return (num_outputs + kPanel - 1) / kPanel;
}

// Rounds as torch does, the same on every processor.
template <typename T>
struct ExactRounding {
  static Floats round(Floats values) { return round_to<T>(values); }
  static void put(T* target, Floats values, int64_t count) { store_part(target, values, count); }
};

#ifdef DOT_BFLOAT16
// Rounds with one instruction, which takes numbers too small for normal ones as zeros.
struct FastRounding {
  static Floats round(Floats values) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)values);
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  }
  static void put(uint16_t* target, Floats values, int64_t count) {
    const __mmask16 mask = count >= kWidth ? 0xffff : (1u << count) - 1;
    _mm256_mask_storeu_epi16(target, mask, (__m256i)_mm512_cvtneps_pbh((__m512)values));
  }
};
#endif

// Writes outputs of one row from `count` values, which begin at `column`; values(j) are those from
// column + j on.
template <typename Rounding, typename T, typename Values>
static inline void write_outputs(Gate gate, int64_t num_outputs, int64_t column, int64_t count,
                                 T* row, Values values) {
  if (gate == Gate::kNone) {
    for (int64_t j = 0; j < count && column + j < num_outputs; j += kWidth)
      Rounding::put(row + column + j, values(j),
                    std::min<int64_t>(kWidth, num_outputs - column - j));
    return;
  }
  for (int64_t block = 0; block < count; block += 2 * kGateBlock)
    for (int64_t j = block; j < block + kGateBlock; j += kWidth) {
      const int64_t output = (column + block) / 2 + j - block;
      if (output >= num_outputs) return;
      const Floats x = Rounding::round(values(j));
      const Floats activated = Rounding::round(gate == Gate::kGelu ? gelu_tanh(x) : silu(x));
      Rounding::put(row + output, activated * Rounding::round(values(j + kGateBlock)),
                    std::min<int64_t>(kWidth, num_outputs - output));
    }
}
