// The arithmetic of multi-scale deformable attention for one place, which is what the kernels call a
// sampling point. The CPU kernel, the CUDA kernel and its host build in the tests all use it.
#pragma once

#include "scalar_types.h"

namespace hiervl {

// One level of the pyramid: h*w rows of `value`, the first at `start`.
struct Level {
  int64_t start;
  int h;
  int w;
};

// Operations of a number type that the arithmetic below needs. Here, A is float or double, for one
// place at a time. vector.h adds vectors, with which the CPU kernel processes 8 or 16 places at once.
template <typename A>
struct Lanes {
  using Real = A;
  using Integer = int;
  using Mask = bool;
  static HIERVL_INLINE Integer truncate(A x) { return static_cast<int>(x); }
  static HIERVL_INLINE A real(Integer i) { return static_cast<A>(i); }
  template <typename T>
  static HIERVL_INLINE T select(Mask mask, T yes, T no) {
    return mask ? yes : no;
  }
};

// The four pixels around a place. Corner 0 is (y0, x0), 1 is (y0, x1), 2 is (y1, x0), 3 is (y1, x1).
template <typename A>
struct Footprint {
  typename Lanes<A>::Integer row[4];  // y * w + x; corners outside are clamped to the level
  A inside[4];                        // 1, or 0 for a corner outside the level
  A x_fraction;                       // position between x0 and x1
  A y_fraction;
  typename Lanes<A>::Mask any;  // false if all corners are outside; row[] must not be used then
};

// Footprint of location (x, y) in [0, 1] in a level of h*w pixels, with centers at (i + 0.5) / size.
template <typename A, typename Integer>
HIERVL_INLINE Footprint<A> footprint(A x, A y, Integer h, Integer w) {
  using L = Lanes<A>;
  using Real = typename L::Real;
  const A zero{}, one = zero + Real(1);
  const A height = L::real(h), width = L::real(w);
  const A column = x * width - Real(0.5), line = y * height - Real(0.5);
  Footprint<A> f;
  // Also false for NaN. Locations that fail this test must not be converted to integers. At exactly
  // -1, the sample is 0 but its derivative is not, as in grid_sample. An empty level has no rows.
  f.any = (column >= Real(-1)) & (column < width) & (line >= Real(-1)) & (line < height) & (h > 0) & (w > 0);
  const A safe_column = L::select(f.any, column, zero), safe_line = L::select(f.any, line, zero);
  // Round down; the conversion to an integer rounds toward zero.
  const Integer x_zero = L::truncate(safe_column), y_zero = L::truncate(safe_line);
  const Integer x0 = L::select(safe_column < L::real(x_zero), x_zero - 1, x_zero);
  const Integer y0 = L::select(safe_line < L::real(y_zero), y_zero - 1, y_zero);
  f.x_fraction = safe_column - L::real(x0);
  f.y_fraction = safe_line - L::real(y0);
  const auto left_in = (x0 >= 0) & f.any, right_in = (x0 + 1 < w) & f.any;
  const auto top_in = y0 >= 0, bottom_in = y0 + 1 < h;
  f.inside[0] = L::select(top_in & left_in, one, zero);
  f.inside[1] = L::select(top_in & right_in, one, zero);
  f.inside[2] = L::select(bottom_in & left_in, one, zero);
  f.inside[3] = L::select(bottom_in & right_in, one, zero);
  const Integer x_low = L::select(x0 >= 0, x0, x0 + 1), x_high = L::select(x0 + 1 < w, x0 + 1, x0);
  const Integer y_low = L::select(y0 >= 0, y0, y0 + 1), y_high = L::select(y0 + 1 < h, y0 + 1, y0);
  f.row[0] = y_low * w + x_low;
  f.row[1] = y_low * w + x_high;
  f.row[2] = y_high * w + x_low;
  f.row[3] = y_high * w + x_high;
  return f;
}

// Bilinear weight of each corner, times `scale`.
template <typename A>
HIERVL_INLINE void corner_weights(const Footprint<A>& f, A scale, A weight[4]) {
  using Real = typename Lanes<A>::Real;
  const A x1 = f.x_fraction, x0 = Real(1) - x1;
  const A y1 = f.y_fraction, y0 = Real(1) - y1;
  weight[0] = y0 * x0 * f.inside[0] * scale;
  weight[1] = y0 * x1 * f.inside[1] * scale;
  weight[2] = y1 * x0 * f.inside[2] * scale;
  weight[3] = y1 * x1 * f.inside[3] * scale;
}

template <typename A>
struct PlaceGradient {
  A x;          // of the location, in units of [0, 1]
  A y;
  A attention;  // of the attention weight
};

// Gradients of a place, given dot[c] = <output gradient, corner c>, its attention weight and the size
// of its level. `inside`, `x_fraction` and `y_fraction` are those of its footprint.
template <typename A, typename Integer>
HIERVL_INLINE PlaceGradient<A> place_gradient(const A inside[4], A x_fraction, A y_fraction, const A dot[4],
                                              A attention, Integer h, Integer w) {
  using L = Lanes<A>;
  using Real = typename L::Real;
  const A x1 = x_fraction, x0 = Real(1) - x1;
  const A y1 = y_fraction, y0 = Real(1) - y1;
  const A d0 = dot[0] * inside[0], d1 = dot[1] * inside[1];
  const A d2 = dot[2] * inside[2], d3 = dot[3] * inside[3];
  PlaceGradient<A> g;
  g.attention = y0 * (x0 * d0 + x1 * d1) + y1 * (x0 * d2 + x1 * d3);
  g.x = attention * L::real(w) * (y0 * (d1 - d0) + y1 * (d3 - d2));
  g.y = attention * L::real(h) * (x0 * (d2 - d0) + x1 * (d3 - d1));
  return g;
}

}  // namespace hiervl
