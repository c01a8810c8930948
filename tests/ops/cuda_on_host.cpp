// Compiles the CUDA source for the host, with an entry point for ctypes, and kernels that test the shim.
#include "simt_shim.h"

#include HIERVL_CUDA_SOURCE

namespace {

// Sums data[0..n) in three ways that must agree: shared memory with __syncthreads, shuffles, and atomics.
__global__ void sum_kernel(const int* data, int n, int* by_shared, int* by_shuffle, int* by_atomic) {
  __shared__ int partial[1024];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int value = i < n ? data[i] : 0;
  partial[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) by_shared[blockIdx.x] = partial[0];
  int sum = value;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  sum = __shfl_sync(0xffffffffu, sum, 0);
  if (threadIdx.x % 32 == 31) atomicAdd(by_shuffle, sum);
  atomicAdd(by_atomic, value);
}

// A barrier that thread 0 never reaches.
__global__ void stuck_kernel() {
  if (threadIdx.x > 0) __shfl_xor_sync(0xffffffffu, 1, 1);
}

}  // namespace

extern "C" {

void simt_reset(int reversed) {
  simt::machine().error.clear();
  simt::machine().reversed = reversed != 0;
}

const char* simt_error() { return simt::machine().error.c_str(); }

void simt_sum(const int* data, int n, int blocks, int threads, int* by_shared, int* by_shuffle, int* by_atomic) {
  HIERVL_LAUNCH((sum_kernel), blocks, threads, nullptr, data, n, by_shared, by_shuffle, by_atomic);
}

void simt_stuck() { HIERVL_LAUNCH((stuck_kernel), 1, 32, nullptr); }

// sizes: batch, rows, heads, width, queries, points, levels, then start, h, w of each level.
// types: element types of value, locations and weights. arrays: in the order of CudaProblem.
const char* run(int backward, const int64_t* sizes, const int* types, void** arrays, int threads) {
  hiervl::CudaProblem p{};
  p.batch = sizes[0], p.rows = sizes[1], p.heads = sizes[2], p.width = sizes[3], p.queries = sizes[4];
  p.points = static_cast<int>(sizes[5]), p.n_levels = static_cast<int>(sizes[6]);
  for (int l = 0; l < p.n_levels; ++l) {
    const int64_t* level = sizes + 7 + 3 * l;
    p.levels[l] = {level[0], static_cast<int>(level[1]), static_cast<int>(level[2])};
  }
  p.value_type = static_cast<hiervl::ScalarType>(types[0]);
  p.location_type = static_cast<hiervl::ScalarType>(types[1]);
  p.weight_type = static_cast<hiervl::ScalarType>(types[2]);
  p.value = arrays[0], p.locations = arrays[1], p.weights = arrays[2], p.output = arrays[3];
  p.grad_output = arrays[4], p.grad_value = arrays[5], p.grad_locations = arrays[6], p.grad_weights = arrays[7];
  return (backward ? hiervl::cuda_backward : hiervl::cuda_forward)(p, threads, nullptr);
}
}
