// The operator for CUDA tensors: checks, memory and the stream. The kernels are in cuda_kernel.cu.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "arguments.h"
#include "cuda_kernel.h"

namespace hiervl {
namespace {

constexpr int kThreads = 256;

// Nothing is copied to or from the device, so no call synchronizes with it.
CudaProblem make_problem(const Arguments& a, const at::Tensor& value, const at::Tensor& locations,
                         const at::Tensor& weights) {
  TORCH_CHECK(a.levels.size() <= kMaxLevels, "ms_deform_attn: at most ", kMaxLevels, " levels on CUDA, got ",
              a.levels.size());
  CudaProblem p{};
  p.batch = a.batch, p.rows = a.rows, p.heads = a.heads, p.width = a.width, p.queries = a.queries;
  p.points = static_cast<int>(a.points), p.n_levels = static_cast<int>(a.levels.size());
  std::copy(a.levels.begin(), a.levels.end(), p.levels);
  p.value_type = scalar_type(value, "value");
  p.location_type = scalar_type(locations, "sampling_locations");
  p.weight_type = scalar_type(weights, "attention_weights");
  p.value = value.const_data_ptr(), p.locations = locations.const_data_ptr(), p.weights = weights.const_data_ptr();
  return p;
}

void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "ms_deform_attn: ", error); }

at::Tensor forward(const at::Tensor& value_in, at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                   const at::Tensor& locations_in, const at::Tensor& weights_in) {
  const Arguments a = check_arguments(value_in, spatial_shapes, level_start, locations_in, weights_in);
  const c10::cuda::CUDAGuard guard(value_in.device());
  const auto value = value_in.contiguous(), locations = locations_in.contiguous(), weights = weights_in.contiguous();
  at::Tensor output = at::empty({a.batch, a.queries, a.heads * a.width}, value.options());
  CudaProblem problem = make_problem(a, value, locations, weights);
  problem.output = output.mutable_data_ptr();
  if (output.numel() > 0) check_launch(cuda_forward(problem, kThreads, c10::cuda::getCurrentCUDAStream().stream()));
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output_in, const at::Tensor& value_in,
                                                        at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                                                        const at::Tensor& locations_in, const at::Tensor& weights_in) {
  at::globalContext().alertNotDeterministic("ms_deform_attn_backward_cuda");
  const Arguments a = check_arguments(value_in, spatial_shapes, level_start, locations_in, weights_in);
  check_grad_output(grad_output_in, value_in, a);
  const c10::cuda::CUDAGuard guard(value_in.device());
  const auto grad_output = grad_output_in.contiguous();
  const auto value = value_in.contiguous(), locations = locations_in.contiguous(), weights = weights_in.contiguous();
  // A long sum in a 16-bit type would lose most of its precision, so it is accumulated in float32 and
  // rounded once.
  const auto exact = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor grad_value = at::zeros_like(value, value.options().dtype(exact));
  at::Tensor grad_locations = at::empty_like(locations), grad_weights = at::empty_like(weights);
  CudaProblem problem = make_problem(a, value, locations, weights);
  problem.grad_output = grad_output.const_data_ptr();
  problem.grad_value = grad_value.mutable_data_ptr();
  problem.grad_locations = grad_locations.mutable_data_ptr();
  problem.grad_weights = grad_weights.mutable_data_ptr();
  if (weights.numel() > 0) {
    check_launch(cuda_backward(problem, kThreads, c10::cuda::getCurrentCUDAStream().stream()));
  }
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace
}  // namespace hiervl

TORCH_LIBRARY_IMPL(hiervl, CUDA, m) {
  m.impl("ms_deform_attn", &hiervl::forward);
  m.impl("ms_deform_attn_backward", &hiervl::backward);
}
