// Writes what products are made into, next to where they are computed.
// Included once per instruction set, inside its namespace.
//
// Without a gate, output j is value j. With one, values come in blocks of 16 gates and their 16
// factors, and output j is round(round(activation(round(gate))) * round(factor)).

constexpr int64_t kGateBlock = 16;

static inline int64_t num_panels_of(Gate gate, int64_t num_outputs) {
  if (gate != Gate::kNone)
    num_outputs = (num_outputs + kGateBlock - 1) / kGateBlock * 2 * kGateBlock;
  return (num_outputs + kPanel - 1) / kPanel;
}

// Writes outputs of one row from `count` values, which begin at `column`; values(j) are those from
// column + j on.
template <typename T, typename Values>
static inline void write_outputs(Gate gate, int64_t num_outputs, int64_t column, int64_t count,
                                 T* row, Values values) {
  if (gate == Gate::kNone) {
    const int64_t num_left = std::min(count, num_outputs - column);
    int64_t first = 0;
    for (; first + 2 * kWidth <= num_left; first += 2 * kWidth)
      store_two(row + column + first, values(first), values(first + kWidth));
    for_vectors(num_left - first, [&](int64_t j, auto part) {
      store_part(row + column + first + j, values(first + j), part);
    });
    return;
  }
  for (int64_t block = 0; block < count; block += 2 * kGateBlock)
    for (int64_t j = block; j < block + kGateBlock; j += kWidth) {
      const int64_t output = (column + block) / 2 + j - block;
      if (output >= num_outputs) return;
      const Floats x = round_to<T>(values(j));
      const Floats activated = round_to<T>(gate == Gate::kGelu ? gelu_tanh(x) : silu(x));
      store_part(row + output, activated * round_to<T>(values(j + kGateBlock)),
                 std::min<int64_t>(kWidth, num_outputs - output));
    }
}
