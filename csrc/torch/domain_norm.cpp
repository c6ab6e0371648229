// Operators of the hot path domain_norm: checks, layouts, threads; what they compute stands in
// neuraldeps_kernels/ops/domain_norm.py.
//
// Kernels: csrc/cpu/domain_norm.cpp. CUDA tensors go to Triton or the PyTorch reference, registered from Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "layouts.hpp"
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace {

using nd::empty_beside;
using nd::invalid;
using nd::is_dense;
using nd::kMaxDimensions;
using nd::made_contiguous;
using nd::cpu::DomainNormArgs;
using nd::cpu::Dtype;
using nd::cpu::NormArgs;
using nd::cpu::NormStage;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kValuesPerThread = 1 << 15;  // fewer are not worth a second thread
constexpr int64_t kFewPositions = 16;          // of a sample: tables by sample would be as large as x

// ------------------------------------------------------------------------------------------------ values

// x [N, C, *] made dense, and what goes with it.
struct Values {
  Tensor x;
  NormArgs args = {};

  explicit Values(const Tensor& given) : x(given) {
    if (x.dim() < 2 || x.dim() > kMaxDimensions) invalid("x must be [N, C, *]");
    args.dtype = nd::dtype_of("x", x);
    args.N = x.size(0);
    args.C = x.size(1);
    args.S = 1;
    for (int64_t d = 2; d < x.dim(); d++) args.S *= x.size(d);
    const bool positions_last = is_dense(x, false);
    args.channels_last = is_dense(x, true) && (!positions_last || args.C > 1);
    if (!positions_last && !args.channels_last) x = made_contiguous(x);
    args.x = x.const_data_ptr();
  }

  ScalarType wide() const { return args.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float; }
  bool empty() const { return x.numel() == 0; }

  Tensor beside(const char* name, const Tensor& other) const { return nd::beside(name, other, "x", x); }
  OptionalTensor beside(const char* name, const OptionalTensor& other) const {
    return other ? OptionalTensor(beside(name, *other)) : std::nullopt;
  }

  Tensor table() const { return nd::empty({args.N, args.C}, wide(), x); }
  Tensor checked_table(const char* name, const Tensor& table) const {
    if (table.dim() != 2 || table.size(0) != args.N || table.size(1) != args.C || table.scalar_type() != wide())
      invalid(std::string(name) + " must be [N, C] in the dtype of statistics");
    return made_contiguous(table);
  }

  // run(begin, end) over `units` times the blocks of channels, by all threads if that pays.
  template <class F>
  void over_blocks(int64_t units, const F& run) const {
    const int64_t tasks = units * nd::cpu::kernels().norm_blocks(args);
    if (tasks == 0) return;
    const int64_t grain = std::max<int64_t>(1, kValuesPerThread * tasks / std::max<int64_t>(1, x.numel()));
    if (grain >= tasks) return run(int64_t{0}, tasks);
    torch::stable::parallel_for(0, tasks, grain, run);
  }
};

const void* data(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

bool is_relu(const std::string& activation) {
  if (activation != "none" && activation != "relu") invalid("activation must be none or relu, not " + activation);
  return activation == "relu";
}

Tensor nothing(const Tensor& like) { return nd::empty({0}, like.scalar_type(), like); }

// ------------------------------------------------------------------------------------------------ by sample

std::tuple<Tensor, Tensor> instance_moments_cpu(Tensor x) {
  ND_RANGE("instance_moments");
  Values values(x);
  Tensor mean = values.table(), second_moment = values.table();
  if (values.args.S == 0) return {torch::stable::zero_(mean), torch::stable::zero_(second_moment)};
  values.args.sum = mean.mutable_data_ptr();
  values.args.centred_sum = second_moment.mutable_data_ptr();
  values.over_blocks(values.args.N,
                     [&](int64_t begin, int64_t end) { nd::cpu::kernels().norm_moments(values.args, begin, end); });
  return {mean, second_moment};
}

Tensor centred_affine_cpu(Tensor x, Tensor mean, Tensor scale, Tensor shift, OptionalTensor residual,
                          std::string activation) {
  ND_RANGE("centred_affine");
  Values values(x);
  mean = values.checked_table("mean", mean);
  scale = values.checked_table("scale", scale);
  shift = values.checked_table("shift", shift);
  residual = values.beside("residual", residual);
  NormArgs& args = values.args;
  args.relu = is_relu(activation);
  args.mean = mean.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.shift = shift.const_data_ptr();
  args.residual = data(residual);
  Tensor y = empty_beside(values.x);
  if (values.empty()) return y;
  args.out = y.mutable_data_ptr();
  values.over_blocks(args.N, [&](int64_t begin, int64_t end) { nd::cpu::kernels().norm_affine(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> centred_affine_sums_cpu(Tensor grad, Tensor x, Tensor mean, OptionalTensor y) {
  ND_RANGE("centred_affine_sums");
  Values values(x);
  grad = values.beside("grad", grad);
  y = values.beside("y", y);
  mean = values.checked_table("mean", mean);
  Tensor sum = values.table(), centred_sum = values.table();
  NormArgs& args = values.args;
  if (args.S == 0) return {torch::stable::zero_(sum), torch::stable::zero_(centred_sum)};
  args.grad = grad.const_data_ptr();
  args.result = data(y);
  args.mean = mean.const_data_ptr();
  args.sum = sum.mutable_data_ptr();
  args.centred_sum = centred_sum.mutable_data_ptr();
  values.over_blocks(args.N, [&](int64_t begin, int64_t end) { nd::cpu::kernels().norm_sums(args, begin, end); });
  return {sum, centred_sum};
}

std::tuple<Tensor, Tensor> centred_affine_input_grad_cpu(OptionalTensor grad, Tensor x, Tensor mean,
                                                         OptionalTensor scale, Tensor offset, Tensor slope,
                                                         OptionalTensor y, bool residual) {
  ND_RANGE("centred_affine_input_grad");
  Values values(x);
  if (grad.has_value() != scale.has_value()) invalid("grad and scale must be given together");
  grad = values.beside("grad", grad);
  y = values.beside("y", y);
  mean = values.checked_table("mean", mean);
  if (scale) scale = values.checked_table("scale", *scale);
  offset = values.checked_table("offset", offset);
  slope = values.checked_table("slope", slope);
  Tensor dx = empty_beside(values.x);
  const bool wanted = residual && grad.has_value();
  Tensor dresidual = wanted ? empty_beside(values.x) : nothing(x);
  NormArgs& args = values.args;
  if (values.empty()) return {dx, dresidual};
  args.grad = data(grad);
  args.result = data(y);
  args.mean = mean.const_data_ptr();
  args.scale = data(scale);
  args.shift = offset.const_data_ptr();
  args.slope = slope.const_data_ptr();
  args.out = dx.mutable_data_ptr();
  args.out_residual = wanted ? dresidual.mutable_data_ptr() : nullptr;
  values.over_blocks(args.N, [&](int64_t begin, int64_t end) { nd::cpu::kernels().norm_input_grad(args, begin, end); });
  return {dx, dresidual};
}

// ------------------------------------------------------------------------------------------------ by domain

void check_domain(const Tensor& domain, const Values& values) {
  if (domain.dim() != 1 || domain.size(0) != values.args.N || domain.scalar_type() != ScalarType::Long)
    invalid("domain must be int64 [N]");
}

// Samples by group. Group k < D is domain k; samples of id -1, if there are any, are group D.
struct Grouping {
  int64_t domains;
  bool unseen = false;
  std::vector<int64_t> group, order, first;  // [N], [N], [groups + 1]

  Grouping(Tensor domain, const Values& values, int64_t D, bool unseen_allowed) : domains(D) {
    check_domain(domain, values);
    domain = made_contiguous(domain);
    const int64_t* ids = static_cast<const int64_t*>(domain.const_data_ptr());
    group.assign(ids, ids + values.args.N);
    first.resize(static_cast<size_t>(D + 2));
    for (int64_t& k : group) {
      if (k < (unseen_allowed ? -1 : 0) || k >= D) refuse(k, unseen_allowed);
      unseen = unseen || k < 0;
      k = k < 0 ? D : k;
      first[static_cast<size_t>(k + 1)]++;
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    order.resize(group.size());
    std::vector<int64_t> next(first);
    for (size_t n = 0; n < group.size(); n++)
      order[static_cast<size_t>(next[static_cast<size_t>(group[n])]++)] = static_cast<int64_t>(n);
  }

  int64_t groups() const { return domains + unseen; }
  int64_t samples(int64_t k) const { return first[static_cast<size_t>(k + 1)] - first[static_cast<size_t>(k)]; }

 private:
  [[noreturn]] void refuse(int64_t id, bool unseen_allowed) const {
    const std::string why = id == -1 ? ", which marks an unseen domain and has no statistics of the batch" : "";
    invalid("domain must hold ids in " + std::string(unseen_allowed ? "-1" : "0") + ".." + std::to_string(domains - 1) +
            ", not " + std::to_string(id) + why);
  }
};

// weight or bias [D, C] or [C], contiguous in the dtype of statistics.
OptionalTensor parameter(const char* name, const OptionalTensor& given, const Values& values, int64_t D) {
  if (!given) return std::nullopt;
  const int64_t dims = given->dim();
  if (dims < 1 || dims > 2 || given->size(dims - 1) != values.args.C || (dims == 2 && given->size(0) != D))
    invalid(std::string(name) + " must be [D, C] or [C]");
  const bool fits = given->scalar_type() == values.wide();
  return made_contiguous(fits ? *given : torch::stable::to(*given, values.wide()));
}

// A copy of the statistics [D, C] in float64.
Tensor copy_of_statistics(const char* name, const OptionalTensor& given, const Values& values, int64_t D) {
  if (!given || given->dim() != 2 || given->size(0) != D || given->size(1) != values.args.C)
    invalid(std::string(name) + " must be [D, C] where running statistics normalise");
  Tensor copy = nd::empty({D, values.args.C}, ScalarType::Double, values.x);
  return torch::stable::copy_(copy, *given);
}

void check_statistics(const char* name, const Tensor& given, const Values& values, int64_t D) {
  if (given.dim() != 2 || given.size(0) != D || given.size(1) != values.args.C || !given.is_contiguous() ||
      given.scalar_type() != ScalarType::Double)
    invalid(std::string(name) + " must be float64 [D, C], contiguous");
}

double* doubles(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

// Tables by group: those by domain, and where there are samples of id -1 a row more that pools the domains: mean of
// means, mean of variances plus variance of means, means of weights and biases.
class Tables {
 public:
  Tables(DomainNormArgs& args, const Values& values, const Grouping& grouping, const Tensor& mean,
         const Tensor& variance, const OptionalTensor& weight, const OptionalTensor& bias)
      : D_(grouping.domains), C_(values.args.C) {
    args.shared_affine = (weight && weight->dim() == 1) || (bias && bias->dim() == 1);
    args.weight = data(weight);
    args.bias = data(bias);
    args.mean = doubles(mean);
    args.variance = doubles(variance);
    if (!grouping.unseen) return;
    args.mean = pooled(args.mean, mean_);
    args.variance = pooled(args.variance, variance_);
    for (int64_t c = 0; c < C_; c++) {
      const double centre = mean_[static_cast<size_t>(D_ * C_ + c)];
      double spread = 0;
      for (int64_t k = 0; k < D_; k++) {
        const double shift = mean_[static_cast<size_t>(k * C_ + c)] - centre;
        spread += shift * shift;
      }
      variance_[static_cast<size_t>(D_ * C_ + c)] += spread / static_cast<double>(D_);
    }
    if (args.shared_affine) return;
    const bool in_double = values.args.dtype == Dtype::kFloat64;
    args.weight =
        in_double ? pooled_parameter<double>(args.weight, weight_) : pooled_parameter<float>(args.weight, weight_);
    args.bias = in_double ? pooled_parameter<double>(args.bias, bias_) : pooled_parameter<float>(args.bias, bias_);
  }

 private:
  template <class T>
  T* pooled(const T* rows, std::vector<T>& out) const {
    out.assign(rows, rows + D_ * C_);
    for (int64_t c = 0; c < C_; c++) {
      double sum = 0;
      for (int64_t k = 0; k < D_; k++) sum += static_cast<double>(rows[k * C_ + c]);
      out.push_back(static_cast<T>(sum / static_cast<double>(D_)));
    }
    return out.data();
  }
  template <class T>
  const void* pooled_parameter(const void* rows, std::vector<double>& memory) const {
    if (!rows) return nullptr;
    std::vector<T> table;
    pooled(static_cast<const T*>(rows), table);
    memory.resize((table.size() * sizeof(T) + sizeof(double) - 1) / sizeof(double));
    std::memcpy(memory.data(), table.data(), table.size() * sizeof(T));
    return memory.data();
  }

  int64_t D_, C_;
  std::vector<double> mean_, variance_, weight_, bias_;
};

using Kernel = void (*)(const DomainNormArgs&, NormStage, int64_t, int64_t);

// Runs all stages: group by group, or where a sample has enough positions stage by stage, in the order of memory.
void run(const Values& values, const Grouping& grouping, DomainNormArgs& args, Kernel kernel, bool statistics_given) {
  const int64_t N = values.args.N, C = values.args.C, groups = grouping.groups();
  args.values = values.args;
  args.groups = groups;
  args.group = grouping.group.data();
  args.order = grouping.order.data();
  args.first = grouping.first.data();
  const bool by_group = values.args.S < kFewPositions && !statistics_given;
  const size_t partial = by_group || statistics_given ? 0 : static_cast<size_t>(2 * N * C);
  const size_t table = by_group ? 0 : static_cast<size_t>(groups * C);
  const std::unique_ptr<double[]> scratch(new double[partial + 4 * table]);
  args.partial = scratch.get();
  args.centred_partial = scratch.get() + partial / 2;
  args.centre = scratch.get() + partial;
  args.scale = scratch.get() + partial + table;
  args.shift = scratch.get() + partial + 2 * table;
  args.slope = scratch.get() + partial + 3 * table;
  const auto stage = [&](NormStage which, int64_t units) {
    values.over_blocks(units, [&](int64_t begin, int64_t end) { kernel(args, which, begin, end); });
  };
  if (by_group) return stage(NormStage::kAll, groups);
  if (statistics_given) {
    stage(NormStage::kPrepare, groups);
  } else {
    stage(NormStage::kReduce, N);
    stage(NormStage::kMerge, groups);
  }
  stage(NormStage::kApply, N);
}

Tensor counts_of(const Grouping& grouping, const Values& values, bool training, bool strict) {
  Tensor count = nd::empty({grouping.domains}, ScalarType::Long, values.x);
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  for (int64_t k = 0; k < grouping.domains; k++) {
    counts[k] = training ? grouping.samples(k) * values.args.S : 0;
    if (training && strict && counts[k] == 1)
      invalid("domain " + std::to_string(k) +
              " has a single value per channel, which strict=True does not accept in training");
  }
  return count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> domain_batch_norm_cpu(Tensor x, Tensor domain, OptionalTensor running_mean,
                                                                 OptionalTensor running_var, OptionalTensor weight,
                                                                 OptionalTensor bias, OptionalTensor residual,
                                                                 int64_t num_domains, bool training, double eps,
                                                                 std::string activation, bool strict) {
  ND_RANGE("domain_batch_norm");
  Values values(x);
  const int64_t D = num_domains, C = values.args.C;
  weight = parameter("weight", weight, values, D);
  bias = parameter("bias", bias, values, D);
  residual = values.beside("residual", residual);
  const Grouping grouping(domain, values, D, !training);
  const Tensor count = counts_of(grouping, values, training, strict);
  Tensor mean =
      training ? nd::empty({D, C}, ScalarType::Double, x) : copy_of_statistics("running_mean", running_mean, values, D);
  Tensor variance =
      training ? nd::empty({D, C}, ScalarType::Double, x) : copy_of_statistics("running_var", running_var, values, D);
  Tensor y = empty_beside(values.x);
  values.args.relu = is_relu(activation);
  values.args.residual = data(residual);
  values.args.out = y.mutable_data_ptr();
  if (values.empty()) {
    if (training) return {y, torch::stable::zero_(mean), torch::stable::zero_(variance), count};
    return {y, mean, variance, count};
  }
  DomainNormArgs args = {};
  args.eps = eps;
  const Tables tables(args, values, grouping, mean, variance, weight, bias);
  run(values, grouping, args, nd::cpu::kernels().domain_norm_forward, !training);
  return {y, mean, variance, count};
}

// Gradient of a parameter [D, C] or [C] from that of the rows by group [groups, C], in the dtype of statistics.
Tensor parameter_gradient(const double* rows, const Grouping& grouping, const Values& values, bool shared) {
  const int64_t D = grouping.domains, C = values.args.C;
  Tensor gradient = shared ? nd::empty({C}, values.wide(), values.x) : nd::empty({D, C}, values.wide(), values.x);
  const auto fill = [&]<class T>(T* out) {
    const double* unseen = grouping.unseen ? rows + D * C : nullptr;
    if (!shared) {
      for (int64_t i = 0; i < D * C; i++) out[i] = static_cast<T>(rows[i]);
      for (int64_t i = 0; unseen && i < D * C; i++)
        out[i] = static_cast<T>(rows[i] + unseen[i % C] / static_cast<double>(D));
      return;
    }
    for (int64_t c = 0; c < C; c++) {
      double sum = 0;
      for (int64_t k = 0; k < grouping.groups(); k++) sum += rows[k * C + c];
      out[c] = static_cast<T>(sum);
    }
  };
  if (values.wide() == ScalarType::Double)
    fill(static_cast<double*>(gradient.mutable_data_ptr()));
  else
    fill(static_cast<float*>(gradient.mutable_data_ptr()));
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> domain_batch_norm_backward_cpu(Tensor grad, Tensor x, Tensor domain,
                                                                          OptionalTensor weight, Tensor mean,
                                                                          Tensor variance, Tensor /* count */,
                                                                          OptionalTensor y, bool training, double eps,
                                                                          bool shared_affine, bool residual) {
  ND_RANGE("domain_batch_norm_backward");
  Values values(x);
  const int64_t D = mean.size(0), C = values.args.C;
  grad = values.beside("grad", grad);
  y = values.beside("y", y);
  weight = parameter("weight", weight, values, D);
  check_statistics("mean", mean, values, D);
  check_statistics("variance", variance, values, D);
  const Grouping grouping(domain, values, D, !training);
  Tensor dx = empty_beside(values.x);
  Tensor dresidual = residual ? empty_beside(values.x) : nothing(x);
  const int64_t rows = grouping.groups() * C;
  std::vector<double> gradients(static_cast<size_t>(2 * rows));
  if (!values.empty()) {
    values.args.grad = grad.const_data_ptr();
    values.args.result = data(y);
    values.args.out = dx.mutable_data_ptr();
    values.args.out_residual = residual ? dresidual.mutable_data_ptr() : nullptr;
    DomainNormArgs args = {};
    args.eps = eps;
    args.batch_statistics = training;
    const Tables tables(args, values, grouping, mean, variance, weight, std::nullopt);
    args.shared_affine = shared_affine;
    args.weight_grad = gradients.data();
    args.bias_grad = gradients.data() + rows;
    run(values, grouping, args, nd::cpu::kernels().domain_norm_backward, false);
  }
  return {dx, parameter_gradient(gradients.data(), grouping, values, shared_affine),
          parameter_gradient(gradients.data() + rows, grouping, values, shared_affine), dresidual};
}

template <class T>
void move_towards(T* running, const double* batch, int64_t C, double step, double factor) {
  for (int64_t c = 0; c < C; c++) {
    const double old = static_cast<double>(running[c]);
    running[c] = static_cast<T>(old + step * (factor * batch[c] - old));
  }
}

// The buffer itself if it is contiguous and float32 or float64, else a float64 copy to be copied back.
Tensor writable(const Tensor& buffer) {
  const bool direct = buffer.scalar_type() == ScalarType::Float || buffer.scalar_type() == ScalarType::Double;
  if (direct && buffer.is_contiguous()) return buffer;
  Tensor copy = nd::empty({buffer.size(0), buffer.size(1)}, ScalarType::Double, buffer);
  return torch::stable::copy_(copy, buffer);
}

void update_running_statistics_cpu(Tensor running_mean, Tensor running_var, OptionalTensor num_batches_tracked,
                                   Tensor mean, Tensor variance, Tensor count, std::optional<double> momentum) {
  ND_RANGE("update_running_statistics");
  if (mean.dim() != 2) invalid("mean must be [D, C]");
  const int64_t D = mean.size(0), C = mean.size(1);
  const auto check = [&](const char* name, const Tensor& table) {
    if (table.dim() != 2 || table.size(0) != D || table.size(1) != C) invalid(std::string(name) + " must be [D, C]");
  };
  check("running_mean", running_mean);
  check("running_var", running_var);
  check("variance", variance);
  if (mean.scalar_type() != ScalarType::Double || variance.scalar_type() != ScalarType::Double)
    invalid("mean and variance must be float64");
  if (count.dim() != 1 || count.size(0) != D || count.scalar_type() != ScalarType::Long)
    invalid("count must be int64 [D]");
  if (num_batches_tracked && (num_batches_tracked->dim() != 1 || num_batches_tracked->size(0) != D ||
                              num_batches_tracked->scalar_type() != ScalarType::Long))
    invalid("num_batches_tracked must be int64 [D]");
  if (!momentum && !num_batches_tracked) invalid("momentum=None needs num_batches_tracked");
  mean = made_contiguous(mean);
  variance = made_contiguous(variance);
  count = made_contiguous(count);
  const int64_t* counts = static_cast<const int64_t*>(count.const_data_ptr());
  std::vector<double> steps(static_cast<size_t>(D), momentum.value_or(0));
  if (num_batches_tracked) {
    int64_t* batches = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
    const int64_t stride = num_batches_tracked->stride(0);
    for (int64_t k = 0; k < D; k++) {
      batches[k * stride] += counts[k] > 0;
      if (!momentum) steps[static_cast<size_t>(k)] = 1 / static_cast<double>(std::max<int64_t>(1, batches[k * stride]));
    }
  }
  for (const bool of_variance : {false, true}) {
    Tensor& buffer = of_variance ? running_var : running_mean;
    Tensor running = writable(buffer);
    const double* batch = doubles(of_variance ? variance : mean);
    for (int64_t k = 0; k < D; k++) {
      if (counts[k] <= 0) continue;
      const double number = static_cast<double>(counts[k]);
      const double factor = of_variance ? number / std::max(number - 1, 1.0) : 1.0;
      const double step = steps[static_cast<size_t>(k)];
      if (running.scalar_type() == ScalarType::Double)
        move_towards(doubles(running) + k * C, batch + k * C, C, step, factor);
      else
        move_towards(static_cast<float*>(running.mutable_data_ptr()) + k * C, batch + k * C, C, step, factor);
    }
    if (running.get() != buffer.get()) torch::stable::copy_(buffer, running);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("instance_moments(Tensor x) -> (Tensor mean, Tensor second_moment)");
  m.def(
      "centred_affine(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor? residual, str activation) -> Tensor");
  m.def("centred_affine_sums(Tensor grad, Tensor x, Tensor mean, Tensor? y) -> (Tensor sums, Tensor centred_sums)");
  m.def(
      "centred_affine_input_grad(Tensor? grad, Tensor x, Tensor mean, Tensor? scale, Tensor offset, Tensor slope, "
      "Tensor? y, bool residual) -> (Tensor dx, Tensor dresidual)");
  m.def(
      "domain_batch_norm(Tensor x, Tensor domain, Tensor? running_mean, Tensor? running_var, Tensor? weight, "
      "Tensor? bias, Tensor? residual, SymInt num_domains, bool training, float eps, str activation, bool strict) -> "
      "(Tensor y, Tensor mean, Tensor variance, Tensor count)");
  m.def(
      "domain_batch_norm_backward(Tensor grad, Tensor x, Tensor domain, Tensor? weight, Tensor mean, Tensor variance, "
      "Tensor count, Tensor? y, bool training, float eps, bool shared_affine, bool residual) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
  m.def(
      "update_running_statistics(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
      "Tensor mean, Tensor variance, Tensor count, float? momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("instance_moments", TORCH_BOX(&instance_moments_cpu));
  m.impl("centred_affine", TORCH_BOX(&centred_affine_cpu));
  m.impl("centred_affine_sums", TORCH_BOX(&centred_affine_sums_cpu));
  m.impl("centred_affine_input_grad", TORCH_BOX(&centred_affine_input_grad_cpu));
  m.impl("domain_batch_norm", TORCH_BOX(&domain_batch_norm_cpu));
  m.impl("domain_batch_norm_backward", TORCH_BOX(&domain_batch_norm_backward_cpu));
  m.impl("update_running_statistics", TORCH_BOX(&update_running_statistics_cpu));
}
