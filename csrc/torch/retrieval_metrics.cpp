// Operators of the hot path retrieval_metrics: checks and threads.
//
//   retrieval_metrics                average precision, inverse negative penalty and first rank of every query, from
//                                    distances [nq, ng]
//   retrieval_metrics_from_features  the same by float64 keys of features, from float32 distances of known error
//
// Kernels: csrc/cpu/retrieval_metrics.cpp and csrc/cuda/retrieval_metrics.cu, whose operators are called .._device.
// Those read no value on the host: numbers out of range are skipped.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_library.hpp"
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::cpu::Dtype;
using nd::cpu::Precision;
using nd::cpu::RetrievalMetricsArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Metrics = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kGrain = 16;  // queries handed out together

Precision precision_of(const std::string& name) {
  if (name == "standard") return Precision::kStandard;
  if (name == "trapezoid") return Precision::kTrapezoid;
  if (name == "sklearn") return Precision::kTied;
  invalid("precision must be standard, trapezoid or sklearn, not " + name);
}

// The values of a contiguous copy of x [sizes...], or of x itself.
template <class T>
const T* values(const char* name, Tensor& x, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  bool fits = x.scalar_type() == dtype && x.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (const int64_t size : sizes) fits = fits && x.size(axis++) == size;
  if (!fits) invalid(std::string(name) + " has a wrong dtype or shape");
  x = torch::stable::contiguous(x);
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
void check_range(const char* name, const T* x, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; i++)
    if (x[i] < 0 || x[i] >= limit)
      invalid(std::string(name) + " must be in 0.." + std::to_string(limit - 1) + ", not " + std::to_string(x[i]));
}

// Which items are positives and which junk; tensors may be replaced by contiguous copies.
struct Rules {
  Tensor order, begin, end;
  std::optional<Tensor> query_camera, gallery_camera, excluded, group, identity;
  std::string precision;
  std::vector<int64_t> excluded_list = {}, excluded_start = {};
};

int64_t num_groups(const Rules& rules) {
  return rules.excluded && rules.excluded->dim() == 2 ? rules.excluded->size(0) : 0;
}

// What needs no look at values.
void apply_shapes(Rules& rules, RetrievalMetricsArgs& args) {
  args.precision = precision_of(rules.precision);
  args.order = values<int64_t>("order", rules.order, ScalarType::Long, {args.ng});
  args.begin = values<int64_t>("begin", rules.begin, ScalarType::Long, {args.nq});
  args.end = values<int64_t>("end", rules.end, ScalarType::Long, {args.nq});
  if (rules.query_camera.has_value() != rules.gallery_camera.has_value())
    invalid("query_camera and gallery_camera must be given together");
  if (rules.query_camera) {
    args.query_camera = values<int64_t>("query_camera", *rules.query_camera, ScalarType::Long, {args.nq});
    args.gallery_camera = values<int64_t>("gallery_camera", *rules.gallery_camera, ScalarType::Long, {args.ng});
  }
  if (rules.excluded.has_value() != rules.group.has_value()) invalid("excluded and group must be given together");
  if (rules.excluded) {
    args.excluded = values<bool>("excluded", *rules.excluded, ScalarType::Bool, {num_groups(rules), args.ng});
    args.group = values<int64_t>("group", *rules.group, ScalarType::Long, {args.nq});
  }
  if (rules.identity) args.identity = values<int32_t>("identity", *rules.identity, ScalarType::Int, {args.ng});
}

void list_exclusions(Rules& rules, RetrievalMetricsArgs& args) {
  const int64_t groups = num_groups(rules);
  check_range("group", args.group, args.nq, groups);
  for (int64_t g = 0; g < groups; g++) {
    rules.excluded_start.push_back(static_cast<int64_t>(rules.excluded_list.size()));
    for (int64_t j = 0; j < args.ng; j++)
      if (args.excluded[g * args.ng + j]) rules.excluded_list.push_back(j);
  }
  rules.excluded_start.push_back(static_cast<int64_t>(rules.excluded_list.size()));
  args.excluded_list = rules.excluded_list.data();
  args.excluded_start = rules.excluded_start.data();
}

void apply(Rules& rules, RetrievalMetricsArgs& args) {
  apply_shapes(rules, args);
  check_range("order", args.order, args.ng, args.ng);
  check_range("begin", args.begin, args.nq, args.ng + 1);
  check_range("end", args.end, args.nq, args.ng + 1);
  for (int64_t q = 0; q < args.nq; q++) args.most_alike = std::max(args.most_alike, args.end[q] - args.begin[q]);
  if (args.excluded) list_exclusions(rules, args);
  if (args.identity) {
    check_range("identity", args.identity, args.ng, std::numeric_limits<int32_t>::max());
    for (int64_t j = 0; j < args.ng; j++) args.identities = std::max<int64_t>(args.identities, args.identity[j] + 1);
  }
}

RetrievalMetricsArgs problem(Tensor& distance) {
  if (distance.dim() != 2) invalid("distance must be [nq, ng]");
  if (distance.scalar_type() != ScalarType::Float && distance.scalar_type() != ScalarType::Double)
    invalid("distance must be float32 or float64");
  if (distance.size(1) > 1 && distance.stride(1) != 1) distance = torch::stable::contiguous(distance);
  RetrievalMetricsArgs args = {};
  args.distance = distance.const_data_ptr();
  args.dtype = nd::dtype_of("distance", distance);
  args.nq = distance.size(0);
  args.ng = distance.size(1);
  args.stride = distance.stride(0);
  if (args.ng > std::numeric_limits<int32_t>::max()) invalid("distance must have fewer than 2^31 columns");
  return args;
}

Metrics measure(RetrievalMetricsArgs& args, const Tensor& like) {
  Tensor ap = nd::empty({args.nq}, ScalarType::Double, like), inp = nd::empty({args.nq}, ScalarType::Double, like);
  Tensor first_rank = nd::empty({args.nq}, ScalarType::Long, like);
  args.ap = static_cast<double*>(ap.mutable_data_ptr());
  args.inp = static_cast<double*>(inp.mutable_data_ptr());
  args.first_rank = static_cast<int64_t*>(first_rank.mutable_data_ptr());
  const nd::cpu::Kernels& kernels = nd::cpu::kernels();
  nd::hand_out_ranges(
      args.nq, kGrain, kernels.retrieval_metrics_room(args),
      [&](int64_t begin, int64_t end, void* workspace) { kernels.retrieval_metrics(args, begin, end, workspace); });
  return {ap, inp, first_rank};
}

Metrics retrieval_metrics_cpu(Tensor distance, Tensor order, Tensor begin, Tensor end,
                              std::optional<Tensor> query_camera, std::optional<Tensor> gallery_camera,
                              std::optional<Tensor> excluded, std::optional<Tensor> group,
                              std::optional<Tensor> identity, std::string precision) {
  ND_RANGE("retrieval_metrics");
  RetrievalMetricsArgs args = problem(distance);
  Rules rules = {order, begin, end, query_camera, gallery_camera, excluded, group, identity, precision};
  apply(rules, args);
  return measure(args, distance);
}

// Rows of features with their factors.
template <class Args>
void take_features(const char* name, Tensor& x, Tensor& unit, int64_t rows, const Args& set) {
  if (x.dim() != 2 || x.size(0) != rows) invalid(std::string(name) + " must have a row for each of the distances");
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double)
    invalid(std::string(name) + " must be float32 or float64");
  if (x.size(1) > 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
  set(x.const_data_ptr(), x.stride(0), values<double>("unit", unit, ScalarType::Double, {rows}));
}

// Features behind float32 distances; tensors may be replaced by copies.
struct Bounded {
  Tensor slack, query, gallery, query_unit, gallery_unit;
  bool inner_product;
};

void apply_features(Bounded& bounded, RetrievalMetricsArgs& args) {
  if (args.dtype != Dtype::kFloat32) invalid("distance must be float32");
  args.slack = values<double>("slack", bounded.slack, ScalarType::Double, {args.nq});
  take_features("query", bounded.query, bounded.query_unit, args.nq,
                [&](const void* x, int64_t stride, const double* unit) {
                  args.query = x, args.query_stride = stride, args.query_unit = unit;
                });
  take_features("gallery", bounded.gallery, bounded.gallery_unit, args.ng,
                [&](const void* x, int64_t stride, const double* unit) {
                  args.gallery = x, args.gallery_stride = stride, args.gallery_unit = unit;
                });
  if (bounded.query.scalar_type() != bounded.gallery.scalar_type() || bounded.query.size(1) != bounded.gallery.size(1))
    invalid("query and gallery must have one dtype and number of columns");
  args.dtype_of_features = nd::dtype_of("query", bounded.query);
  args.dim = bounded.query.size(1);
  args.inner_product = bounded.inner_product;
}

Metrics retrieval_metrics_from_features_cpu(Tensor distance, Tensor slack, Tensor query, Tensor gallery,
                                            Tensor query_unit, Tensor gallery_unit, bool inner_product, Tensor order,
                                            Tensor begin, Tensor end, std::optional<Tensor> query_camera,
                                            std::optional<Tensor> gallery_camera, std::optional<Tensor> excluded,
                                            std::optional<Tensor> group, std::optional<Tensor> identity,
                                            std::string precision) {
  ND_RANGE("retrieval_metrics_from_features");
  RetrievalMetricsArgs args = problem(distance);
  Bounded bounded = {slack, query, gallery, query_unit, gallery_unit, inner_product};
  apply_features(bounded, args);
  Rules rules = {order, begin, end, query_camera, gallery_camera, excluded, group, identity, precision};
  apply(rules, args);
  return measure(args, distance);
}

// ---- CUDA ----

// Checked arguments with pointers on the device of `like`.
Metrics measure_on_device(const RetrievalMetricsArgs& checked, int64_t groups, const Tensor& like) {
  const int64_t nq = checked.nq;
  Tensor ap = nd::empty({nq}, ScalarType::Double, like), inp = nd::empty({nq}, ScalarType::Double, like);
  Tensor first_rank = nd::empty({nq}, ScalarType::Long, like);
  NdRetrievalMetricsArgs args = {};
  args.distance = checked.distance;
  args.dtype = static_cast<int32_t>(checked.dtype);
  args.nq = nq;
  args.ng = checked.ng;
  args.stride = checked.stride;
  args.order = checked.order;
  args.begin = checked.begin;
  args.end = checked.end;
  args.query_camera = checked.query_camera;
  args.gallery_camera = checked.gallery_camera;
  args.excluded = reinterpret_cast<const uint8_t*>(checked.excluded);
  args.group = checked.group;
  args.groups = groups;
  args.identity = checked.identity;
  args.precision = static_cast<int32_t>(checked.precision);
  if (checked.slack) {
    args.slack = checked.slack;
    args.features = {
        checked.query,        checked.gallery,       static_cast<int32_t>(checked.dtype_of_features), nq, checked.dim,
        checked.query_stride, checked.gallery_stride};
    args.query_unit = checked.query_unit;
    args.gallery_unit = checked.gallery_unit;
    args.inner_product = checked.inner_product;
  }
  args.ap = static_cast<double*>(ap.mutable_data_ptr());
  args.inp = static_cast<double*>(inp.mutable_data_ptr());
  args.first_rank = static_cast<int64_t*>(first_rank.mutable_data_ptr());
  const auto bytes = static_cast<int64_t>(ND_CUDA(nd_retrieval_metrics_workspace)(&args));
  Tensor workspace = nd::empty({bytes}, ScalarType::Byte, like);
  void* const stream = nd::current_cuda_stream(like.get_device_index());
  nd::check_cuda(ND_CUDA(nd_retrieval_metrics)(&args, workspace.mutable_data_ptr(), stream), "retrieval_metrics");
  return {ap, inp, first_rank};
}

Metrics retrieval_metrics_cuda(Tensor distance, Tensor order, Tensor begin, Tensor end,
                               std::optional<Tensor> query_camera, std::optional<Tensor> gallery_camera,
                               std::optional<Tensor> excluded, std::optional<Tensor> group,
                               std::optional<Tensor> identity, std::string precision) {
  ND_RANGE("retrieval_metrics");
  const torch::stable::accelerator::DeviceGuard guard(distance.get_device_index());
  RetrievalMetricsArgs args = problem(distance);
  Rules rules = {order, begin, end, query_camera, gallery_camera, excluded, group, identity, precision};
  apply_shapes(rules, args);
  return measure_on_device(args, num_groups(rules), distance);
}

Metrics retrieval_metrics_from_features_cuda(Tensor distance, Tensor slack, Tensor query, Tensor gallery,
                                             Tensor query_unit, Tensor gallery_unit, bool inner_product, Tensor order,
                                             Tensor begin, Tensor end, std::optional<Tensor> query_camera,
                                             std::optional<Tensor> gallery_camera, std::optional<Tensor> excluded,
                                             std::optional<Tensor> group, std::optional<Tensor> identity,
                                             std::string precision) {
  ND_RANGE("retrieval_metrics_from_features");
  const torch::stable::accelerator::DeviceGuard guard(distance.get_device_index());
  RetrievalMetricsArgs args = problem(distance);
  Bounded bounded = {slack, query, gallery, query_unit, gallery_unit, inner_product};
  apply_features(bounded, args);
  Rules rules = {order, begin, end, query_camera, gallery_camera, excluded, group, identity, precision};
  apply_shapes(rules, args);
  return measure_on_device(args, num_groups(rules), distance);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  const std::string rules =
      "Tensor order, Tensor begin, Tensor end, Tensor? query_camera, Tensor? gallery_camera, Tensor? excluded, Tensor? "
      "group, Tensor? identity, str precision) -> (Tensor ap, Tensor inp, Tensor first_rank)";
  for (const std::string suffix : {"", "_device"}) {
    m.def(("retrieval_metrics" + suffix + "(Tensor distance, " + rules).c_str());
    m.def(("retrieval_metrics_from_features" + suffix +
           "(Tensor distance, Tensor slack, Tensor query, Tensor gallery, Tensor query_unit, Tensor gallery_unit, bool "
           "inner_product, " +
           rules)
              .c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("retrieval_metrics", TORCH_BOX(&retrieval_metrics_cpu));
  m.impl("retrieval_metrics_from_features", TORCH_BOX(&retrieval_metrics_from_features_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CUDA, m) {
  m.impl("retrieval_metrics_device", TORCH_BOX(&retrieval_metrics_cuda));
  m.impl("retrieval_metrics_from_features_device", TORCH_BOX(&retrieval_metrics_from_features_cuda));
}
