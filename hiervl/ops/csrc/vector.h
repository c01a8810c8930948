// Fixed-width vectors on the compiler's vector extension: the same source becomes SSE, AVX2,
// AVX-512 or NEON. Everything is inlined (see HIERVL_INLINE).
#pragma once

#include "ms_deform_attn.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace hiervl {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;  // two registers each where the machine's are 16 bytes
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

// narrow(float, BFloat16*) on all lanes.
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

// N elements of any type as a vector of A.
template <typename A, int N, typename T>
HIERVL_INLINE Vector<A, N> load_to(const T* p) {
  return __builtin_convertvector(load<N>(p), Vector<A, N>);
}

template <int N>
HIERVL_INLINE Vector<int32_t, N> load(const int32_t* p) {
  Vector<int32_t, N> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// A vector of A as N elements of any type.
template <typename A, int N, typename T>
HIERVL_INLINE void store_to(Vector<A, N> v, T* p) {
  using Wide = decltype(widen(*p));
  store<N>(__builtin_convertvector(v, Vector<Wide, N>), p);
}

// Eight places at once in ms_deform_attn.h. Integers are as wide as the reals, as masks are.
template <typename A, typename I>
struct VectorLanes {
  using Real = A;
  using Integer = Vector<I, 8>;
  using Mask = Integer;
  static HIERVL_INLINE Integer truncate(Vector<A, 8> x) { return __builtin_convertvector(x, Integer); }
  static HIERVL_INLINE Vector<A, 8> real(Integer i) { return __builtin_convertvector(i, Vector<A, 8>); }
  template <typename T>
  static HIERVL_INLINE T select(Mask mask, T yes, T no) {
    return mask ? yes : no;
  }
};
template <>
struct Lanes<Vector<float, 8>> : VectorLanes<float, int32_t> {};
template <>
struct Lanes<Vector<double, 8>> : VectorLanes<double, int64_t> {};

template <typename V>
HIERVL_INLINE V shuffle(V a, V b, const typename Lanes<V>::Integer& index) {
#if defined(__clang__)
  V result;
  for (int i = 0; i < 8; ++i) result[i] = index[i] < 8 ? a[index[i]] : b[index[i] - 8];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// (x0, y0, x1, y1, ...) in two vectors to (x0, x1, ...) and (y0, y1, ...), and back.
template <typename V>
HIERVL_INLINE void deinterleave(V a, V b, V* x, V* y) {
  using Index = typename Lanes<V>::Integer;
  *x = shuffle(a, b, Index{0, 2, 4, 6, 8, 10, 12, 14});
  *y = shuffle(a, b, Index{1, 3, 5, 7, 9, 11, 13, 15});
}

template <typename V>
HIERVL_INLINE void interleave(V x, V y, V* a, V* b) {
  using Index = typename Lanes<V>::Integer;
  *a = shuffle(x, y, Index{0, 8, 1, 9, 2, 10, 3, 11});
  *b = shuffle(x, y, Index{4, 12, 5, 13, 6, 14, 7, 15});
}

// The sum of each of four vectors, in out[0..3].
template <typename A, int N>
HIERVL_INLINE void horizontal_sums(const Vector<A, N> v[4], A out[4]) {
  if constexpr (N > 4) {
    Vector<A, N / 2> folded[4];
    for (int c = 0; c < 4; ++c) {
      Vector<A, N / 2> low, high;
      memcpy(&low, &v[c], sizeof(low));
      memcpy(&high, reinterpret_cast<const char*>(&v[c]) + sizeof(low), sizeof(high));
      folded[c] = low + high;
    }
    horizontal_sums<A, N / 2>(folded, out);
  } else {
    for (int c = 0; c < 4; ++c) {
      out[c] = v[c][0];
      for (int i = 1; i < N; ++i) out[c] += v[c][i];
    }
  }
}

}  // namespace hiervl
