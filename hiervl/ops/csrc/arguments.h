// Argument checks of the CPU and CUDA bindings, which ensure that the kernels stay within their arrays.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <vector>

#include "ms_deform_attn.h"

namespace hiervl {

inline ScalarType scalar_type(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return ScalarType::kFloat;
    case at::kDouble: return ScalarType::kDouble;
    case at::kHalf: return ScalarType::kHalf;
    case at::kBFloat16: return ScalarType::kBFloat16;
    default:
      TORCH_CHECK(false, "ms_deform_attn: ", name, " must be float32, float64, float16 or bfloat16, got ",
                  tensor.scalar_type());
  }
}

struct Arguments {
  int64_t batch, rows, heads, width, queries, points;
  std::vector<Level> levels;
};

// value (B, S, H, D), locations (B, Q, H, L, P, 2), weights (B, Q, H, L, P); spatial_shapes holds
// h0, w0, h1, w1, ...
inline Arguments check_arguments(const at::Tensor& value, at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                                 const at::Tensor& locations, const at::Tensor& weights) {
  TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5,
              "ms_deform_attn: expected value (B, S, H, D), sampling_locations (B, Q, H, L, P, 2) and "
              "attention_weights (B, Q, H, L, P), got ",
              value.sizes(), ", ", locations.sizes(), ", ", weights.sizes());
  const int64_t n_levels = static_cast<int64_t>(level_start.size());
  Arguments a{value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), locations.size(4), {}};
  const std::vector<int64_t> expected{a.batch, a.queries, a.heads, n_levels, a.points, 2};
  TORCH_CHECK(locations.sizes() == at::IntArrayRef(expected), "ms_deform_attn: sampling_locations should be ",
              at::IntArrayRef(expected), ", got ", locations.sizes());
  TORCH_CHECK(weights.sizes() == at::IntArrayRef(expected.data(), 5), "ms_deform_attn: attention_weights should be ",
              at::IntArrayRef(expected.data(), 5), ", got ", weights.sizes());
  TORCH_CHECK(spatial_shapes.size() == 2 * level_start.size(), "ms_deform_attn: ", level_start.size(),
              " level starts for ", spatial_shapes.size() / 2, " spatial shapes");
  TORCH_CHECK(value.device() == locations.device() && value.device() == weights.device(),
              "ms_deform_attn: all tensors must be on one device");
  // Rows and sampling points are counted in 32 bits, and sizes must be exact in float32.
  TORCH_CHECK(a.rows < INT32_MAX && n_levels * a.points < (1 << 24),
              "ms_deform_attn: too many rows or sampling points");
  for (int64_t l = 0; l < n_levels; ++l) {
    const int64_t h = spatial_shapes[2 * l], w = spatial_shapes[2 * l + 1], start = level_start[l];
    TORCH_CHECK(h >= 0 && w >= 0 && h < (1 << 24) && w < (1 << 24) && start >= 0 && start + h * w <= a.rows,
                "ms_deform_attn: level ", l, " (", h, "x", w, " from row ", start, ") does not fit into the ", a.rows,
                " rows of value");
    a.levels.push_back({start, static_cast<int>(h), static_cast<int>(w)});
  }
  return a;
}

inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Arguments& a) {
  const std::vector<int64_t> expected{a.batch, a.queries, a.heads * a.width};
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(expected) && grad_output.scalar_type() == value.scalar_type() &&
                  grad_output.device() == value.device(),
              "ms_deform_attn: grad_output should be ", at::IntArrayRef(expected), " and of value's type and device");
}

}  // namespace hiervl
