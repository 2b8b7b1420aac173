// Products of rows with a packed matrix, by tiles of sixteen rows of 64 bytes.
// Included where TILES is defined, inside the namespace of that instruction set.
//
//   packed weight   [j / kHalf][w][j % kHalf]          words w of 4 bytes: neighbouring inputs
//   packed rows     [i / 16][w / 16][i % 16][w % 16]
//
// Two tiles of rows and two of weights give four tiles of sums, so that each that is loaded serves
// twice. Blocks of two tiles of rows pass few steps of half a panel one after the other: these
// weights stay in the first cache, which tiles read twice as fast as the second, and sums wait in
// memory from step to step. Few rows are one tile and wait for weights alone.
//
// Each sum adds its products in order of their inputs, whatever else is computed with it: rows do
// not depend on other rows or on threads.

constexpr int64_t kBlockSide = 2 * kTileSide;
constexpr int64_t kBlockBytes = 2 * kTileBytes;         // Of two tiles of rows in one step.
constexpr int64_t kStepBytes = 4 * kTileSide * kHalf;   // Of the weights of half a panel in one.
constexpr int64_t kBlockSums = kBlockSide * kHalf;      // Of a block of rows and half a panel.
// Steps of half a panel that stay in the first cache while blocks of rows pass them.
constexpr int64_t kNearSteps = 16;
// Packed rows, or sums, that stay in the second cache while panels pass; and rows beside sums.
constexpr int64_t kNearBytes = 1 << 20, kPartBytes = 1 << 19;
constexpr int64_t kMostBlocks = 8;  // That are multiplied in parts.
// Distance at which weights are fetched that only one tile of rows waits for.
constexpr int64_t kFetchBytes = 1024;

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

// Two tiles of sums side by side, and two more: zeros, or what is there.
static inline void begin_sums(bool adds, const int32_t* first, const int32_t* second) {
  constexpr int64_t kStride = 4 * kHalf;
  if (adds) {
    _tile_loadd(0, first, kStride);
    _tile_loadd(1, first + kTileSide, kStride);
    _tile_loadd(2, second, kStride);
    _tile_loadd(3, second + kTileSide, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

static inline void end_sums(int32_t* first, int32_t* second) {
  constexpr int64_t kStride = 4 * kHalf;
  _tile_stored(0, first, kStride);
  _tile_stored(1, first + kTileSide, kStride);
  _tile_stored(2, second, kStride);
  _tile_stored(3, second + kTileSide, kStride);
}

// One tile of rows by a panel, whose halves lie `half_bytes` apart: sums are [2][16][kHalf]; if it
// adds, there are some.
template <bool kIntegers>
static inline void multiply_tile(const char* rows, const char* left, int64_t half_bytes,
                                 int64_t num_steps, bool adds, int32_t* sums) {
  constexpr int64_t kStride = 4 * kHalf;
  int32_t* right_sums = sums + kTileSide * kHalf;
  begin_sums(adds, sums, right_sums);
  for (int64_t step = 0; step < num_steps; ++step, rows += kTileBytes, left += kStepBytes) {
    const char* right = left + half_bytes;
    _tile_loadd(4, rows, 64);
    fetch_tile(left + kFetchBytes);
    _tile_loadd(5, left, kStride);
    MULTIPLY_TILES(0, 4, 5);
    fetch_tile(left + kFetchBytes + kTileBytes);
    _tile_loadd(6, left + 64, kStride);
    MULTIPLY_TILES(1, 4, 6);
    fetch_tile(right + kFetchBytes);
    _tile_loadd(7, right, kStride);
    MULTIPLY_TILES(2, 4, 7);
    fetch_tile(right + kFetchBytes + kTileBytes);
    _tile_loadd(5, right + 64, kStride);
    MULTIPLY_TILES(3, 4, 5);
  }
  end_sums(sums, right_sums);
}

// Two tiles of rows, `row_bytes` apart, by half a panel: sums are [32][kHalf]. With every step,
// calls beside(), which the processor computes while tiles are multiplied.
template <bool kIntegers, typename Beside>
static inline void multiply_block(const char* rows, int64_t row_bytes, const char* half,
                                  int64_t num_steps, bool adds, int32_t* sums, Beside beside) {
  constexpr int64_t kStride = 4 * kHalf;
  int32_t* lower_sums = sums + kTileSide * kHalf;
  begin_sums(adds, sums, lower_sums);
  for (int64_t step = 0; step < num_steps; ++step, rows += kTileBytes, half += kStepBytes) {
    beside();
    // Streamed, rows leave the first cache to the weights.
    _tile_stream_loadd(4, rows, 64);
    _tile_loadd(5, half, kStride);
    MULTIPLY_TILES(0, 4, 5);
    _tile_loadd(6, half + 64, kStride);
    MULTIPLY_TILES(1, 4, 6);
    _tile_stream_loadd(7, rows + row_bytes, 64);
    MULTIPLY_TILES(2, 7, 5);
    MULTIPLY_TILES(3, 7, 6);
  }
  end_sums(sums, lower_sums);
}

#undef MULTIPLY_TILES

struct TileWeight {
  const void* halves;
  int64_t num_steps, num_panels;  // A step multiplies 16 words of every row.
  int64_t half_bytes() const { return num_steps * kStepBytes; }
};

// Rows that pass the panels together, in blocks of two tiles and, if that is enough for the last
// of them, one tile.
struct RowGroup {
  int64_t first, num_rows;
  int64_t num_blocks() const { return (num_rows + kTileSide - 1) / kBlockSide; }
  bool has_tile() const { return num_blocks() * kBlockSide < num_rows; }
};

// Steps whose rows are packed together; sums of several parts wait in memory.
struct Part {
  int64_t first_step, num_steps;
  bool is_first, is_last;
  int64_t row_bytes() const { return num_steps * kTileBytes; }  // Of a packed tile of rows.
};

// Rows whose sums are complete and of which nothing has been made yet.
struct Complete {
  int64_t next, end;
  const int32_t* sums;  // Of the next.
};

// Multiplies the packed blocks of a group by half a panel and adds to `sums`, kBlockSums for each
// block. After the last part, calls finish(row, sums), where row counts from the first of the
// group: beside the products of the next block, so that they need not wait for it.
template <bool kIntegers, typename Finish>
static inline void multiply_blocks(const char* half, const RowGroup& group, const Part& part,
                                   const char* packed, WeightsAhead ahead, int32_t* sums,
                                   Finish finish) {
  const int64_t num_blocks = group.num_blocks();
  // Weights that are used once need not stay near.
  const int64_t num_turns = num_blocks == 1 ? 1 : (part.num_steps + kNearSteps - 1) / kNearSteps;
  const int64_t most_steps = (part.num_steps + num_turns - 1) / num_turns;
  Complete complete = {0, 0, nullptr};
  const auto finish_rows = [&](int64_t most) {
    const int64_t end = std::min(complete.next + most, complete.end);
    for (; complete.next < end; ++complete.next, complete.sums += kHalf)
      finish(complete.next, complete.sums);
  };
  for (int64_t step = 0; step < part.num_steps; step += most_steps) {
    const int64_t num_steps = std::min(most_steps, part.num_steps - step);
    const int64_t rows_per_step = (kBlockSide + num_steps - 1) / num_steps;
    const bool is_last = part.is_last && step + num_steps == part.num_steps;
    for (int64_t block = 0; block < num_blocks; ++block) {
      int32_t* block_sums = sums + block * kBlockSums;
      multiply_block<kIntegers>(packed + 2 * block * part.row_bytes() + step * kTileBytes,
                                part.row_bytes(), half + step * kStepBytes, num_steps,
                                !part.is_first || step > 0, block_sums, [&] {
                                  ahead.fetch();
                                  finish_rows(rows_per_step);
                                });
      const int64_t first = block * kBlockSide;
      if (is_last) complete = {first, std::min(first + kBlockSide, group.num_rows), block_sums};
    }
  }
  finish_rows(kBlockSide);
}

// Multiplies the packed rows of a group by one panel and adds to `sums`, 2 * kBlockSums for each
// block and kBlockSums for a tile. After the last part, calls finish(row, half, sums).
template <bool kIntegers, typename Finish>
static inline void multiply_group(const TileWeight& weight, const RowGroup& group, const Part& part,
                                  const char* packed, int64_t panel, int32_t* sums,
                                  Finish finish) {
  const int64_t num_blocks = group.num_blocks();
  const char* weights = static_cast<const char*>(weight.halves) +
                        2 * panel * weight.half_bytes() + part.first_step * kStepBytes;
  for (int64_t half = 0; half < 2 && num_blocks > 0; ++half) {
    const char* own = weights + half * weight.half_bytes();
    const bool has_next = half == 0 || panel + 1 < weight.num_panels;
    const WeightsAhead ahead(own + weight.half_bytes(),
                             has_next ? part.num_steps * kStepBytes / 64 : 0,
                             num_blocks * part.num_steps);
    multiply_blocks<kIntegers>(
        own, group, part, packed, ahead, sums + half * num_blocks * kBlockSums,
        [&](int64_t row, const int32_t* row_sums) { finish(row, half, row_sums); });
  }
  if (!group.has_tile()) return;
  sums += 2 * num_blocks * kBlockSums;
  multiply_tile<kIntegers>(packed + 2 * num_blocks * part.row_bytes(), weights,
                           weight.half_bytes(), part.num_steps, !part.is_first, sums);
  const int64_t first = num_blocks * kBlockSide;
  for (int64_t i = first; i < group.num_rows && part.is_last; ++i)
    for (int64_t half = 0; half < 2; ++half)
      finish(i, half, sums + (half * kTileSide + i - first) * kHalf);
}

// How rows are cut: into groups of blocks, and these into parts of steps.
struct TilePlan {
  int64_t num_blocks, num_groups, num_parts;

  // As many blocks together as rows, or as sums of parts of rows, find room near a thread: the
  // weights are read once for each group.
  TilePlan(const TileWeight& weight, int64_t num_rows)
      : num_blocks((num_rows + kBlockSide - 1) / kBlockSide) {
    const int64_t whole = std::max<int64_t>(1, kNearBytes / (weight.num_steps * kBlockBytes));
    const int64_t in_parts =
        std::min(kMostBlocks, kNearBytes / (weight.num_panels * 2 * kBlockSums * 4));
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
// place of 64 bytes and `value` is kept from part to part. finish(row, column, sums, value) gets
// the kHalf sums of a row from `column` on.
template <bool kIntegers, typename Prepare, typename Finish>
static void multiply_by_tiles(const TileWeight& weight, int64_t num_rows, Prepare prepare,
                              Finish finish) {
  typedef std::conditional_t<kIntegers, int32_t, float> Sum;
  if (num_rows == 0) return;
  const TilePlan plan(weight, num_rows);
  const int64_t most_steps = (weight.num_steps + plan.num_parts - 1) / plan.num_parts;
  const int64_t num_products = num_rows * weight.num_steps * weight.num_panels * kTileSide * kPanel;
#pragma omp parallel if (num_products >= kParallelProducts)
  {
    const Tiles tiles;
    const int64_t panel_sums = 2 * plan.most_blocks() * kBlockSums;
    Aligned<char> packed(plan.most_blocks() * most_steps * kBlockBytes);
    Aligned<float> values(plan.most_blocks() * kBlockSide);
    Aligned<int32_t> all_sums(panel_sums * (plan.num_parts > 1 ? weight.num_panels : 1));
    // Every thread takes the next share of all blocks times panels, group by group.
    const int64_t total = plan.num_blocks * weight.num_panels, num_threads = omp_get_num_threads();
    const int64_t begin = total * omp_get_thread_num() / num_threads;
    const int64_t end = total * (omp_get_thread_num() + 1) / num_threads;
    int64_t first_block = 0;
    for (int64_t g = 0; g < plan.num_groups; ++g) {
      const int64_t left = plan.num_groups - g;
      const int64_t blocks = (plan.num_blocks - first_block + left - 1) / left;
      const int64_t first = first_block * kBlockSide, work = first_block * weight.num_panels;
      const RowGroup group = {first, std::min(blocks * kBlockSide, num_rows - first)};
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
          if (plan.num_parts > 1) sums += (panel - first_panel) * panel_sums;
          multiply_group<kIntegers>(
              weight, group, part, packed.data(), panel, sums,
              [&](int64_t row, int64_t half, const int32_t* row_sums) {
                finish(first + row, panel * kPanel + half * kHalf,
                       reinterpret_cast<const Sum*>(row_sums), values.data()[row]);
              });
        }
      }
    }
  }
}
