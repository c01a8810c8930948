// Interface of the CUDA kernels to the torch binding: plain pointers, no torch types.
#pragma once

#include "ms_deform_attn.h"

namespace hiervl {

constexpr int kMaxLevels = 64;  // levels are a kernel argument, which avoids a copy and a synchronization

// Arguments of one call of the operator. All arrays are contiguous and on the device.
struct CudaProblem {
  int64_t batch, rows, heads, width, queries;
  int points;    // P
  int n_levels;  // L
  Level levels[kMaxLevels];
  ScalarType value_type, location_type, weight_type;
  const void* value;        // (batch, rows, heads, width)
  const void* locations;    // (batch, queries, heads, L, P, 2)
  const void* weights;      // (batch, queries, heads, L, P)
  void* output;             // (batch, queries, heads, width)
  const void* grad_output;  // like output
  void* grad_value;         // like value, but of the accumulation type; must be zero-initialized
  void* grad_locations;     // like locations
  void* grad_weights;       // like weights
};

// Launch on `stream` (a cudaStream_t) with blocks of `threads` threads, a multiple of 32. Return null,
// or the error message.
const char* cuda_forward(const CudaProblem& problem, int threads, void* stream);
const char* cuda_backward(const CudaProblem& problem, int threads, void* stream);

}  // namespace hiervl
