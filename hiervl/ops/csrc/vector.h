// Fixed-width vectors, based on the compiler's vector extension: the same source compiles to SSE,
// AVX2, AVX-512 or NEON. Everything is inlined (see HIERVL_INLINE).
#pragma once

#include <stddef.h>

#include <type_traits>
#include <utility>

#include "ms_deform_attn.h"

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hiervl {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;  // uses two registers where registers have 16 bytes
#endif

template <typename A, int N>
struct VectorOf {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <typename A, int N>
using Vector = typename VectorOf<A, N>::type;

template <int N>
HIERVL_INLINE Vector<float, N> load(const float* p) {
  Vector<float, N> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <int N>
HIERVL_INLINE Vector<double, N> load(const double* p) {
  Vector<double, N> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <int N>
HIERVL_INLINE Vector<float, N> load(const BFloat16* p) {
  Vector<uint16_t, N> narrow_bits;
  memcpy(&narrow_bits, p, sizeof(narrow_bits));
  const Vector<uint32_t, N> bits = __builtin_convertvector(narrow_bits, Vector<uint32_t, N>) << 16;
  Vector<float, N> v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

template <int N>
HIERVL_INLINE Vector<float, N> load(const Half* p) {
  Vector<float, N> v;
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    memcpy(&v, &wide, sizeof(v));
    return v;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    memcpy(&v, &wide, sizeof(v));
    return v;
  }
#endif
  for (int i = 0; i < N; ++i) v[i] = widen(p[i]);
  return v;
}

template <int N>
HIERVL_INLINE void store(Vector<float, N> v, float* p) {
  memcpy(p, &v, sizeof(v));
}

template <int N>
HIERVL_INLINE void store(Vector<double, N> v, double* p) {
  memcpy(p, &v, sizeof(v));
}

// narrow(float, BFloat16*) for all lanes.
template <int N>
HIERVL_INLINE void store(Vector<float, N> v, BFloat16* p) {
  using Bits = Vector<uint32_t, N>;
  Bits bits;
  memcpy(&bits, &v, sizeof(bits));
  const Bits nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto narrow_bits = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Vector<uint16_t, N>);
  memcpy(p, &narrow_bits, sizeof(narrow_bits));
}

template <int N>
HIERVL_INLINE void store(Vector<float, N> v, Half* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    __m512 wide;
    memcpy(&wide, &v, sizeof(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    __m256 wide;
    memcpy(&wide, &v, sizeof(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  for (int i = 0; i < N; ++i) narrow(v[i], p + i);
}

// Load the first `count` of N elements, followed by zeros, and store them. Nothing past `count` is accessed.
template <int N, typename T>
HIERVL_INLINE auto load_first(const T* p, int count) {
  using Wide = decltype(widen(*p));
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && N == 16) {
    return (Vector<float, N>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
  }
  if constexpr (std::is_same_v<T, double> && N == 8) {
    return (Vector<double, N>)_mm512_maskz_loadu_pd((1u << count) - 1, p);
  }
#endif
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float> && N == 8) {
    return (Vector<float, N>)_mm256_maskload_ps(p, (__m256i)(Vector<int32_t, N>{0, 1, 2, 3, 4, 5, 6, 7} < count));
  }
#endif
  Wide first[N] = {};
  for (int i = 0; i < count; ++i) first[i] = widen(p[i]);
  return load<N>(first);
}

template <int N, typename T>
HIERVL_INLINE void store_first(Vector<decltype(widen(T{})), N> v, T* p, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && N == 16) {
    return _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
  }
  if constexpr (std::is_same_v<T, double> && N == 8) {
    return _mm512_mask_storeu_pd(p, (1u << count) - 1, (__m512d)v);
  }
#endif
  for (int i = 0; i < count; ++i) narrow(v[i], p + i);
}

// Loads the first `count` of N elements of any type as a vector of A. `count` is clamped to [0, N].
template <typename A, int N, typename T>
HIERVL_INLINE Vector<A, N> load_to(const T* p, int count) {
  return __builtin_convertvector(count < N ? load_first<N>(p, count < 0 ? 0 : count) : load<N>(p), Vector<A, N>);
}

template <int N>
HIERVL_INLINE Vector<int32_t, N> load(const int32_t* p) {
  Vector<int32_t, N> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// Stores the first `count` lanes of a vector of A as elements of any type. `count` is clamped to [0, N].
template <typename A, int N, typename T>
HIERVL_INLINE void store_to(Vector<A, N> v, T* p, int count) {
  const auto wide = __builtin_convertvector(v, Vector<decltype(widen(*p)), N>);
  if (count < N) return store_first<N>(wide, p, count < 0 ? 0 : count);
  store<N>(wide, p);
}

// Lanes for processing several places at once. Integers and masks have the same width as the reals.
template <typename A, typename I, int N>
struct VectorLanes {
  using Real = A;
  using Integer = Vector<I, N>;
  using Mask = Integer;
  static HIERVL_INLINE Integer truncate(Vector<A, N> x) { return __builtin_convertvector(x, Integer); }
  static HIERVL_INLINE Vector<A, N> real(Integer i) { return __builtin_convertvector(i, Vector<A, N>); }
  template <typename T>
  static HIERVL_INLINE T select(Mask mask, T yes, T no) {
    return mask ? yes : no;
  }
};
template <>
struct Lanes<Vector<float, 8>> : VectorLanes<float, int32_t, 8> {};
template <>
struct Lanes<Vector<float, 16>> : VectorLanes<float, int32_t, 16> {};
template <>
struct Lanes<Vector<double, 8>> : VectorLanes<double, int64_t, 8> {};

template <typename V>
HIERVL_INLINE V shuffle(V a, V b, decltype(a == b) index) {
#if defined(__clang__)
  constexpr int kLanes = sizeof(a) / sizeof(a[0]);
  V result;
  for (int i = 0; i < kLanes; ++i) result[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// The vector (0, 1, 2, ...).
template <typename V>
HIERVL_INLINE typename Lanes<V>::Integer lane_numbers() {
  typename Lanes<V>::Integer number{};
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(number[0])); ++i) number[i] = i;
  return number;
}

// Splits (x0, y0, x1, y1, ...) in two vectors into (x0, x1, ...) and (y0, y1, ...), and the inverse.
template <typename V>
HIERVL_INLINE void deinterleave(V a, V b, V* x, V* y) {
  const auto lane = lane_numbers<V>();
  *x = shuffle(a, b, 2 * lane);
  *y = shuffle(a, b, 2 * lane + 1);
}

template <typename V>
HIERVL_INLINE void interleave(V x, V y, V* a, V* b) {
  constexpr int kLanes = sizeof(x) / sizeof(x[0]);
  const auto lane = lane_numbers<V>();
  const auto from = (lane >> 1) + (lane & 1) * kLanes;
  *a = shuffle(x, y, from);
  *b = shuffle(x, y, from + kLanes / 2);
}

// The lower half of a vector (lanes kLane...) or the upper half. Going through memory instead would
// spill the vector to the stack.
template <bool kUpper, typename V, size_t... kLane>
HIERVL_INLINE auto half_of(V v, std::index_sequence<kLane...>) {
  constexpr size_t first = kUpper ? sizeof...(kLane) : 0;
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(v, v, (first + kLane)...);
#else
  using A = std::remove_reference_t<decltype(v[0])>;
  return Vector<A, sizeof...(kLane)>{v[first + kLane]...};
#endif
}

// The sum of the lower and the upper half of a vector.
template <typename A, int N>
HIERVL_INLINE Vector<A, N / 2> folded(Vector<A, N> v) {
  const auto lanes = std::make_index_sequence<N / 2>{};
  return half_of<false>(v, lanes) + half_of<true>(v, lanes);
}

// For each group of four lanes, takes two lanes from `first` on of a and of b: first those of a, then those
// of b; or alternating if `in_turn`.
template <typename A, int N>
HIERVL_INLINE Vector<A, N> pairs(Vector<A, N> a, Vector<A, N> b, int first, bool in_turn) {
  decltype(a == b) index{};
  for (int i = 0; i < N; ++i) {
    const int place = i % 4, lane = in_turn ? place / 2 : place % 2, of_b = in_turn ? place % 2 : place / 2;
    index[i] = i - place + first + lane + of_b * N;
  }
  return shuffle(a, b, index);
}

// The sums over the lanes of four vectors.
template <typename A, int N>
HIERVL_INLINE Vector<A, 4> horizontal_sums(const Vector<A, N> v[4]) {
  if constexpr (N < 4) {
    Vector<A, 4> sums{};
    for (int c = 0; c < 4; ++c) {
      for (int i = 0; i < N; ++i) sums[c] += v[c][i];
    }
    return sums;
  } else {
    // Each group of four lanes gets partial sums of v0, v1, v2 and v3.
    const auto low = pairs<A, N>(v[0], v[1], 0, true) + pairs<A, N>(v[0], v[1], 2, true);
    const auto high = pairs<A, N>(v[2], v[3], 0, true) + pairs<A, N>(v[2], v[3], 2, true);
    const auto parts = pairs<A, N>(low, high, 0, false) + pairs<A, N>(low, high, 2, false);
    if constexpr (N == 16) {
      return folded<A, 8>(folded<A, 16>(parts));
    } else if constexpr (N == 8) {
      return folded<A, 8>(parts);
    } else {
      return parts;
    }
  }
}

}  // namespace hiervl
