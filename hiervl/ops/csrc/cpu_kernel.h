// Interface of the CPU kernel to the torch binding: plain pointers and ranges, no torch types.
#pragma once

#include <stdint.h>

#include "scalar_types.h"

namespace hiervl {

// Arguments of one call of the operator. All arrays are contiguous.
struct CpuProblem {
  int64_t batch, rows, heads, width, queries;
  int places;               // L * P sampling points
  const int* place_height;  // size and first row of each place's level; length places + kPlacePadding
  const int* place_width;
  const int* place_start;
  ScalarType location_type, weight_type;
  const void* value;        // (batch, rows, heads, width)
  const void* locations;    // (batch, queries, heads, places, 2)
  const void* weights;      // (batch, queries, heads, places)
  void* output;             // (batch, queries, heads, width)
  const void* grad_output;  // like output
  void* grad_value;         // like value
  void* grad_locations;     // like locations
  void* grad_weights;       // like weights
};

// The place tables must be readable this many entries past their end, because whole vectors are loaded.
constexpr int kPlacePadding = 64;

// The kernel compiled for one instruction set and one element type of value and output. Scratch
// memory has the accumulation type: double for double, float for all others.
struct CpuKernel {
  // Output of items [begin, end) of batch * heads * queries, with queries innermost. If scratch is
  // not null, it has rows * width elements, and the rows of a head are first packed into it. In
  // `value` they are typically a power of two apart and would use only a fraction of the cache sets.
  void (*forward)(const CpuProblem&, int64_t begin, int64_t end, void* scratch);
  // Gradients of locations and weights for the same items.
  void (*backward_places)(const CpuProblem&, int64_t begin, int64_t end, void* scratch);
  // Gradient of channels [first, last) of value for one of batch * heads. The scratch memory of
  // rows * (last - first) elements holds the sums.
  void (*backward_value)(const CpuProblem&, int64_t head, int64_t first, int64_t last, void* scratch);
};

// Each is defined in one object file. The names match HIERVL_ISA in the build.
namespace baseline {
CpuKernel cpu_kernel(ScalarType type);
}
namespace avx2 {
CpuKernel cpu_kernel(ScalarType type);
}
namespace avx512 {
CpuKernel cpu_kernel(ScalarType type);
}

}  // namespace hiervl
