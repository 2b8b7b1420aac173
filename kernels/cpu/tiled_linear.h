// Products of rows of bfloat16 with a constant matrix, by tiles.
// Included where TILES is defined, inside the namespace of that instruction set.
//
//   value[i][j] = sum_k row[i][k] * weight[j][k] + bias[j] + addend[i][j]
//
// Sums are float32; see tile_product.h for the layout, and outputs.h for what becomes of values.

static void tiled_linear(const TiledShape& shape, int64_t num_rows, const void* row_data,
                         const void* addend_data, void* output_data) {
  const uint16_t* rows = static_cast<const uint16_t*>(row_data);
  const uint16_t* addends = static_cast<const uint16_t*>(addend_data);
  uint16_t* output = static_cast<uint16_t*>(output_data);
  constexpr int64_t kDepth = 2 * kTileSide;  // Inputs of one step.
  const int64_t num_inputs = shape.num_inputs;
  const TileWeight weight = {shape.weight, (num_inputs + kDepth - 1) / kDepth,
                             num_panels_of(shape.gate, shape.num_outputs)};
  const auto prepare = [&](int64_t row, const Part& part, auto line, float*) {
    const uint16_t* source = rows + row * num_inputs;
    for (int64_t step = part.first_step; step < part.first_step + part.num_steps; ++step) {
      const int64_t left = num_inputs - step * kDepth;
      const __mmask32 mask = left >= kDepth ? ~0u : (1u << left) - 1;
      _mm512_store_si512(line(step), _mm512_maskz_loadu_epi16(mask, source + step * kDepth));
    }
  };
  const auto finish = [&](int64_t row, int64_t column, const float* sums, float) {
    write_outputs(shape.gate, shape.num_outputs, column, kHalf, output + row * shape.num_outputs,
                  [&](int64_t j) {
                    Floats values = load(sums + j);
                    if (shape.bias) values += load(shape.bias + column + j);
                    const int64_t first = column + j, left = shape.num_outputs - first;
                    if (addends)
                      values += load_part(addends + row * shape.num_outputs + first,
                                          std::min<int64_t>(left, kWidth));
                    return values;
                  });
  };
  multiply_by_tiles<false>(weight, num_rows, prepare, finish);
}
