// Vectors of VECTOR_FLOATS floats and bfloat16 loads, for whatever instruction set is the target.
// Included once per instruction set, inside its namespace.

constexpr int kWidth = VECTOR_FLOATS;
constexpr int kAtOnce = VECTOR_FLOATS == 16 ? 4 : 2;  // Vectors per row that fit the registers.
typedef float Floats __attribute__((vector_size(4 * VECTOR_FLOATS)));
typedef int32_t Ints __attribute__((vector_size(4 * VECTOR_FLOATS)));
typedef uint16_t Halves __attribute__((vector_size(2 * VECTOR_FLOATS)));

static inline Floats broadcast(float value) { return Floats{} + value; }

static inline Floats load(const float* source) {
  Floats result;
  std::memcpy(&result, source, sizeof result);
  return result;
}

// GCC 12 widens sixteen halves in four steps, unless it is told how.
static inline Floats load(const uint16_t* source) {
#ifdef DOT_BFLOAT16
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
#else
  Halves halves;
  std::memcpy(&halves, source, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Ints) << 16);
#endif
}

static inline void store(float* target, Floats values) {
  std::memcpy(target, &values, sizeof values);
}

static inline void store(uint16_t* target, Floats values) {
#ifdef DOT_BFLOAT16
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)values);
#else
  const Ints bits = (Ints)values;
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector(values == values ? rounded : rounded | 0x7fc0, Halves);
#endif
  std::memcpy(target, &halves, sizeof halves);
}

static inline float widen(float value) { return value; }

static inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

static inline void narrow(float value, float* target) { *target = value; }

// Rounds to the nearest, ties to even, as torch does.
static inline void narrow(float value, uint16_t* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) {
    *target = 0x7fc0;
    return;
  }
  *target = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float sum(Floats values) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[kWidth / 4];
  std::memcpy(parts, &values, sizeof values);
  for (int i = 1; i < kWidth / 4; ++i) parts[0] += parts[i];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

static inline float max_of(Floats values) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[kWidth / 4];
  std::memcpy(parts, &values, sizeof values);
  for (int i = 1; i < kWidth / 4; ++i) parts[0] = parts[i] > parts[0] ? parts[i] : parts[0];
  return std::max(std::max(parts[0][0], parts[0][1]), std::max(parts[0][2], parts[0][3]));
}

// e to the power of arguments of at most 0, to about 2e-7; below -87 the result is 0.
static inline Floats exp_of_negative(Floats x) {
  const Ints is_tiny = x < broadcast(-87.0f);
  const Floats bounded = is_tiny ? broadcast(-87.0f) : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Floats magic = broadcast(12582912.0f);
  const Floats shifted = bounded * 1.44269504f + magic;
  const Floats power = shifted - magic;
  const Floats rest = bounded - power * 0.693359375f + power * 2.12194440e-4f;
  Floats series = broadcast(1.9875691500e-4f);
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  const Ints exponent = ((Ints)shifted - (Ints)magic + 127) << 23;
  const Floats result = series * (Floats)exponent;
  return is_tiny ? Floats{} : result;
}

// bound * tanh(scores / bound)
static inline Floats cap(Floats scores, float bound) {
  const Floats twice = scores * (2.0f / bound);
  const Ints is_negative = twice < Floats{};
  const Floats power = exp_of_negative(is_negative ? twice : -twice);
  const Floats tanh = (1.0f - power) / (1.0f + power);
  return (is_negative ? -tanh : tanh) * bound;
}
