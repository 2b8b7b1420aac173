// Products of rows with a packed matrix, by tiles of sixteen rows of 64 bytes.
// Included where TILES is defined, inside the namespace of that instruction set.
//
//   packed weight   [j / kPanel][w][j % kPanel]          words w of 4 bytes: neighbouring inputs
//   packed rows     [i / 16][w / 16][i % 16][w % 16]
//
// Two tiles of rows and two of weights give four tiles of sums, so that each that is loaded serves
// twice. Few rows are one tile and wait for weights alone. Each sum adds its products in order of
// their inputs, whatever else is computed with it: rows do not depend on other rows or on threads.

constexpr int64_t kSide = 16;        // Rows of a tile, and words of one of its rows.
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStepBytes = 4 * kSide * kPanel;  // Of the weights of a panel in one step.
// Packed rows that stay near a thread while panels pass them.
constexpr int64_t kGroupBytes = 1 << 19;
// Distance at which weights are fetched that only one tile of rows waits for.
constexpr int64_t kFetchBytes = 2048;

// Weights that are fetched while others are multiplied, the same number of lines with every step.
class WeightsAhead {
 public:
  WeightsAhead(const char* next, int64_t num_lines, int64_t num_steps)
      : next_(next), end_(next + 64 * num_lines), bytes_((num_lines / num_steps + 1) * 64) {}

  void fetch() {
    const char* end = std::min(next_ + bytes_, end_);
    for (; next_ < end; next_ += 64) _mm_prefetch(next_, _MM_HINT_T1);
  }

 private:
  const char *next_, *end_;
  const int64_t bytes_;
};

#define MULTIPLY_TILES(sums, rows, weights)    \
  if constexpr (kIntegers)                     \
    _tile_dpbusd(sums, rows, weights);         \
  else                                         \
    _tile_dpbf16ps(sums, rows, weights)

// Fetches as much as a tile of weights is long.
static inline void fetch_tile(const char* weights) {
  for (int64_t i = 0; i < kTileBytes; i += 64) _mm_prefetch(weights + i, _MM_HINT_T0);
}

// One tile of rows by a panel: sums are [16][kPanel].
template <bool kIntegers>
static inline void multiply_tile_row(const char* rows, const char* panel, int64_t num_steps,
                                     void* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  constexpr int64_t kStride = 4 * kPanel;
  for (int64_t step = 0; step < num_steps; ++step, rows += kTileBytes, panel += kStepBytes) {
    const char* ahead = panel + kFetchBytes;
    _tile_loadd(4, rows, 64);
    fetch_tile(ahead);
    _tile_loadd(5, panel, kStride);
    MULTIPLY_TILES(0, 4, 5);
    fetch_tile(ahead + kTileBytes);
    _tile_loadd(6, panel + 64, kStride);
    MULTIPLY_TILES(1, 4, 6);
    fetch_tile(ahead + 2 * kTileBytes);
    _tile_loadd(7, panel + 128, kStride);
    MULTIPLY_TILES(2, 4, 7);
    fetch_tile(ahead + 3 * kTileBytes);
    _tile_loadd(5, panel + 192, kStride);
    MULTIPLY_TILES(3, 4, 5);
  }
  int32_t* target = static_cast<int32_t*>(sums);
  _tile_stored(0, target, kStride);
  _tile_stored(1, target + 16, kStride);
  _tile_stored(2, target + 32, kStride);
  _tile_stored(3, target + 48, kStride);
}

// Two tiles of rows, `row_bytes` apart, by half a panel: sums are [32][kPanel / 2].
template <bool kIntegers>
static inline void multiply_tile_square(const char* rows, int64_t row_bytes, const char* half,
                                        int64_t num_steps, WeightsAhead* ahead, void* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < num_steps; ++step, rows += kTileBytes, half += kStepBytes) {
    ahead->fetch();
    _tile_loadd(4, rows, 64);
    _tile_loadd(5, half, 4 * kPanel);
    MULTIPLY_TILES(0, 4, 5);
    _tile_loadd(6, half + 64, 4 * kPanel);
    MULTIPLY_TILES(1, 4, 6);
    _tile_loadd(7, rows + row_bytes, 64);
    MULTIPLY_TILES(2, 7, 5);
    MULTIPLY_TILES(3, 7, 6);
  }
  constexpr int64_t kStride = 2 * kPanel, kSquare = kSide * kPanel / 2;
  int32_t* target = static_cast<int32_t*>(sums);
  _tile_stored(0, target, kStride);
  _tile_stored(1, target + 16, kStride);
  _tile_stored(2, target + kSquare, kStride);
  _tile_stored(3, target + kSquare + 16, kStride);
}

#undef MULTIPLY_TILES

struct TileWeight {
  const void* panels;
  int64_t num_steps, num_panels;  // A step multiplies 16 words of every row.
};

// Rows that are packed together, in blocks of two tiles.
struct RowGroup {
  int64_t first, num_rows;

  int64_t num_blocks() const { return (num_rows + 2 * kSide - 1) / (2 * kSide); }
};

// Multiplies the packed rows of a group by one panel. Calls finish(row, column, count, sums), where
// row counts from the first of the group and column from the first of the panel.
template <bool kIntegers, typename Finish>
static inline void multiply_group(const TileWeight& weight, const RowGroup& group,
                                  const char* packed, int64_t panel, Finish finish) {
  const int64_t row_bytes = weight.num_steps * kTileBytes;
  const int64_t panel_bytes = weight.num_steps * kStepBytes;
  const char* weights = static_cast<const char*>(weight.panels) + panel * panel_bytes;
  const bool is_last = panel + 1 == weight.num_panels;
  WeightsAhead ahead(weights + panel_bytes, is_last ? 0 : panel_bytes / 64,
                     2 * group.num_blocks() * weight.num_steps);
  alignas(64) std::conditional_t<kIntegers, int32_t, float> sums[kSide * kPanel];
  for (int64_t row = 0; row < group.num_rows; row += 2 * kSide, packed += 2 * row_bytes) {
    const int64_t count = std::min(2 * kSide, group.num_rows - row);
    if (count <= kSide) {
      multiply_tile_row<kIntegers>(packed, weights, weight.num_steps, sums);
      for (int64_t i = 0; i < count; ++i) finish(row + i, 0, kPanel, sums + i * kPanel);
      continue;
    }
    for (int64_t column = 0; column < kPanel; column += kPanel / 2) {
      multiply_tile_square<kIntegers>(packed, row_bytes, weights + 4 * column, weight.num_steps,
                                      &ahead, sums);
      for (int64_t i = 0; i < count; ++i)
        finish(row + i, column, kPanel / 2, sums + i * kPanel / 2);
    }
  }
}

// Multiplies rows by a packed matrix on all threads.
//
// prepare(row, line) writes what belongs to a row, where line(step) is the place of 64 bytes, and
// returns what finish is given: finish(row, column, count, sums, prepared).
template <bool kIntegers, typename Prepare, typename Finish>
static void multiply_by_tiles(const TileWeight& weight, int64_t num_rows, Prepare prepare,
                              Finish finish) {
  const int64_t row_bytes = weight.num_steps * kTileBytes;
  const int64_t num_blocks = (num_rows + 2 * kSide - 1) / (2 * kSide);
  const int64_t most_blocks = std::max<int64_t>(1, kGroupBytes / (2 * row_bytes));
  const int64_t num_groups = (num_blocks + most_blocks - 1) / most_blocks;
  const int64_t num_products = num_rows * weight.num_steps * weight.num_panels * kSide * kPanel;
#pragma omp parallel if (num_products >= kParallelProducts)
  {
    const Tiles tiles;
    Aligned<char> packed(std::min(num_blocks, most_blocks) * 2 * row_bytes);
    Aligned<float> prepared(std::min(num_blocks, most_blocks) * 2 * kSide);
    // Every thread takes the next share of all blocks times panels, group by group.
    const int64_t total = num_blocks * weight.num_panels, num_threads = omp_get_num_threads();
    const int64_t begin = total * omp_get_thread_num() / num_threads;
    const int64_t end = total * (omp_get_thread_num() + 1) / num_threads;
    int64_t work = 0, first_block = 0;
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t blocks = (num_blocks - first_block + num_groups - g - 1) / (num_groups - g);
      const int64_t first = first_block * 2 * kSide;
      const RowGroup group = {first, std::min(blocks * 2 * kSide, num_rows - first)};
      bool is_packed = false;
      for (int64_t panel = 0; panel < weight.num_panels; ++panel, work += blocks) {
        if (work < begin || work >= end) continue;
        for (int64_t i = 0; i < group.num_rows && !is_packed; ++i) {
          char* lines = packed.data() + i / kSide * row_bytes + i % kSide * 64;
          const auto line = [&](int64_t step) { return lines + step * kTileBytes; };
          prepared.data()[i] = prepare(first + i, line);
        }
        is_packed = true;
        multiply_group<kIntegers>(
            weight, group, packed.data(), panel,
            [&](int64_t row, int64_t column, int64_t count, const auto* sums) {
              finish(first + row, panel * kPanel + column, count, sums, prepared.data()[row]);
            });
      }
      first_block += blocks;
    }
  }
}
