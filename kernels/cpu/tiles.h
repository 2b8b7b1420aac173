// Tiles of the processor (AMX): eight registers of 16 rows of 64 bytes.
// Included where TILES is defined, inside the namespace of that instruction set.

constexpr int64_t kTileSide = 16;  // Rows of a tile, and words of 32 bits of each.
constexpr int64_t kTileBytes = 1024;

// A thread uses tiles while it holds this. They are given up at the end, because a thread with
// tiles in use costs more to switch.
class Tiles {
 public:
  Tiles() {
    Shapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = 16;
    }
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  // As the processor reads it.
  struct Shapes {
    uint8_t palette, first_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};
