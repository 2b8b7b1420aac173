// What lies between the matrix products of a layer.
// Included once per instruction set, inside its namespace.
//
//   hidden = round(hidden + scale * addend)
//   normed = round(round(hidden / sqrt(mean(hidden^2) + epsilon)) * weight)
//   gated  = round(round(activation(gate)) * up)
//   quick  = round(x / (1 + e^(-1.702 * x)))
//   turned = round(round(x * cos) + swap(x) * sin)
//   paired = round((x[2k] + i x[2k + 1]) * (cos[k] + i sin[k]))
//
// Values are rounded where torch's operators round them, the quotient of a norm to the element type
// of its weight; sums and functions are float32. One thread computes a row, in an order that its
// width alone decides.

// Bits of the nearest bfloat16 in the upper half, ties to even; NaN stays NaN.
static inline Ints nearest_bits(Floats values) {
  const Ints bits = (Ints)values;
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return values == values ? rounded : bits | 0x400000;
}

template <typename T>
static inline Floats round_to(Floats values);

template <>
inline Floats round_to<float>(Floats values) {
  return values;
}

template <>
inline Floats round_to<uint16_t>(Floats values) {
#ifdef DOT_BFLOAT16
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)values);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  return (Floats)(nearest_bits(values) & ~0xffff);
#endif
}

static inline void store_nearest(float* target, Floats values) { store(target, values); }

static inline void store_nearest(uint16_t* target, Floats values) {
#ifdef DOT_BFLOAT16
  store(target, values);
#else
  const Halves halves = __builtin_convertvector(nearest_bits(values) >> 16, Halves);
  std::memcpy(target, &halves, sizeof halves);
#endif
}

// Two vectors side by side; in bfloat16 they may be a whole line, which is then stored at once.
template <typename T>
static inline void store_two(T* target, Floats left, Floats right) {
#ifdef DOT_BFLOAT16
  if constexpr (sizeof(T) == 2) {
    const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    std::memcpy(target, &halves, sizeof halves);
    return;
  }
#endif
  store_nearest(target, left);
  store_nearest(target + kWidth, right);
}

// The first `count` values; the others are 0.
template <typename T>
static inline Floats load_part(const T* source, int64_t count) {
  if (count == kWidth) return load(source);
  T part[kWidth] = {};
  std::memcpy(part, source, count * sizeof(T));
  return load(part);
}

template <typename T>
static inline void store_part(T* target, Floats values, int64_t count) {
  if (count == kWidth) return store_nearest(target, values);
  T part[kWidth];
  store_nearest(part, values);
  std::memcpy(target, part, count * sizeof(T));
}

// Calls body(first, count) for every vector of a row; the last may be a part of one.
template <typename Body>
static inline void for_vectors(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) body(i, std::integral_constant<int64_t, kWidth>());
  if (i < width) body(i, width - i);
}

// Calls body(row) for every row, in parallel if they are worth it.
template <typename Body>
static inline void for_rows(int64_t num_rows, int64_t width, Body body) {
  if (num_rows < 2 || num_rows * width < kParallelElements) {
    for (int64_t row = 0; row < num_rows; ++row) body(row);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < num_rows; ++row) body(row);
}

// The factor that gives a row whose squares add up to `sums` a root mean square of one.
static inline float norm_factor(Floats sums, int64_t width, float epsilon) {
  return 1.0f / std::sqrt(sum(sums) / static_cast<float>(width) + epsilon);
}

template <typename T, typename W>
static inline void scale_row(const T* source, const W* weight, int64_t width, float factor,
                             T* target) {
  for_vectors(width, [&](int64_t i, auto count) {
    const Floats scaled = round_to<W>(load_part(source + i, count) * factor);
    store_part(target + i, scaled * load_part(weight + i, count), count);
  });
}

template <typename T, typename W>
static void add_rms_norm(const NormShape& shape, int64_t num_rows, void* hidden_data,
                         const void* addend_data, void* normed_data) {
  T *all_hidden = static_cast<T*>(hidden_data), *all_normed = static_cast<T*>(normed_data);
  const T* all_addends = static_cast<const T*>(addend_data);
  const W* weight = static_cast<const W*>(shape.weight);
  for_rows(num_rows, shape.width, [&](int64_t row) {
    T *hidden = all_hidden + row * shape.width, *normed = all_normed + row * shape.width;
    Floats squares{};
    if (all_addends == nullptr) {
      for_vectors(shape.width, [&](int64_t i, auto count) {
        const Floats value = load_part(hidden + i, count);
        squares += value * value;
      });
    } else {
      const T* addend = all_addends + row * shape.width;
      for_vectors(shape.width, [&](int64_t i, auto count) {
        const Floats added = load_part(hidden + i, count) + shape.scale * load_part(addend + i, count);
        const Floats value = round_to<T>(added);
        store_part(hidden + i, value, count);
        squares += value * value;
      });
    }
    const float factor = norm_factor(squares, shape.width, shape.epsilon);
    scale_row(hidden, weight, shape.width, factor, normed);
  });
}

// x / (1 + e^-y); the exponential is of a negative number, so that nothing overflows.
static inline Floats times_sigmoid(Floats x, Floats y) {
  const Ints is_negative = y < Floats{};
  const Floats power = exp_of_negative(is_negative ? y : -y);
  return (is_negative ? x * power : x) / (1.0f + power);
}

static inline Floats silu(Floats x) { return times_sigmoid(x, x); }

// 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), by 1 + tanh(u) = 2 / (1 + e^-2u).
static inline Floats gelu_tanh(Floats x) {
  return times_sigmoid(x, 1.59576912f * (x + 0.044715f * x * x * x));
}

// In place; computed in float32 and rounded once.
template <typename T>
static void quick_gelu(int64_t num_rows, int64_t width, void* row_data) {
  T* rows = static_cast<T*>(row_data);
  for_rows(num_rows, width, [&](int64_t row) {
    for_vectors(width, [&](int64_t i, auto count) {
      T* target = rows + row * width + i;
      const Floats x = load_part(target, count);
      store_part(target, times_sigmoid(x, 1.702f * x), count);
    });
  });
}

template <typename T>
static void gate(const GateShape& shape, int64_t num_rows, const void* gate_up_data,
                 void* output_data) {
  const T* gate_up = static_cast<const T*>(gate_up_data);
  T* output = static_cast<T*>(output_data);
  for_rows(num_rows, shape.width, [&](int64_t row) {
    const T *gates = gate_up + row * 2 * shape.width, *ups = gates + shape.width;
    T* target = output + row * shape.width;
    for_vectors(shape.width, [&](int64_t i, auto count) {
      const Floats x = load_part(gates + i, count);
      const Floats activated = shape.is_gelu ? gelu_tanh(x) : silu(x);
      store_part(target + i, round_to<T>(activated) * load_part(ups + i, count), count);
    });
  });
}

// Turns one head in place. What is behind the turned part stays.
template <typename T>
static inline void turn_head(T* head, const T* cos, const T* sin, int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  for_vectors(half, [&](int64_t i, auto count) {
    const Floats first = load_part(head + i, count), second = load_part(head + half + i, count);
    const Floats left = round_to<T>(first * load_part(cos + i, count));
    const Floats right = round_to<T>(second * load_part(cos + half + i, count));
    store_part(head + i, left + second * load_part(sin + i, count), count);
    store_part(head + half + i, right + first * load_part(sin + half + i, count), count);
  });
}

// Norms and turns queries and keys in place and copies keys and values to their slots.
template <typename T, typename W>
static void rope_store(const RopeShape& shape, int64_t num_tokens, int64_t rotary_dim,
                       void* qkv_data, const void* cos_data, const void* sin_data,
                       const int64_t* slots, void* key_data, void* value_data) {
  T *qkv = static_cast<T*>(qkv_data), *keys = static_cast<T*>(key_data);
  T* values = static_cast<T*>(value_data);
  const T *all_cos = static_cast<const T*>(cos_data), *all_sin = static_cast<const T*>(sin_data);
  const W* weight = static_cast<const W*>(shape.weight);
  const int64_t head_dim = shape.head_dim, num_turned = shape.num_q_heads + shape.num_kv_heads;
  const int64_t stored = shape.num_kv_heads * head_dim;
  const int64_t width = num_turned * head_dim + stored;
  for_rows(num_tokens, width, [&](int64_t token) {
    T* row = qkv + token * width;
    const T *cos = all_cos + token * rotary_dim, *sin = all_sin + token * rotary_dim;
    for (int64_t h = 0; h < num_turned; ++h) {
      T* head = row + h * head_dim;
      if (weight != nullptr) {
        Floats squares{};
        for_vectors(head_dim, [&](int64_t i, auto count) {
          const Floats value = load_part(head + i, count);
          squares += value * value;
        });
        const float factor = norm_factor(squares, head_dim, shape.epsilon);
        scale_row(head, weight + h * head_dim, head_dim, factor, head);
      }
      turn_head(head, cos, sin, rotary_dim);
    }
    const T *key = row + shape.num_q_heads * head_dim, *value = row + num_turned * head_dim;
    std::memcpy(keys + slots[token] * stored, key, stored * sizeof(T));
    std::memcpy(values + slots[token] * stored, value, stored * sizeof(T));
  });
}

// Values of pairs side by side are turned as complex numbers, of which `rotation` has the cosine and
// sine of each pair. Computed in float32 and rounded once.
template <typename T>
static void turn_pairs(const PairShape& shape, int64_t num_rows, void* row_data,
                       const float* rotation) {
  T* rows = static_cast<T*>(row_data);
  Ints lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  const Ints even = lanes & ~1, odd = lanes | 1, other = lanes ^ 1;
  const Ints is_first = lanes == even;
  for_rows(num_rows, shape.num_turned * shape.head_dim, [&](int64_t row) {
    T* heads = rows + row * shape.width;
    const float* angles = rotation + row * shape.head_dim;
    for_vectors(shape.head_dim, [&](int64_t i, auto count) {
      const Floats pairs = load_part(angles + i, count);
      const Floats cos = __builtin_shuffle(pairs, even), sines = __builtin_shuffle(pairs, odd);
      const Floats sin = is_first ? -sines : sines;
      for (int64_t h = 0; h < shape.num_turned; ++h) {
        T* head = heads + h * shape.head_dim + i;
        const Floats x = load_part(head, count);
        store_part(head, x * cos + __builtin_shuffle(x, other) * sin, count);
      }
    });
  });
}

// As above, for whichever element types; float32 rows have float32 weights.

static void add_rms_norm(const NormShape& shape, int64_t num_rows, void* hidden,
                         const void* addend, void* normed) {
  auto* run = add_rms_norm<float, float>;
  if (shape.is_bfloat16)
    run = shape.is_weight_bfloat16 ? add_rms_norm<uint16_t, uint16_t> : add_rms_norm<uint16_t, float>;
  run(shape, num_rows, hidden, addend, normed);
}

static void gate(const GateShape& shape, int64_t num_rows, const void* gate_up, void* output) {
  (shape.is_bfloat16 ? gate<uint16_t> : gate<float>)(shape, num_rows, gate_up, output);
}

static void quick_gelu(bool is_bfloat16, int64_t num_rows, int64_t width, void* rows) {
  (is_bfloat16 ? quick_gelu<uint16_t> : quick_gelu<float>)(num_rows, width, rows);
}

static void rope_store(const RopeShape& shape, int64_t num_tokens, int64_t rotary_dim, void* qkv,
                       const void* cos, const void* sin, const int64_t* slots, void* keys,
                       void* values) {
  auto* run = rope_store<float, float>;
  if (shape.is_bfloat16)
    run = shape.is_weight_bfloat16 ? rope_store<uint16_t, uint16_t> : rope_store<uint16_t, float>;
  run(shape, num_tokens, rotary_dim, qkv, cos, sin, slots, keys, values);
}

static void turn_pairs(const PairShape& shape, int64_t num_rows, void* rows, const float* rotation) {
  (shape.is_bfloat16 ? turn_pairs<uint16_t> : turn_pairs<float>)(shape, num_rows, rows, rotation);
}
