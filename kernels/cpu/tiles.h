// Tiles of the processor (AMX): eight registers of 16 rows of 64 bytes.
// Included where TILES is defined, inside the namespace of that instruction set.

constexpr int64_t kTileSide = 16;  // Rows of a tile, and words of 32 bits of each.
constexpr int64_t kTileBytes = 1024;

// What is written before this, tiles see: the compiler does not know that they read memory.
static inline void publish() { __asm__ volatile("" ::: "memory"); }

// The shapes of tiles. A thread has tiles from their use until it gives them up, which it does
// because a thread with tiles in use costs more to switch.
class TileShapes {
 public:
  void set(std::initializer_list<int> tiles, int num_rows, int num_bytes) {
    for (int tile : tiles) {
      shapes_.rows[tile] = static_cast<uint8_t>(num_rows);
      shapes_.row_bytes[tile] = static_cast<uint16_t>(num_bytes);
    }
  }
  void use() const {
    publish();
    _tile_loadconfig(&shapes_);
  }

 private:
  // As the processor reads it.
  struct {
    uint8_t palette = 1, first_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes_;
};

// Whole tiles, while it is held.
class Tiles {
 public:
  Tiles() {
    TileShapes shapes;
    shapes.set({0, 1, 2, 3, 4, 5, 6, 7}, kTileSide, 64);
    shapes.use();
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};
