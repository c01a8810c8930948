// What the CPU kernel offers to the torch binding: plain pointers and ranges, no torch types.
#pragma once

#include <stdint.h>

#include "scalar_types.h"

namespace hiervl {

// One call of the operator. All arrays are contiguous.
struct CpuProblem {
  int64_t batch, rows, heads, width, queries;
  int places;               // L * P
  const int* place_height;  // size and first row of the level of each place, places + padding long
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

// The place tables must be readable this many entries past their end: whole vectors are loaded.
constexpr int kPlacePadding = 64;

// The kernel compiled for one instruction set and one element type of value and output. Scratch is
// in the type sums are kept in: float, or double for double.
struct CpuKernel {
  // Output of items [begin, end) of batch * heads * queries, queries innermost. With a scratch of
  // rows * width the rows of a head are first packed there: in `value` they are a power of two
  // apart, which leaves the caches a fraction of their sets. Null: value is read in place.
  void (*forward)(const CpuProblem&, int64_t begin, int64_t end, void* scratch);
  // Gradients to locations and weights of the same items.
  void (*backward_places)(const CpuProblem&, int64_t begin, int64_t end, void* scratch);
  // Gradient to channels [first, last) of value for one of batch * heads; the scratch of
  // rows * (last - first) holds the sums.
  void (*backward_value)(const CpuProblem&, int64_t head, int64_t first, int64_t last, void* scratch);
};

// One per object file; the names match the build's HIERVL_ISA.
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
