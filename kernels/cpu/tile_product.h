// Products of rows with a packed matrix, by tiles of sixteen rows of 64 bytes.
// Included where TILES is defined, inside the namespace of that instruction set.
//
//   packed weight   [j / kPanel][w][j % kPanel]          words w of 4 bytes: neighbouring inputs
//   packed rows     [i / 16][w / 16][i % 16][w % 16]
//
// Two tiles of rows and two of weights give four tiles of sums, so that each that is loaded serves
// twice. Few rows are one tile and wait for weights alone. Each sum adds its products in order of
// their inputs, whatever else is computed with it: rows do not depend on other rows or on threads.

constexpr int64_t kBlockBytes = 2 * kTileBytes;         // Of two tiles of rows in one step.
constexpr int64_t kStepBytes = 4 * kTileSide * kPanel;  // Of the weights of a panel in one step.
constexpr int64_t kSumBytes = 8 * kTileSide * kPanel;   // Of sums of two tiles of rows and a panel.
// Packed rows, or sums, that stay near a thread while panels pass them; and rows beside sums.
constexpr int64_t kNearBytes = 1 << 20, kPartBytes = 1 << 19;
constexpr int64_t kMostBlocks = 8;  // That are multiplied in parts.
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

// Four tiles of sums: zeros, or what is there.
static inline void begin_sums(bool adds, const int32_t* first, const int32_t* second,
                              const int32_t* third, const int32_t* fourth, int64_t stride) {
  if (adds) {
    _tile_loadd(0, first, stride);
    _tile_loadd(1, second, stride);
    _tile_loadd(2, third, stride);
    _tile_loadd(3, fourth, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

// One tile of rows by a panel: sums are [16][kPanel]; if it adds, there are some.
template <bool kIntegers>
static inline void multiply_tile_row(const char* rows, const char* panel, int64_t num_steps,
                                     bool adds, int32_t* sums) {
  constexpr int64_t kStride = 4 * kPanel;
  begin_sums(adds, sums, sums + 16, sums + 32, sums + 48, kStride);
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
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  _tile_stored(2, sums + 32, kStride);
  _tile_stored(3, sums + 48, kStride);
}

// Two tiles of rows, `row_bytes` apart, by half a panel: sums are [32][kPanel / 2].
template <bool kIntegers>
static inline void multiply_tile_square(const char* rows, int64_t row_bytes, const char* half,
                                        int64_t num_steps, WeightsAhead* ahead, bool adds,
                                        int32_t* sums) {
  constexpr int64_t kStride = 2 * kPanel, kSquare = kTileSide * kPanel / 2;
  begin_sums(adds, sums, sums + 16, sums + kSquare, sums + kSquare + 16, kStride);
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
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  _tile_stored(2, sums + kSquare, kStride);
  _tile_stored(3, sums + kSquare + 16, kStride);
}

#undef MULTIPLY_TILES

struct TileWeight {
  const void* panels;
  int64_t num_steps, num_panels;  // A step multiplies 16 words of every row.
};

// Rows that pass the panels together, in blocks of two tiles.
struct RowGroup {
  int64_t first, num_rows;
};

// Steps whose rows are packed together; sums of several parts wait in memory.
struct Part {
  int64_t first_step, num_steps;
  bool is_first, is_last;
};

static inline int64_t count_blocks(int64_t num_rows) {
  return (num_rows + 2 * kTileSide - 1) / (2 * kTileSide);
}

// Multiplies the packed rows of a group by one panel and adds to `sums`: kSumBytes for each block,
// or for all of them in turn if there is one part. After the last part, calls
// finish(row, column, count, sums), where row counts from the first of the group and column from
// the first of the panel.
template <bool kIntegers, typename Finish>
static inline void multiply_group(const TileWeight& weight, const RowGroup& group, const Part& part,
                                  const char* packed, int64_t panel, int32_t* sums,
                                  Finish finish) {
  typedef std::conditional_t<kIntegers, int32_t, float> Sum;
  const int64_t row_bytes = part.num_steps * kTileBytes;
  const int64_t panel_bytes = weight.num_steps * kStepBytes;
  const char* weights = static_cast<const char*>(weight.panels) + panel * panel_bytes +
                        part.first_step * kStepBytes;
  const bool has_next = panel + 1 < weight.num_panels;
  const int64_t num_kept = part.is_first && part.is_last ? 0 : kTileSide * kPanel;
  WeightsAhead ahead(weights + panel_bytes, has_next ? part.num_steps * kStepBytes / 64 : 0,
                     2 * count_blocks(group.num_rows) * part.num_steps);
  for (int64_t row = 0; row < group.num_rows; row += 2 * kTileSide, packed += 2 * row_bytes) {
    const int64_t count = std::min(2 * kTileSide, group.num_rows - row);
    if (count <= kTileSide) {
      multiply_tile_row<kIntegers>(packed, weights, part.num_steps, !part.is_first, sums);
      for (int64_t i = 0; i < count && part.is_last; ++i)
        finish(row + i, 0, kPanel, reinterpret_cast<const Sum*>(sums) + i * kPanel);
      return;
    }
    for (int64_t column = 0; column < kPanel; column += kPanel / 2, sums += num_kept) {
      multiply_tile_square<kIntegers>(packed, row_bytes, weights + 4 * column, part.num_steps,
                                      &ahead, !part.is_first, sums);
      for (int64_t i = 0; i < count && part.is_last; ++i)
        finish(row + i, column, kPanel / 2, reinterpret_cast<const Sum*>(sums) + i * kPanel / 2);
    }
  }
}

// How rows are cut: into groups of blocks, and these into parts of steps.
struct TilePlan {
  int64_t num_blocks, num_groups, num_parts;

  // As many blocks together as rows, or as sums of parts of rows, find room near a thread: the
  // weights are read once for each group.
  TilePlan(const TileWeight& weight, int64_t num_rows) : num_blocks(count_blocks(num_rows)) {
    const int64_t whole = std::max<int64_t>(1, kNearBytes / (weight.num_steps * kBlockBytes));
    const int64_t in_parts = std::min(kMostBlocks, kNearBytes / (weight.num_panels * kSumBytes));
    const int64_t together = num_blocks <= whole ? whole : std::max(whole, in_parts);
    num_groups = (num_blocks + together - 1) / together;
    num_parts = 1;
    if (together > whole) {
      const int64_t group_bytes = most_blocks() * weight.num_steps * kBlockBytes;
      num_parts = (group_bytes + kPartBytes - 1) / kPartBytes;
    }
  }

  int64_t most_blocks() const { return (num_blocks + num_groups - 1) / num_groups; }
};

// Multiplies rows by a packed matrix on all threads.
//
// prepare(row, part, line, value) writes what belongs to a part of a row, where line(step) is the
// place of 64 bytes and `value` is kept from part to part. finish(row, column, count, sums, value)
// gets sums of a row.
template <bool kIntegers, typename Prepare, typename Finish>
static void multiply_by_tiles(const TileWeight& weight, int64_t num_rows, Prepare prepare,
                              Finish finish) {
  if (num_rows == 0) return;
  const TilePlan plan(weight, num_rows);
  const int64_t most_steps = (weight.num_steps + plan.num_parts - 1) / plan.num_parts;
  const int64_t num_products = num_rows * weight.num_steps * weight.num_panels * kTileSide * kPanel;
#pragma omp parallel if (num_products >= kParallelProducts)
  {
    const Tiles tiles;
    const int64_t num_kept = plan.num_parts > 1 ? weight.num_panels * plan.most_blocks() : 1;
    Aligned<char> packed(plan.most_blocks() * most_steps * kBlockBytes);
    Aligned<float> values(plan.most_blocks() * 2 * kTileSide);
    Aligned<int32_t> all_sums(num_kept * kSumBytes / 4);
    // Every thread takes the next share of all blocks times panels, group by group.
    const int64_t total = plan.num_blocks * weight.num_panels, num_threads = omp_get_num_threads();
    const int64_t begin = total * omp_get_thread_num() / num_threads;
    const int64_t end = total * (omp_get_thread_num() + 1) / num_threads;
    int64_t first_block = 0;
    for (int64_t g = 0; g < plan.num_groups; ++g) {
      const int64_t left = plan.num_groups - g;
      const int64_t blocks = (plan.num_blocks - first_block + left - 1) / left;
      const int64_t first = first_block * 2 * kTileSide, work = first_block * weight.num_panels;
      const RowGroup group = {first, std::min(blocks * 2 * kTileSide, num_rows - first)};
      const auto panel_at = [&](int64_t share) {
        return std::clamp<int64_t>((share - work + blocks - 1) / blocks, 0, weight.num_panels);
      };
      const int64_t first_panel = panel_at(begin), last_panel = panel_at(end);
      first_block += blocks;
      if (first_panel == last_panel) continue;
      for (int64_t step = 0; step < weight.num_steps; step += most_steps) {
        const Part part = {step, std::min(most_steps, weight.num_steps - step), step == 0,
                           step + most_steps >= weight.num_steps};
        for (int64_t i = 0; i < group.num_rows; ++i) {
          char* lines = packed.data() + i / kTileSide * part.num_steps * kTileBytes +
                        i % kTileSide * 64;
          const auto line = [&](int64_t at) { return lines + (at - step) * kTileBytes; };
          prepare(first + i, part, line, values.data() + i);
        }
        publish();
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          int32_t* sums = all_sums.data();
          if (plan.num_parts > 1) sums += (panel - first_panel) * blocks * kSumBytes / 4;
          multiply_group<kIntegers>(
              weight, group, part, packed.data(), panel, sums,
              [&](int64_t row, int64_t column, int64_t count, const auto* row_sums) {
                finish(first + row, panel * kPanel + column, count, row_sums, values.data()[row]);
              });
        }
      }
    }
  }
}
