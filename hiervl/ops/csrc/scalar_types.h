// The element types, with 16-bit floats that need neither torch nor CUDA on the host.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// On the host, every function below is always inlined. The CPU kernel is compiled once for each
// instruction set, and the linker could keep an out-of-line copy that needs a newer one.
#if defined(__CUDACC__)
#define HIERVL_INLINE __host__ __device__ __forceinline__
#else
#define HIERVL_INLINE inline __attribute__((always_inline))
#endif

namespace hiervl {

enum class ScalarType : int { kFloat, kDouble, kHalf, kBFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The accumulation type: at least float.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

HIERVL_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

HIERVL_INLINE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

HIERVL_INLINE float widen(float x) { return x; }
HIERVL_INLINE double widen(double x) { return x; }
HIERVL_INLINE float widen(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

HIERVL_INLINE float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // In float's bit layout, the exponent is too small by 112. Scaling corrects this, also for subnormals.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const bool finite = magnitude < (0x7c00u << 13);
  const float scaled = bits_float(magnitude) * 0x1p112f;
  const uint32_t result = finite ? float_bits(scaled) : magnitude | 0x7f800000u;
  return bits_float(result | sign);
#endif
}

HIERVL_INLINE void narrow(float x, float* out) { *out = x; }
HIERVL_INLINE void narrow(double x, double* out) { *out = x; }

// Round to nearest, ties to even, as torch does.
HIERVL_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

HIERVL_INLINE void narrow(float x, Half* out) {
#if defined(__CUDA_ARCH__)
  out->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the last bit of half with the last bit of float's significand.
    result = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
#endif
}

// Element i of an array whose type is known only at run time. Sampling locations and weights may be
// float32 while value has 16 bits (autocast), and another template parameter would triple the number
// of kernels. The branch is predictable, because it is the same for every element.
template <typename A>
HIERVL_INLINE A load_as(const void* data, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::kFloat:
      return static_cast<A>(static_cast<const float*>(data)[i]);
    case ScalarType::kDouble:
      return static_cast<A>(static_cast<const double*>(data)[i]);
    case ScalarType::kHalf:
      return static_cast<A>(widen(static_cast<const Half*>(data)[i]));
    default:
      return static_cast<A>(widen(static_cast<const BFloat16*>(data)[i]));
  }
}

template <typename A>
HIERVL_INLINE void store_as(A x, void* data, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::kFloat:
      static_cast<float*>(data)[i] = static_cast<float>(x);
      break;
    case ScalarType::kDouble:
      static_cast<double*>(data)[i] = static_cast<double>(x);
      break;
    case ScalarType::kHalf:
      narrow(static_cast<float>(x), static_cast<Half*>(data) + i);
      break;
    default:
      narrow(static_cast<float>(x), static_cast<BFloat16*>(data) + i);
  }
}

}  // namespace hiervl
