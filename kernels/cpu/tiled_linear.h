// Products of rows of bfloat16 with a constant matrix, by tiles.
// Included where TILES is defined, inside the namespace of that instruction set.
//
//   output[i][j] = round(sum_k row[i][k] * weight[j][k] + bias[j])
//
// Sums are float32; see tile_product.h for the layout.

static void tiled_linear(const TiledShape& shape, int64_t num_rows, const void* row_data,
                         void* output_data) {
  const uint16_t* rows = static_cast<const uint16_t*>(row_data);
  uint16_t* output = static_cast<uint16_t*>(output_data);
  constexpr int64_t kDepth = 2 * kSide;  // Inputs of one step.
  const int64_t num_inputs = shape.num_inputs, num_outputs = shape.num_outputs;
  const TileWeight weight = {shape.weight, (num_inputs + kDepth - 1) / kDepth,
                             (num_outputs + kPanel - 1) / kPanel};
  const auto prepare = [&](int64_t row, auto line) {
    const uint16_t* source = rows + row * num_inputs;
    for (int64_t step = 0; step < weight.num_steps; ++step) {
      const int64_t left = num_inputs - step * kDepth;
      const __mmask32 mask = left >= kDepth ? ~0u : (1u << left) - 1;
      _mm512_store_si512(line(step), _mm512_maskz_loadu_epi16(mask, source + step * kDepth));
    }
    return 0.0f;
  };
  const auto finish = [&](int64_t row, int64_t column, int64_t count, const float* sums, float) {
    uint16_t* target = output + row * num_outputs + column;
    for (int64_t j = 0; j < count && column + j < num_outputs; j += kWidth) {
      Floats values = load(sums + j);
      if (shape.bias != nullptr) values += load(shape.bias + column + j);
      const int64_t left = num_outputs - column - j;
      const __mmask16 mask = left >= kWidth ? 0xffff : (1u << left) - 1;
      _mm256_mask_storeu_epi16(target + j, mask, (__m256i)_mm512_cvtneps_pbh((__m512)values));
    }
  };
  multiply_by_tiles<false>(weight, num_rows, prepare, finish);
}
