// Blocks of sampled places as arrays, so that the arithmetic on them becomes vector code. Part of
// cpu_kernel.cpp: everything here is compiled once for each instruction set.
#pragma once

#include <type_traits>

#include "cpu_kernel.h"
#include "ms_deform_attn.h"
#include "vector.h"

namespace hiervl {
namespace HIERVL_ISA {
namespace {

constexpr int kBlock = 64;  // places of one (query, head) handled at a time
constexpr int kGroup = 8;   // of which one turn of the vector code handles these
static_assert(kGroup <= kPlacePadding, "the place tables are read in whole vectors");

template <typename A>
struct alignas(64) Places {
  A attention[kBlock];
  A inside[4][kBlock], x_fraction[kBlock], y_fraction[kBlock];
  A weight[4][kBlock];  // of each corner, times attention
  A dot[4][kBlock];     // backward: <output gradient, corner>
  int row[4][kBlock];   // of value, over all levels
  int any[kBlock];
};

// Call f(i) for groups of places that cover [0, count). The last group overlaps the one before it
// rather than ending past `count`: the same numbers are written twice. Needs count >= kGroup.
template <typename F>
HIERVL_INLINE void for_groups(int count, const F& f) {
  for (int done = 0; done < count; done += kGroup) f(done + kGroup <= count ? done : count - kGroup);
}

// From a query to the next of the same head is a stride that the processor does not foresee, so what
// the query this many turns later needs is fetched early. Halves the time of the backward pass.
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

// Call f with the array cast to its element type.
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
  using V = Vector<A, kGroup>;
  using Integer = typename Lanes<V>::Integer;

  // Size and first row of the levels of places first, first + 1, ...
  static HIERVL_INLINE Integer table(const int* numbers, int first) {
    return __builtin_convertvector(load<kGroup>(numbers + first), Integer);
  }

  // Footprints of a group whose first place is `first` of its (query, head), written from index i on.
  static HIERVL_INLINE void locate_group(const CpuProblem& problem, V x, V y, V attention, int first, int i,
                                         Places<A>& p) {
    const Integer start = table(problem.place_start, first);
    const Footprint<V> f = footprint(x, y, table(problem.place_height, first), table(problem.place_width, first));
    V weight[4];
    corner_weights(f, attention, weight);
    for (int c = 0; c < 4; ++c) {
      store_integers(start + f.row[c], p.row[c] + i);
      store<kGroup>(f.inside[c], p.inside[c] + i);
      store<kGroup>(weight[c], p.weight[c] + i);
    }
    store<kGroup>(attention, p.attention + i);
    store<kGroup>(f.x_fraction, p.x_fraction + i);
    store<kGroup>(f.y_fraction, p.y_fraction + i);
    store_integers(f.any, p.any + i);
  }

  static HIERVL_INLINE void store_integers(Integer v, int* to) {
    const auto narrow_integers = __builtin_convertvector(v, Vector<int32_t, kGroup>);
    memcpy(to, &narrow_integers, sizeof(narrow_integers));
  }

  // Read places [first, first + count) of a (query, head) whose places begin at `offset`, and find
  // their footprints.
  static __attribute__((noinline)) void locate(const CpuProblem& problem, int64_t offset, int first, int count,
                                               Places<A>& p) {
    prefetch_places(problem, offset, problem.locations, problem.weights);
    if (count < kGroup) return locate_few(problem, offset, first, count, p);
    for_groups(count, [&](int i) {
      const int64_t place = offset + first + i;
      V x, y, attention;
      with_type(problem.location_type, problem.locations, [&](const auto* locations) {
        const auto* source = locations + 2 * place;
        deinterleave(load_to<A, kGroup>(source), load_to<A, kGroup>(source + kGroup), &x, &y);
      });
      with_type(problem.weight_type, problem.weights,
                [&](const auto* weights) { attention = load_to<A, kGroup>(weights + place); });
      locate_group(problem, x, y, attention, first + i, i, p);
    });
  }

  // Fewer than a group: the rest of the vectors is zero, and not used.
  static void locate_few(const CpuProblem& problem, int64_t offset, int first, int count, Places<A>& p) {
    A x[kGroup] = {}, y[kGroup] = {}, attention[kGroup] = {};
    for (int i = 0; i < count; ++i) {
      const int64_t place = offset + first + i;
      x[i] = load_as<A>(problem.locations, problem.location_type, 2 * place);
      y[i] = load_as<A>(problem.locations, problem.location_type, 2 * place + 1);
      attention[i] = load_as<A>(problem.weights, problem.weight_type, place);
    }
    locate_group(problem, load<kGroup>(x), load<kGroup>(y), load<kGroup>(attention), first, 0, p);
  }

  static HIERVL_INLINE PlaceGradient<V> gradient_group(const CpuProblem& problem, const Places<A>& p, int first, int i) {
    V inside[4], dot[4];
    for (int c = 0; c < 4; ++c) {
      inside[c] = load<kGroup>(p.inside[c] + i);
      dot[c] = load<kGroup>(p.dot[c] + i);
    }
    return place_gradient(inside, load<kGroup>(p.x_fraction + i), load<kGroup>(p.y_fraction + i), dot,
                          load<kGroup>(p.attention + i), table(problem.place_height, first + i),
                          table(problem.place_width, first + i));
  }

  // From the four dot products of each place to the gradients of its location and weight.
  static __attribute__((noinline)) void write_gradients(const CpuProblem& problem, int64_t offset, int first,
                                                        int count, const Places<A>& p) {
    prefetch_places(problem, offset, problem.grad_locations, problem.grad_weights);
    if (count < kGroup) return write_few_gradients(problem, offset, first, count, p);
    for_groups(count, [&](int i) {
      const int64_t place = offset + first + i;
      const PlaceGradient<V> g = gradient_group(problem, p, first, i);
      V a, b;
      interleave(g.x, g.y, &a, &b);
      with_type(problem.location_type, problem.grad_locations, [&](auto* locations) {
        store_to<A, kGroup>(a, locations + 2 * place);
        store_to<A, kGroup>(b, locations + 2 * place + kGroup);
      });
      with_type(problem.weight_type, problem.grad_weights,
                [&](auto* weights) { store_to<A, kGroup>(g.attention, weights + place); });
    });
  }

  static void write_few_gradients(const CpuProblem& problem, int64_t offset, int first, int count,
                                  const Places<A>& p) {
    const PlaceGradient<V> g = gradient_group(problem, p, first, 0);
    for (int i = 0; i < count; ++i) {
      const int64_t place = offset + first + i;
      store_as<A>(g.x[i], problem.grad_locations, problem.location_type, 2 * place);
      store_as<A>(g.y[i], problem.grad_locations, problem.location_type, 2 * place + 1);
      store_as<A>(g.attention[i], problem.grad_weights, problem.weight_type, place);
    }
  }
};

}  // namespace
}  // namespace HIERVL_ISA
}  // namespace hiervl
