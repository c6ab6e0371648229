// Operators of the hot path distillation_kl: checks and threads.
//
//   distillation_kl            T^2 / N sum of KL(softmax(b / T) || softmax(a / T)), and what its gradient needs
//   distillation_kl_backward   grad T / N (softmax(a / T) - softmax(b / T))
//
// Kernel: csrc/cpu/distillation_kl.cpp. CUDA tensors go to triton/distillation_kl.py, registered from Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::cpu::DistillationArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainEntries = 1 << 14;  // of the rows that a thread takes at least

Tensor with_dense_rows(const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

// Arguments of student and teacher, which may be replaced by copies with contiguous rows.
DistillationArgs problem(Tensor& student, Tensor& teacher, double temperature) {
  if (student.dim() != 2 || student.size(1) < 1) invalid("student must be [N, C] with C >= 1");
  if (teacher.dim() != 2 || teacher.size(0) != student.size(0) || teacher.size(1) != student.size(1))
    invalid("teacher must have the shape of student");
  if (teacher.scalar_type() != student.scalar_type()) invalid("teacher must have the dtype of student");
  if (!(temperature > 0)) invalid("temperature must be positive, not " + std::to_string(temperature));
  DistillationArgs args = {};
  args.dtype = nd::dtype_of("student", student);
  student = with_dense_rows(student);
  teacher = with_dense_rows(teacher);
  args.student = student.const_data_ptr();
  args.teacher = teacher.const_data_ptr();
  args.C = student.size(1);
  args.student_stride = student.stride(0);
  args.teacher_stride = teacher.stride(0);
  args.temperature = temperature;
  return args;
}

void run(const DistillationArgs& args, int64_t rows) {
  const int64_t grain = std::max<int64_t>(1, kGrainEntries / args.C);
  torch::stable::parallel_for(
      0, rows, grain, [&](int64_t begin, int64_t end) { nd::cpu::kernels().distillation_kl(args, begin, end); });
}

std::tuple<Tensor, Tensor> distillation_kl_cpu(Tensor student, Tensor teacher, double temperature) {
  ND_RANGE("distillation_kl");
  DistillationArgs args = problem(student, teacher, temperature);
  const int64_t N = student.size(0);
  const bool wide = student.scalar_type() == ScalarType::Double;
  Tensor loss = nd::empty({1}, wide ? ScalarType::Double : ScalarType::Float, student);
  Tensor statistics = nd::empty({N, 4}, ScalarType::Double, student);
  std::vector<double> divergence(static_cast<size_t>(N));
  args.divergence = divergence.data();
  args.statistics = static_cast<double*>(statistics.mutable_data_ptr());
  run(args, N);
  double sum = 0;
  for (const double value : divergence) sum += value;
  sum *= temperature * temperature / static_cast<double>(std::max<int64_t>(N, 1));
  if (wide)
    *static_cast<double*>(loss.mutable_data_ptr()) = sum;
  else
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(sum);
  return {torch::stable::select(loss, 0, 0), statistics};
}

Tensor distillation_kl_backward_cpu(Tensor grad, Tensor student, Tensor teacher, Tensor statistics,
                                    double temperature) {
  ND_RANGE("distillation_kl_backward");
  DistillationArgs args = problem(student, teacher, temperature);
  const int64_t N = student.size(0);
  if (statistics.dim() != 2 || statistics.size(0) != N || statistics.size(1) != 4 ||
      statistics.scalar_type() != ScalarType::Double)
    invalid("statistics must be float64 [N, 4]");
  if (grad.numel() != 1) invalid("grad must be a scalar");
  Tensor factor = nd::empty({1}, ScalarType::Double, student);
  torch::stable::copy_(factor, grad);
  statistics = torch::stable::contiguous(statistics);
  args.statistics = static_cast<double*>(statistics.mutable_data_ptr());
  args.factor =
      *static_cast<const double*>(factor.const_data_ptr()) * temperature / static_cast<double>(std::max<int64_t>(N, 1));
  Tensor dstudent = nd::empty({N, args.C}, student.scalar_type(), student);
  args.dstudent = dstudent.mutable_data_ptr();
  run(args, N);
  return dstudent;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("distillation_kl(Tensor student, Tensor teacher, float temperature) -> (Tensor loss, Tensor statistics)");
  m.def(
      "distillation_kl_backward(Tensor grad, Tensor student, Tensor teacher, Tensor statistics, float temperature) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("distillation_kl", TORCH_BOX(&distillation_kl_cpu));
  m.impl("distillation_kl_backward", TORCH_BOX(&distillation_kl_backward_cpu));
}
