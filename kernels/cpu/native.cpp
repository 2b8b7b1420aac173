// Kernels for CPUs behind a plain C interface; chiasm.kernels.cpu.native calls them.
//
// One binary holds each kernel for several instruction sets; the caller names the one to run.
// OpenMP's functions are left undefined on purpose: they are those of the runtime that torch has
// loaded, so that there is one pool of threads and torch.set_num_threads holds here too.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <type_traits>
#include <vector>

#include <omp.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kChunk = 128;  // Positions that are attended to at once.
constexpr int kTile = 16;    // Positions whose keys are multiplied at once.

struct DecodeShape {
  int64_t num_sequences, num_q_heads, num_kv_heads, head_dim;
  int64_t query_stride;  // Elements from one sequence's queries to the next.
  int64_t table_stride;  // Blocks from one sequence's table to the next.
  int64_t block_size;
  int64_t window;  // Positions that a token sees; 0 is all.
  float scale, softcap;
};

// Fewer elements are not worth the start of threads.
constexpr int64_t kParallelElements = 32768;

struct NormShape {
  int32_t is_bfloat16, is_weight_bfloat16;
  int64_t width;
  const void* weight;  // [width]
  float epsilon, scale;
};

struct GateShape {
  int32_t is_bfloat16, is_gelu;
  int64_t width;  // Of the gate; rows are twice as wide.
};

struct RopeShape {
  int32_t is_bfloat16, is_weight_bfloat16;
  int64_t num_q_heads, num_kv_heads, head_dim;
  const void* weight;  // Of the norm, [num_q_heads + num_kv_heads, head_dim]; null for none.
  float epsilon;
};

struct PairShape {
  int32_t is_bfloat16;
  int64_t num_turned, head_dim;  // Heads at the beginning of a row, and their width, which is even.
  int64_t width;                 // Of a row.
};

struct Chunk {
  int64_t sequence, first;
  int count;
};

constexpr int kPanel = 64;  // Outputs that are computed together, and ...
constexpr int kHalf = 32;   // ... those of them whose weights lie together.
// Rows that a thread takes at once, and fewest products that are worth the start of threads.
constexpr int64_t kSharedRows = 96, kParallelProducts = 1 << 18;
// Least size of what a row is scaled by, so that rows of zeros are rows of zeros.
constexpr float kLeastTop = 1e-12f;

// What is made of the outputs of a product; see outputs.h.
enum class Gate : int32_t { kNone, kSilu, kGelu };

struct QuantizedShape {
  int32_t is_bfloat16;  // Rows and outputs.
  Gate gate;
  int64_t num_inputs, num_outputs;
  const int8_t* weight;
  const int32_t* sums;  // Of the weights of each output.
  const float *scales, *bias;  // Of each output; without a bias, null.
};

struct TiledShape {
  Gate gate;
  int64_t num_inputs, num_outputs;
  const void* weight;
  const float* bias;  // Without one, null.
};

constexpr int kRows = 6;          // Query rows that are multiplied at once.
constexpr int kKeys = 64;         // Positions whose keys and values are packed at once.
constexpr int kBlockRows = 192;   // Query rows that share what is packed.

struct PrefillShape {
  int64_t num_chunks, num_q_heads, num_kv_heads, head_dim;
  int64_t query_stride, query_head_stride;  // Elements from one row or head to the next.
  int64_t slot_stride;                      // Elements from one slot's keys or values to the next.
  int64_t table_stride;                     // Blocks from one chunk's table to the next.
  int64_t block_size;
  float scale, softcap;
};

// Query rows of one chunk, all heads of one key head.
struct QueryBlock {
  int64_t chunk, head, first, count;
};

// Memory that begins with a cache line; what it holds at first is not set.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : lines_(new Line[(count * sizeof(T) + 63) / 64]) {}
  T* data() { return reinterpret_cast<T*>(lines_.get()); }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

namespace plain {
#define VECTOR_FLOATS 4
#include "vectors.h"
#include "paged_decode.h"
#include "packing.h"
#include "paged_prefill.h"
#include "elementwise.h"
#include "outputs.h"
#include "quantized_linear.h"
#undef VECTOR_FLOATS
}  // namespace plain

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR_FLOATS 8
#include "vectors.h"
#include "paged_decode.h"
#include "packing.h"
#include "paged_prefill.h"
#include "elementwise.h"
#include "outputs.h"
#include "quantized_linear.h"
#undef VECTOR_FLOATS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_FLOATS 16
#define DOT_BFLOAT16
#include "vectors.h"
#include "paged_decode.h"
#include "packing.h"
#include "paged_prefill.h"
#include "elementwise.h"
#include "outputs.h"
#include "quantized_linear.h"
#undef DOT_BFLOAT16
#undef VECTOR_FLOATS
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,prefer-vector-width=512,amx-tile,amx-int8,amx-bf16")
namespace amx {
#define VECTOR_FLOATS 16
#define DOT_BFLOAT16
#define TILES
#include "tiles.h"
#include "vectors.h"
#include "paged_decode.h"
#include "packing.h"
#include "paged_prefill.h"
#include "prefill_tiles.h"
#include "elementwise.h"
#include "outputs.h"
#include "tile_product.h"
#include "quantized_linear.h"
#include "tiled_linear.h"
#undef TILES
#undef DOT_BFLOAT16
#undef VECTOR_FLOATS
}  // namespace amx
#pragma GCC pop_options

#define RUN_AT(level, ...)            \
  (level == 3   ? amx::__VA_ARGS__    \
   : level == 2 ? avx512::__VA_ARGS__ \
   : level == 1 ? avx2::__VA_ARGS__   \
                : plain::__VA_ARGS__)

bool has_avx512() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

// Whether the processor has tiles and Linux lets this process use them, which it does on request.
bool has_tiles() {
#if defined(__linux__)
  constexpr long kAskForPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
#define RUN_AT(level, ...) (void)level, plain::__VA_ARGS__
#endif

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Changes with every change of the interface below.
int chiasm_interface_version() { return 10; }

// The best instruction set of this machine: 0 plain, 1 AVX2, 2 AVX-512 with bfloat16
// and products of 8-bit integers, 3 the same with tiles (AMX).
int chiasm_best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (has_avx512()) return has_tiles() ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// See paged_decode.h. Elements are bfloat16, or float32.
void chiasm_paged_decode(int level, int is_bfloat16, const DecodeShape* shape, const void* query,
                         const void* keys, const void* values, const int64_t* tables,
                         const int64_t* lengths, void* output) {
  auto* run = is_bfloat16 ? plain::decode<uint16_t> : plain::decode<float>;
#if defined(__x86_64__)
  if (level == 1) run = is_bfloat16 ? avx2::decode<uint16_t> : avx2::decode<float>;
  if (level == 2) run = is_bfloat16 ? avx512::decode<uint16_t> : avx512::decode<float>;
  if (level == 3) run = is_bfloat16 ? amx::decode<uint16_t> : amx::decode<float>;
#endif
  run(*shape, query, keys, values, tables, lengths, output);
}

// See paged_prefill.h. Elements are bfloat16, or float32.
void chiasm_paged_prefill(int level, int is_bfloat16, const PrefillShape* shape, const void* query,
                          const void* keys, const void* values, const int64_t* tables,
                          const int64_t* chunks, const int64_t* seen, void* output) {
  auto* run = is_bfloat16 ? plain::prefill<uint16_t> : plain::prefill<float>;
#if defined(__x86_64__)
  if (level == 1) run = is_bfloat16 ? avx2::prefill<uint16_t> : avx2::prefill<float>;
  if (level == 2) run = is_bfloat16 ? avx512::prefill<uint16_t> : avx512::prefill<float>;
  if (level == 3) run = is_bfloat16 ? amx::prefill<uint16_t> : amx::prefill<float>;
#endif
  run(*shape, query, keys, values, tables, chunks, seen, output);
}

// For the following see elementwise.h. Rows lie one behind the other.

// `addend` may be null.
void chiasm_add_rms_norm(int level, const NormShape* shape, int64_t num_rows, void* hidden,
                         const void* addend, void* normed) {
  RUN_AT(level, add_rms_norm(*shape, num_rows, hidden, addend, normed));
}

void chiasm_gate(int level, const GateShape* shape, int64_t num_rows, const void* gate_up,
                 void* output) {
  RUN_AT(level, gate(*shape, num_rows, gate_up, output));
}

void chiasm_quick_gelu(int level, int is_bfloat16, int64_t num_rows, int64_t width, void* rows) {
  RUN_AT(level, quick_gelu(is_bfloat16, num_rows, width, rows));
}

void chiasm_rope_store(int level, const RopeShape* shape, int64_t num_tokens, int64_t rotary_dim,
                       void* qkv, const void* cos, const void* sin, const int64_t* slots,
                       void* keys, void* values) {
  RUN_AT(level, rope_store(*shape, num_tokens, rotary_dim, qkv, cos, sin, slots, keys, values));
}

void chiasm_turn_pairs(int level, const PairShape* shape, int64_t num_rows, void* rows,
                       const float* rotation) {
  RUN_AT(level, turn_pairs(*shape, num_rows, rows, rotation));
}

// See quantized_linear.h. Rows lie one behind the other; sums, scales and bias are as long as all
// panels together.
void chiasm_quantized_linear(int level, const QuantizedShape* shape, int64_t num_rows,
                             const void* rows, void* output) {
  RUN_AT(level, quantized_linear(*shape, num_rows, rows, output));
}

// See tiled_linear.h. Only where the best level is 3. Rows lie one behind the other, as many of
// them as the shape says are inputs; a bias is as long as all panels together; `addend` may be
// null, as it is with a gate.
void chiasm_tiled_linear(const TiledShape* shape, int64_t num_rows, const void* rows,
                         const void* addend, void* output) {
#if defined(__x86_64__)
  amx::tiled_linear(*shape, num_rows, rows, addend, output);
#endif
}
}
#pragma GCC visibility pop
