// The operator for CPU tensors: checks, memory, threads and selection of the instruction set.
// The arithmetic is in cpu_kernel.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>

#include "arguments.h"
#include "cpu_kernel.h"

namespace hiervl {
namespace {

enum InstructionSet : int { kBaseline, kAvx2, kAvx512 };
constexpr const char* kInstructionSetNames[] = {"baseline", "avx2", "avx512"};

InstructionSet best_instruction_set() {
#if defined(HIERVL_X86_OBJECTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kBaseline;
}

std::atomic<int>& instruction_set() {
  static std::atomic<int> current{best_instruction_set()};
  return current;
}

// Returns the name of the instruction set in use, after selecting the requested one unless the request
// is empty. "best" selects the widest set of this processor. For tests and benchmarks.
std::string cpu_instruction_set(const std::string& request) {
  if (request == "best") {
    instruction_set() = best_instruction_set();
  } else if (!request.empty()) {
    const auto* end = std::end(kInstructionSetNames);
    const auto* found = std::find(std::begin(kInstructionSetNames), end, request);
    const auto index = found - std::begin(kInstructionSetNames);
    TORCH_CHECK(found != end && index <= best_instruction_set(), "instruction set '", request,
                "' is not available here; the best is ", kInstructionSetNames[best_instruction_set()]);
    instruction_set() = static_cast<int>(index);
  }
  return kInstructionSetNames[instruction_set()];
}

CpuKernel kernel_for(ScalarType type) {
#if defined(HIERVL_X86_OBJECTS)
  switch (instruction_set()) {
    case kAvx512: return avx512::cpu_kernel(type);
    case kAvx2: return avx2::cpu_kernel(type);
  }
#endif
  return baseline::cpu_kernel(type);
}

// Size and first row of the level of each of the L*P places, as tables indexed by place.
struct PlaceTables {
  std::vector<int> height, width, start;

  explicit PlaceTables(const Arguments& a) {
    for (const Level& level : a.levels) {
      height.insert(height.end(), a.points, level.h);
      width.insert(width.end(), a.points, level.w);
      start.insert(start.end(), a.points, static_cast<int>(level.start));
    }
    for (auto* table : {&height, &width, &start}) table->resize(table->size() + kPlacePadding, 0);
  }
};

CpuProblem make_problem(const Arguments& a, const PlaceTables& tables, const at::Tensor& value,
                        const at::Tensor& locations, const at::Tensor& weights) {
  CpuProblem p{};
  p.batch = a.batch, p.rows = a.rows, p.heads = a.heads, p.width = a.width, p.queries = a.queries;
  p.places = static_cast<int>(a.levels.size() * a.points);
  p.place_height = tables.height.data(), p.place_width = tables.width.data(), p.place_start = tables.start.data();
  p.location_type = scalar_type(locations, "sampling_locations");
  p.weight_type = scalar_type(weights, "attention_weights");
  p.value = value.const_data_ptr(), p.locations = locations.const_data_ptr(), p.weights = weights.const_data_ptr();
  return p;
}

constexpr int64_t kGrain = 64;  // minimum number of (query, head) pairs per thread

// Vector-aligned memory of one thread for `count` sums. 16-bit types are accumulated in float.
at::Tensor scratch(const at::Tensor& value, int64_t count) {
  const auto type = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::empty({count}, value.options().dtype(type));
}

// Whether to pack each head's rows before reading them. This is done if they are read often enough and
// if the packed heads of all threads together are not larger than the output.
bool worth_packing(const CpuProblem& p, const at::Tensor& value) {
  const int64_t reads = 4 * p.queries * p.places, bytes = value.element_size();
  const int64_t packed = at::get_num_threads() * p.rows * p.width * std::max<int64_t>(bytes, 4);
  const int64_t output = p.batch * p.queries * p.heads * p.width * bytes;
  return packed <= output && reads >= 4 * p.rows;
}

// Runs `pass` over all (image, head, query) on all threads.
void for_items(void (*pass)(const CpuProblem&, int64_t, int64_t, void*), const CpuProblem& problem,
               const at::Tensor& value) {
  const bool pack = worth_packing(problem, value);
  at::parallel_for(0, problem.batch * problem.heads * problem.queries, kGrain, [&](int64_t begin, int64_t end) {
    const at::Tensor rows = scratch(value, pack ? problem.rows * problem.width : 0);
    pass(problem, begin, end, pack ? rows.mutable_data_ptr() : nullptr);
  });
}

// Sums over queries into grad_value. Each (image, head) belongs to one thread or, if there are more
// threads than heads, each group of its channels does. Queries are processed in order. So there are no
// races, and the result does not depend on the number of threads.
void backward_value(const CpuKernel& kernel, const CpuProblem& problem, const at::Tensor& value) {
  const int64_t heads = problem.batch * problem.heads;
  constexpr int64_t kCacheLine = 16;  // in channels; two threads never write to the same cache line
  const int64_t most = (problem.width + kCacheLine - 1) / kCacheLine;
  const int64_t groups = std::min(most, (at::get_num_threads() + heads - 1) / heads);
  const int64_t lines = (most + groups - 1) / groups;
  at::parallel_for(0, heads * groups, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor sums = scratch(value, problem.rows * std::min(lines * kCacheLine, problem.width));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % groups * lines * kCacheLine;
      const int64_t last = std::min(first + lines * kCacheLine, problem.width);
      if (first < last) kernel.backward_value(problem, i / groups, first, last, sums.mutable_data_ptr());
    }
  });
}

at::Tensor forward(const at::Tensor& value_in, at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                   const at::Tensor& locations_in, const at::Tensor& weights_in) {
  const Arguments a = check_arguments(value_in, spatial_shapes, level_start, locations_in, weights_in);
  const auto value = value_in.contiguous(), locations = locations_in.contiguous(), weights = weights_in.contiguous();
  const CpuKernel kernel = kernel_for(scalar_type(value, "value"));
  at::Tensor output = at::empty({a.batch, a.queries, a.heads * a.width}, value.options());
  const PlaceTables tables(a);
  CpuProblem problem = make_problem(a, tables, value, locations, weights);
  problem.output = output.mutable_data_ptr();
  if (output.numel() > 0) for_items(kernel.forward, problem, value);
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output_in, const at::Tensor& value_in,
                                                        at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                                                        const at::Tensor& locations_in, const at::Tensor& weights_in) {
  const Arguments a = check_arguments(value_in, spatial_shapes, level_start, locations_in, weights_in);
  check_grad_output(grad_output_in, value_in, a);
  const auto grad_output = grad_output_in.contiguous();
  const auto value = value_in.contiguous(), locations = locations_in.contiguous(), weights = weights_in.contiguous();
  const CpuKernel kernel = kernel_for(scalar_type(value, "value"));
  at::Tensor grad_value = at::empty_like(value), grad_locations = at::empty_like(locations);
  at::Tensor grad_weights = at::empty_like(weights);
  const PlaceTables tables(a);
  CpuProblem problem = make_problem(a, tables, value, locations, weights);
  problem.grad_output = grad_output.const_data_ptr();
  problem.grad_value = grad_value.mutable_data_ptr();
  problem.grad_locations = grad_locations.mutable_data_ptr();
  problem.grad_weights = grad_weights.mutable_data_ptr();
  if (weights.numel() > 0) for_items(kernel.backward_places, problem, value);
  if (value.numel() > 0) backward_value(kernel, problem, value);
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace hiervl

TORCH_LIBRARY_IMPL(hiervl, CPU, m) {
  m.impl("ms_deform_attn", &hiervl::forward);
  m.impl("ms_deform_attn_backward", &hiervl::backward);
}

TORCH_LIBRARY_IMPL(hiervl, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", &hiervl::cpu_instruction_set);
}
