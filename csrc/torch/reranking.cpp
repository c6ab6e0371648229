// Operators of k-reciprocal re-ranking: checks around csrc/cpu/reranking.cpp and csrc/cuda/reranking.cu.
//
//   reciprocal_encoding   expanded weights V' of the k-reciprocal neighbours, CSR [N, N]
//   jaccard_rerank        squared distances [nq, N - nq] -> (1 - lambda) Jaccard + lambda original, in place
//   jaccard_rerank_top_k  the smallest top_k of that matrix, and how many rows took all distances to decide
//   jaccard_distance      Jaccard distances below 1 of all rows with all, CSR [N, N]
//
// On CUDA they are called .._device. There an encoding has room behind its last entry, for as many as there can be, so
// that the host waits for nothing; only jaccard_distance, whose result is as large as it turns out, waits for its size.
#include "neuraldeps/reranking.hpp"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_library.hpp"
#include "neighbor_lists.hpp"
#include "neuraldeps/nvtx.hpp"

namespace {

using nd::invalid;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace reranking = nd::reranking;

template <class T>
const T* values(const char* name, Tensor& x, ScalarType dtype, int64_t dim) {
  if (x.scalar_type() != dtype || x.dim() != dim) invalid(std::string(name) + " has a wrong dtype or shape");
  x = torch::stable::contiguous(x);
  return static_cast<const T*>(x.const_data_ptr());
}

const double* largest_of(Tensor& largest, int64_t rows) {
  const double* found = values<double>("largest", largest, ScalarType::Double, 1);
  if (largest.size(0) < rows) invalid("largest must be [N]");
  return found;
}

reranking::Lists lists_of(Tensor& index, Tensor& key, Tensor& largest, int64_t targets) {
  reranking::Lists lists = nd::lists_of(index, key, targets);
  lists.largest = largest_of(largest, lists.rows);
  return lists;
}

// Both or neither are given.
reranking::Features features_of(std::optional<Tensor>& query, std::optional<Tensor>& gallery, int64_t rows) {
  return query && gallery ? nd::features_of(*query, *gallery, rows) : reranking::Features{};
}

reranking::Options options_of(bool normalize, int64_t power, int64_t forward = 1, int64_t half = 1,
                              int64_t expand = 1) {
  if (power != 2 && power != 4) invalid("power must be 2 or 4, not " + std::to_string(power));
  if (forward < 1 || half < 1 || expand < 1) invalid("forward, half and expand must be positive");
  return {forward, half, expand, normalize, static_cast<int>(power)};
}

// Its values are not read.
reranking::Encoding encoding_of(Tensor& crow, Tensor& col, Tensor& value, int64_t num_queries) {
  reranking::Encoding encoding = {};
  encoding.start = values<int64_t>("crow", crow, ScalarType::Long, 1);
  encoding.column = values<int32_t>("col", col, ScalarType::Int, 1);
  encoding.value = values<float>("value", value, ScalarType::Float, 1);
  encoding.rows = crow.size(0) - 1;
  encoding.num_queries = num_queries;
  if (encoding.rows < 0 || num_queries < 0 || num_queries > encoding.rows || col.size(0) != value.size(0))
    invalid("crow, col and value must be a CSR matrix [N, N] with N >= num_queries");
  return encoding;
}

reranking::Encoding host_encoding(Tensor& crow, Tensor& col, Tensor& value, int64_t num_queries) {
  const reranking::Encoding encoding = encoding_of(crow, col, value, num_queries);
  if (encoding.start[encoding.rows] != col.size(0)) invalid("crow must end with the number of entries of col");
  return encoding;
}

// The squared distances of the queries of an encoding with the gallery.
void check_distance(const Tensor& distance, int64_t rows) {
  if (distance.dim() != 2 || distance.scalar_type() != ScalarType::Float || !distance.is_contiguous())
    invalid("distance must be contiguous float32 [nq, ng]");
  if (distance.size(0) + distance.size(1) != rows) invalid("distance must be [nq, N - nq]");
}

void check_top_k(int64_t top_k) {
  if (top_k < 1) invalid("top_k must be positive, not " + std::to_string(top_k));
}

using Csr = std::tuple<Tensor, Tensor, Tensor>;
Csr tensors_of(const reranking::Rows& rows, const Tensor& like) {
  const int64_t entries = static_cast<int64_t>(rows.column.size());
  Tensor crow = nd::empty({static_cast<int64_t>(rows.start.size())}, ScalarType::Long, like);
  Tensor col = nd::empty({entries}, ScalarType::Int, like), value = nd::empty({entries}, ScalarType::Float, like);
  std::copy(rows.start.begin(), rows.start.end(), static_cast<int64_t*>(crow.mutable_data_ptr()));
  std::copy(rows.column.begin(), rows.column.end(), static_cast<int32_t*>(col.mutable_data_ptr()));
  std::copy(rows.value.begin(), rows.value.end(), static_cast<float*>(value.mutable_data_ptr()));
  return {crow, col, value};
}

Csr reciprocal_encoding_cpu(Tensor index, Tensor key, Tensor largest, std::optional<Tensor> query,
                            std::optional<Tensor> gallery, int64_t forward, int64_t half, int64_t expand,
                            bool normalize, int64_t power) {
  ND_RANGE("reciprocal_encoding");
  const reranking::Lists lists = lists_of(index, key, largest, index.size(0));
  const reranking::Features features = features_of(query, gallery, lists.rows);
  const reranking::Options options = options_of(normalize, power, forward, half, expand);
  return tensors_of(reranking::reciprocal_encoding(lists, features, options, nd::parallel_rows), index);
}

void jaccard_rerank_cpu(Tensor crow, Tensor col, Tensor value, Tensor largest, Tensor distance, double lambda_value,
                        bool normalize, int64_t power) {
  ND_RANGE("jaccard_rerank");
  check_distance(distance, crow.size(0) - 1);
  const reranking::Encoding encoding = host_encoding(crow, col, value, distance.size(0));
  const double* largest_at = largest_of(largest, encoding.num_queries);
  reranking::mix_dense(encoding, largest_at, options_of(normalize, power), lambda_value,
                       static_cast<float*>(distance.mutable_data_ptr()), nd::parallel_rows);
}

Csr jaccard_rerank_top_k_cpu(Tensor crow, Tensor col, Tensor value, Tensor index, Tensor key, Tensor largest,
                             std::optional<Tensor> query, std::optional<Tensor> gallery, int64_t top_k,
                             double lambda_value, bool normalize, int64_t power) {
  ND_RANGE("jaccard_rerank_top_k");
  const reranking::Encoding encoding = host_encoding(crow, col, value, index.size(0));
  const reranking::Lists lists = lists_of(index, key, largest, encoding.rows);
  const reranking::Features features = features_of(query, gallery, encoding.rows);
  check_top_k(top_k);
  Tensor distance = nd::empty({lists.rows, top_k}, ScalarType::Double, index);
  Tensor found = nd::empty({lists.rows, top_k}, ScalarType::Long, index);
  Tensor rescanned = nd::empty({1}, ScalarType::Long, index);
  const reranking::TopK out = {top_k, static_cast<double*>(distance.mutable_data_ptr()),
                               static_cast<int64_t*>(found.mutable_data_ptr())};
  *static_cast<int64_t*>(rescanned.mutable_data_ptr()) = reranking::mix_top_k(
      encoding, lists, features, options_of(normalize, power), lambda_value, out, nd::parallel_rows);
  return {distance, found, rescanned};
}

Csr jaccard_distance_cpu(Tensor crow, Tensor col, Tensor value) {
  ND_RANGE("jaccard_distance");
  return tensors_of(reranking::jaccard_rows(host_encoding(crow, col, value, 0), nd::parallel_rows), crow);
}

// ---- CUDA ----

using torch::stable::accelerator::DeviceGuard;

Csr reciprocal_encoding_cuda(Tensor index, Tensor key, Tensor largest, std::optional<Tensor> query,
                             std::optional<Tensor> gallery, int64_t forward, int64_t half, int64_t expand,
                             bool normalize, int64_t power) {
  ND_RANGE("reciprocal_encoding");
  const DeviceGuard guard(index.get_device_index());
  const reranking::Options options = options_of(normalize, power, forward, half, expand);
  NdReciprocalEncodingArgs args = {};
  args.lists = nd::device_lists(index, key, index.size(0));
  args.largest = largest_of(largest, args.lists.rows);
  args.features = nd::device_features(features_of(query, gallery, args.lists.rows));
  args.forward = options.forward;
  args.half = options.half;
  args.expand = options.expand;
  args.normalize = options.normalize;
  args.power = options.power;
  const int64_t room = args.lists.rows * ND_CUDA(nd_reciprocal_encoding_room)(&args);
  Tensor crow = nd::empty({args.lists.rows + 1}, ScalarType::Long, index);
  Tensor col = nd::empty({room}, ScalarType::Int, index), value = nd::empty({room}, ScalarType::Float, index);
  args.crow = static_cast<int64_t*>(crow.mutable_data_ptr());
  args.col = static_cast<int32_t*>(col.mutable_data_ptr());
  args.value = static_cast<float*>(value.mutable_data_ptr());
  const auto bytes = static_cast<int64_t>(ND_CUDA(nd_reciprocal_encoding_workspace)(&args));
  Tensor workspace = nd::empty({bytes}, ScalarType::Byte, index);
  void* const stream = nd::current_cuda_stream(index.get_device_index());
  nd::check_cuda(ND_CUDA(nd_reciprocal_encoding)(&args, workspace.mutable_data_ptr(), stream), "reciprocal_encoding");
  return {crow, col, value};
}

NdJaccardArgs device_arguments(Tensor& crow, Tensor& col, Tensor& value, int64_t num_queries, bool normalize,
                               int64_t power) {
  const reranking::Encoding encoding = encoding_of(crow, col, value, num_queries);
  const reranking::Options options = options_of(normalize, power);
  NdJaccardArgs args = {};
  args.rows = encoding.rows;
  args.num_queries = num_queries;
  args.crow = encoding.start;
  args.col = encoding.column;
  args.value = encoding.value;
  args.room = col.size(0);
  args.normalize = options.normalize;
  args.power = options.power;
  return args;
}

Tensor jaccard_workspace(const NdJaccardArgs& args, const Tensor& like) {
  return nd::empty({static_cast<int64_t>(ND_CUDA(nd_jaccard_workspace)(&args))}, ScalarType::Byte, like);
}

void jaccard_rerank_cuda(Tensor crow, Tensor col, Tensor value, Tensor largest, Tensor distance, double lambda_value,
                         bool normalize, int64_t power) {
  ND_RANGE("jaccard_rerank");
  const DeviceGuard guard(crow.get_device_index());
  check_distance(distance, crow.size(0) - 1);
  NdJaccardArgs args = device_arguments(crow, col, value, distance.size(0), normalize, power);
  args.largest = largest_of(largest, args.num_queries);
  args.lambda = lambda_value;
  args.distance = static_cast<float*>(distance.mutable_data_ptr());
  Tensor workspace = jaccard_workspace(args, crow);
  void* const stream = nd::current_cuda_stream(crow.get_device_index());
  nd::check_cuda(ND_CUDA(nd_jaccard_rerank)(&args, workspace.mutable_data_ptr(), stream), "jaccard_rerank");
}

Csr jaccard_rerank_top_k_cuda(Tensor crow, Tensor col, Tensor value, Tensor index, Tensor key, Tensor largest,
                              std::optional<Tensor> query, std::optional<Tensor> gallery, int64_t top_k,
                              double lambda_value, bool normalize, int64_t power) {
  ND_RANGE("jaccard_rerank_top_k");
  const DeviceGuard guard(crow.get_device_index());
  check_top_k(top_k);
  NdJaccardArgs args = device_arguments(crow, col, value, index.size(0), normalize, power);
  args.lists = nd::device_lists(index, key, args.rows);
  args.largest = largest_of(largest, args.num_queries);
  args.features = nd::device_features(features_of(query, gallery, args.rows));
  args.lambda = lambda_value;
  args.top_k = top_k;
  Tensor distance = nd::empty({args.num_queries, top_k}, ScalarType::Double, index);
  Tensor found = nd::empty({args.num_queries, top_k}, ScalarType::Long, index);
  Tensor rescanned = nd::empty({1}, ScalarType::Long, index);
  args.best = static_cast<double*>(distance.mutable_data_ptr());
  args.found = static_cast<int64_t*>(found.mutable_data_ptr());
  args.rescanned = static_cast<int64_t*>(rescanned.mutable_data_ptr());
  Tensor workspace = jaccard_workspace(args, crow);
  void* const stream = nd::current_cuda_stream(crow.get_device_index());
  nd::check_cuda(ND_CUDA(nd_jaccard_rerank_top_k)(&args, workspace.mutable_data_ptr(), stream), "jaccard_rerank_top_k");
  return {distance, found, rescanned};
}

Csr jaccard_distance_cuda(Tensor crow, Tensor col, Tensor value) {
  ND_RANGE("jaccard_distance");
  const DeviceGuard guard(crow.get_device_index());
  NdJaccardArgs args = device_arguments(crow, col, value, 0, true, 2);
  Tensor crow_out = nd::empty({args.rows + 1}, ScalarType::Long, crow);
  args.crow_out = static_cast<int64_t*>(crow_out.mutable_data_ptr());
  Tensor workspace = jaccard_workspace(args, crow);
  void* const stream = nd::current_cuda_stream(crow.get_device_index());
  nd::check_cuda(ND_CUDA(nd_jaccard_distance_count)(&args, workspace.mutable_data_ptr(), stream), "jaccard_distance");
  const int64_t entries = nd::read_number(torch::stable::narrow(crow_out, 0, args.rows, 1));
  Tensor col_out = nd::empty({entries}, ScalarType::Int, crow), out = nd::empty({entries}, ScalarType::Float, crow);
  args.col_out = static_cast<int32_t*>(col_out.mutable_data_ptr());
  args.value_out = static_cast<float*>(out.mutable_data_ptr());
  nd::check_cuda(ND_CUDA(nd_jaccard_distance_fill)(&args, workspace.mutable_data_ptr(), stream), "jaccard_distance");
  return {crow_out, col_out, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  const auto define = [&](const std::string& name, const std::string& rest) {
    m.def((name + rest).c_str());
    m.def((name + "_device" + rest).c_str());
  };
  define(
      "reciprocal_encoding",
      "(Tensor index, Tensor key, Tensor largest, Tensor? query, Tensor? gallery, int forward, int half, int expand, "
      "bool normalize, int power) -> (Tensor crow, Tensor col, Tensor value)");
  define("jaccard_rerank",
         "(Tensor crow, Tensor col, Tensor value, Tensor largest, Tensor(a!) distance, float lambda_value, bool "
         "normalize, int power) -> ()");
  define("jaccard_rerank_top_k",
         "(Tensor crow, Tensor col, Tensor value, Tensor index, Tensor key, Tensor largest, Tensor? query, Tensor? "
         "gallery, int top_k, float lambda_value, bool normalize, int power) -> (Tensor distance, Tensor found, Tensor "
         "rescanned)");
  define("jaccard_distance",
         "(Tensor crow, Tensor col, Tensor value) -> (Tensor crow_out, Tensor col_out, Tensor out)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("reciprocal_encoding", TORCH_BOX(&reciprocal_encoding_cpu));
  m.impl("jaccard_rerank", TORCH_BOX(&jaccard_rerank_cpu));
  m.impl("jaccard_rerank_top_k", TORCH_BOX(&jaccard_rerank_top_k_cpu));
  m.impl("jaccard_distance", TORCH_BOX(&jaccard_distance_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CUDA, m) {
  m.impl("reciprocal_encoding_device", TORCH_BOX(&reciprocal_encoding_cuda));
  m.impl("jaccard_rerank_device", TORCH_BOX(&jaccard_rerank_cuda));
  m.impl("jaccard_rerank_top_k_device", TORCH_BOX(&jaccard_rerank_top_k_cuda));
  m.impl("jaccard_distance_device", TORCH_BOX(&jaccard_distance_cuda));
}
