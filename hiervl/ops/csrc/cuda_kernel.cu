// The CUDA kernels. No torch headers are included, so the file compiles in seconds and the tests can
// compile it for the host, where HIERVL_LAUNCH runs a kernel on fibers.
#include "cuda_kernel.h"

#if !defined(HIERVL_LAUNCH)
#include <cuda_runtime.h>
#define HIERVL_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace hiervl {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxBlocks = 1 << 20;  // grid-stride loops process the remaining work

// Offsets into the arrays for one of batch * queries * heads.
struct Item {
  int64_t value;   // element of channel 0 of row 0 of this image and head, in value
  int64_t output;  // element of channel 0, in output
  int64_t place;   // first place, in weights
};

HIERVL_INLINE Item item_at(const CudaProblem& p, int64_t slot) {
  const int64_t head = slot % p.heads, image = slot / p.heads / p.queries;
  const int64_t places = static_cast<int64_t>(p.n_levels) * p.points;
  return {(image * p.rows * p.heads + head) * p.width, slot * p.width, slot * places};
}

template <typename A>
struct Place {
  Footprint<A> footprint;
  A attention;
};

template <typename A>
HIERVL_INLINE Place<A> read_place(const CudaProblem& p, const Level& level, int64_t place) {
  const A x = load_as<A>(p.locations, p.location_type, 2 * place);
  const A y = load_as<A>(p.locations, p.location_type, 2 * place + 1);
  return {footprint(x, y, level.h, level.w), load_as<A>(p.weights, p.weight_type, place)};
}

// N adjacent channels, loaded or stored by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T item[N];
};

// Each thread computes N channels of one (image, query, head).
template <typename T, int N>
__global__ void forward_kernel(CudaProblem p) {
  using A = typename Accumulate<T>::type;
  const int64_t pieces = p.width / N, total = p.batch * p.queries * p.heads * pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, stride = p.heads * p.width;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const Item item = item_at(p, i / pieces);
    const int64_t channel = i % pieces * N;
    const T* value = static_cast<const T*>(p.value) + item.value + channel;
    A sum[N] = {};
    int64_t place_index = item.place;
    for (int l = 0; l < p.n_levels; ++l) {
      const Level level = p.levels[l];
      for (int point = 0; point < p.points; ++point, ++place_index) {
        const Place<A> place = read_place<A>(p, level, place_index);
        if (!place.footprint.any) continue;
        A weight[4];
        corner_weights(place.footprint, place.attention, weight);
        for (int c = 0; c < 4; ++c) {
          const T* row = value + (level.start + place.footprint.row[c]) * stride;
          const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(row);
          for (int n = 0; n < N; ++n) sum[n] += weight[c] * static_cast<A>(widen(pack.item[n]));
        }
      }
    }
    Pack<T, N> result;
    for (int n = 0; n < N; ++n) narrow(sum[n], &result.item[n]);
    *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(p.output) + item.output + channel) = result;
  }
}

// The sum of x over the lanes of a group, in each of these lanes. A group is a power of two of adjacent lanes.
template <typename A>
__device__ A group_sum(A x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Each group of lanes processes one (image, query, head), with its channels distributed over the lanes.
// The gradients of a place have one writer. Those of value are summed with atomics, so their last bits
// depend on the order of the threads.
template <typename T>
__global__ void backward_kernel(CudaProblem p, int group) {
  using A = typename Accumulate<T>::type;
  const int lane = threadIdx.x % group, groups_per_block = blockDim.x / group;
  const int64_t total = p.batch * p.queries * p.heads, stride = p.heads * p.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups_per_block;
  const int64_t group_in_block = threadIdx.x / group;
  // All lanes of a warp run the same iterations, including those of idle groups, because shuffles need them.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * groups_per_block; first < total; first += step) {
    const bool active = first + group_in_block < total;
    const Item item = item_at(p, active ? first + group_in_block : 0);
    const T* value = static_cast<const T*>(p.value) + item.value;
    const T* grad_output = static_cast<const T*>(p.grad_output) + item.output;
    A* grad_value = static_cast<A*>(p.grad_value) + item.value;
    int64_t place_index = item.place;
    for (int l = 0; l < p.n_levels; ++l) {
      const Level level = p.levels[l];
      for (int point = 0; point < p.points; ++point, ++place_index) {
        const Place<A> place = read_place<A>(p, level, place_index);
        const Footprint<A>& f = place.footprint;
        A weight[4], dot[4] = {};
        corner_weights(f, place.attention, weight);
        const int64_t width = active && f.any ? p.width : 0;
        for (int64_t channel = lane; channel < width; channel += group) {
          const A grad = static_cast<A>(widen(grad_output[channel]));
          for (int c = 0; c < 4; ++c) {
            const int64_t at = (level.start + f.row[c]) * stride + channel;
            dot[c] += grad * static_cast<A>(widen(value[at]));
            if (f.inside[c] != A(0)) atomicAdd(grad_value + at, weight[c] * grad);
          }
        }
        // The gradients are linear in the dot products, so summing them over lanes takes three sums, not four.
        PlaceGradient<A> g = place_gradient(f.inside, f.x_fraction, f.y_fraction, dot, place.attention,
                                            level.h, level.w);
        g.x = group_sum(g.x, group);
        g.y = group_sum(g.y, group);
        g.attention = group_sum(g.attention, group);
        if (active && lane == 0) {
          store_as(g.x, p.grad_locations, p.location_type, 2 * place_index);
          store_as(g.y, p.grad_locations, p.location_type, 2 * place_index + 1);
          store_as(g.attention, p.grad_weights, p.weight_type, place_index);
        }
      }
    }
  }
}

int blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int N>
bool aligned(const CudaProblem& p) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(p.value) | reinterpret_cast<uintptr_t>(p.output);
  return p.width % N == 0 && addresses % sizeof(Pack<T, N>) == 0;
}

template <typename T>
const char* forward(const CudaProblem& p, int threads, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);  // the widest load that a thread can do
  const int64_t work = p.batch * p.queries * p.heads * p.width;
  if (aligned<T, kPack>(p)) {
    HIERVL_LAUNCH((forward_kernel<T, kPack>), blocks_for(work / kPack, threads), threads, stream, p);
  } else {
    HIERVL_LAUNCH((forward_kernel<T, 1>), blocks_for(work, threads), threads, stream, p);
  }
  return last_error();
}

template <typename T>
const char* backward(const CudaProblem& p, int threads, cudaStream_t stream) {
  int group = 1;
  while (group < kWarp && group < p.width) group *= 2;
  const int64_t work = p.batch * p.queries * p.heads;
  HIERVL_LAUNCH((backward_kernel<T>), blocks_for(work, threads / group), threads, stream, p, group);
  return last_error();
}

}  // namespace

const char* cuda_forward(const CudaProblem& problem, int threads, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (problem.value_type) {
    case ScalarType::kFloat: return forward<float>(problem, threads, stream);
    case ScalarType::kDouble: return forward<double>(problem, threads, stream);
    case ScalarType::kHalf: return forward<Half>(problem, threads, stream);
    default: return forward<BFloat16>(problem, threads, stream);
  }
}

const char* cuda_backward(const CudaProblem& problem, int threads, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  switch (problem.value_type) {
    case ScalarType::kFloat: return backward<float>(problem, threads, stream);
    case ScalarType::kDouble: return backward<double>(problem, threads, stream);
    case ScalarType::kHalf: return backward<Half>(problem, threads, stream);
    default: return backward<BFloat16>(problem, threads, stream);
  }
}

}  // namespace hiervl
