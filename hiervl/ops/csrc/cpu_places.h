// Blocks of places (sampling points) as structures of arrays, so that their arithmetic vectorizes.
// Part of cpu_kernel.cpp: everything here is compiled once for each instruction set.
#pragma once

#include <type_traits>

#include "cpu_kernel.h"
#include "ms_deform_attn.h"
#include "vector.h"

namespace hiervl {
namespace HIERVL_ISA {
namespace {

constexpr int kBlock = 64;  // places of one (query, head) processed at a time

// Data of a block of places. All passes use `row` and `any`. Passes that read value or accumulate
// its gradient also use `weight`; the pass for gradients of locations and weights uses the rest.
template <typename A>
struct alignas(64) Places {
  int row[4][kBlock];   // row of each corner, over all levels
  int any[kBlock];
  A weight[4][kBlock];  // bilinear weight of each corner, times attention
  A attention[kBlock];
  A inside[4][kBlock], x_fraction[kBlock], y_fraction[kBlock];
  A dot[4 * kBlock];    // <output gradient, corner>, four for each place
};

// Number of queries to prefetch ahead. Hardware prefetchers do not predict the stride between queries
// of the same head. Prefetching saves a quarter of the forward pass and half of the backward pass.
constexpr int64_t kAhead = 4;

HIERVL_INLINE int64_t type_size(ScalarType type) {
  return type == ScalarType::kDouble ? 8 : type == ScalarType::kFloat ? 4 : 2;
}

HIERVL_INLINE void prefetch_bytes(const void* data, int64_t first, int64_t count) {
  constexpr int64_t kCacheLine = 64;
  const char* bytes = static_cast<const char*>(data) + first;
  for (int64_t i = 0; i < count + kCacheLine - 1; i += kCacheLine) {
    __builtin_prefetch(bytes + (i < count ? i : count - 1));
  }
}

HIERVL_INLINE void prefetch_places(const CpuProblem& problem, int64_t offset, const void* locations,
                                   const void* weights) {
  const int64_t ahead = offset + kAhead * problem.heads * problem.places;
  const int64_t location = 2 * type_size(problem.location_type), weight = type_size(problem.weight_type);
  prefetch_bytes(locations, ahead * location, problem.places * location);
  prefetch_bytes(weights, ahead * weight, problem.places * weight);
}

// Calls f with the array cast to its element type.
template <typename Pointer, typename F>
HIERVL_INLINE void with_type(ScalarType type, Pointer data, const F& f) {
  constexpr bool kConst = std::is_const_v<std::remove_pointer_t<Pointer>>;
  switch (type) {
    case ScalarType::kFloat: return f(static_cast<std::conditional_t<kConst, const float*, float*>>(data));
    case ScalarType::kDouble: return f(static_cast<std::conditional_t<kConst, const double*, double*>>(data));
    case ScalarType::kHalf: return f(static_cast<std::conditional_t<kConst, const Half*, Half*>>(data));
    default: return f(static_cast<std::conditional_t<kConst, const BFloat16*, BFloat16*>>(data));
  }
}

template <typename A>
struct Geometry {
  // Places processed by one iteration of the vector code.
  static constexpr int kGroup = kVectorBytes / sizeof(A) < 8 ? 8 : kVectorBytes / sizeof(A);
  static_assert(kGroup <= kPlacePadding && kBlock % kGroup == 0, "tables are read, places written in whole vectors");
  using V = Vector<A, kGroup>;
  using Integer = typename Lanes<V>::Integer;

  // Size and first row of the levels of places first, first + 1, ...
  static HIERVL_INLINE Integer table(const int* numbers, int first) {
    return __builtin_convertvector(load<kGroup>(numbers + first), Integer);
  }

  static HIERVL_INLINE void store_integers(Integer v, int* to) {
    const auto narrow_integers = __builtin_convertvector(v, Vector<int32_t, kGroup>);
    memcpy(to, &narrow_integers, sizeof(narrow_integers));
  }

  // Computes the footprints of places [first, first + count) of a (query, head) whose places begin
  // at `offset`. Also stores their weights or, with kGradients, the factors of the weights.
  template <bool kGradients>
  static __attribute__((noinline)) void locate(const CpuProblem& problem, int64_t offset, int first, int count,
                                               Places<A>& p) {
    prefetch_places(problem, offset, problem.locations, problem.weights);
    for (int i = 0; i < count; i += kGroup) {
      const int64_t place = offset + first + i;
      const int left = count - i;
      V x, y, attention;
      with_type(problem.location_type, problem.locations, [&](const auto* locations) {
        const auto* source = locations + 2 * place;
        deinterleave(load_to<A, kGroup>(source, 2 * left), load_to<A, kGroup>(source + kGroup, 2 * left - kGroup), &x,
                     &y);
      });
      with_type(problem.weight_type, problem.weights,
                [&](const auto* weights) { attention = load_to<A, kGroup>(weights + place, left); });
      const Integer start = table(problem.place_start, first + i);
      const Footprint<V> f =
          footprint(x, y, table(problem.place_height, first + i), table(problem.place_width, first + i));
      for (int c = 0; c < 4; ++c) store_integers(start + f.row[c], p.row[c] + i);
      store_integers(f.any, p.any + i);
      if constexpr (kGradients) {
        for (int c = 0; c < 4; ++c) {
          store<kGroup>(f.inside[c], p.inside[c] + i);
          store<kGroup>(V{}, p.dot + 4 * i + c * kGroup);
        }
        store<kGroup>(attention, p.attention + i);
        store<kGroup>(f.x_fraction, p.x_fraction + i);
        store<kGroup>(f.y_fraction, p.y_fraction + i);
      } else {
        V weight[4];
        corner_weights(f, attention, weight);
        for (int c = 0; c < 4; ++c) store<kGroup>(weight[c], p.weight[c] + i);
      }
    }
  }

  // Computes the gradients of each place's location and weight from its four dot products.
  static __attribute__((noinline)) void write_gradients(const CpuProblem& problem, int64_t offset, int first,
                                                        int count, const Places<A>& p) {
    prefetch_places(problem, offset, problem.grad_locations, problem.grad_weights);
    for (int i = 0; i < count; i += kGroup) {
      const int64_t place = offset + first + i;
      const int left = count - i;
      V inside[4], mixed[4], dot[4];
      for (int c = 0; c < 4; ++c) {
        inside[c] = load<kGroup>(p.inside[c] + i);
        mixed[c] = load<kGroup>(p.dot + 4 * i + c * kGroup);
      }
      V even[2], odd[2];  // corners 0 and 2, 1 and 3
      deinterleave(mixed[0], mixed[1], &even[0], &odd[0]);
      deinterleave(mixed[2], mixed[3], &even[1], &odd[1]);
      deinterleave(even[0], even[1], &dot[0], &dot[2]);
      deinterleave(odd[0], odd[1], &dot[1], &dot[3]);
      const PlaceGradient<V> g = place_gradient(
          inside, load<kGroup>(p.x_fraction + i), load<kGroup>(p.y_fraction + i), dot, load<kGroup>(p.attention + i),
          table(problem.place_height, first + i), table(problem.place_width, first + i));
      V a, b;
      interleave(g.x, g.y, &a, &b);
      with_type(problem.location_type, problem.grad_locations, [&](auto* locations) {
        store_to<A, kGroup>(a, locations + 2 * place, 2 * left);
        store_to<A, kGroup>(b, locations + 2 * place + kGroup, 2 * left - kGroup);
      });
      with_type(problem.weight_type, problem.grad_weights,
                [&](auto* weights) { store_to<A, kGroup>(g.attention, weights + place, left); });
    }
  }
};

}  // namespace
}  // namespace HIERVL_ISA
}  // namespace hiervl
