// Operators of k-reciprocal re-ranking: checks and threads around csrc/cpu/reranking.cpp.
//
//   reciprocal_encoding   expanded weights V' of the k-reciprocal neighbours, CSR [N, N]
//   jaccard_rerank        squared distances [nq, N - nq] -> (1 - lambda) Jaccard + lambda original, in place
//   jaccard_rerank_top_k  the smallest top_k of that matrix, and how many rows took all distances to decide
//   jaccard_distance      Jaccard distances below 1 of all rows with all, CSR [N, N]
//
// CUDA tensors go to the PyTorch reference, registered from Python.
#include "neuraldeps/reranking.hpp"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "neuraldeps/nvtx.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace reranking = nd::reranking;

// Ranges so large that what a range sets up per row of the matrix does not count.
void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  const int64_t grain = std::max<int64_t>(64, count / (16 * static_cast<int64_t>(torch::stable::get_num_threads())));
  nd::hand_out_ranges(count, grain, 0, [&](int64_t begin, int64_t end, void*) { f(begin, end); });
}

template <class T>
const T* values(const char* name, Tensor& x, ScalarType dtype, int64_t dim) {
  if (x.scalar_type() != dtype || x.dim() != dim) invalid(std::string(name) + " has a wrong dtype or shape");
  x = torch::stable::contiguous(x);
  return static_cast<const T*>(x.const_data_ptr());
}

reranking::Lists lists_of(Tensor& index, Tensor& key, Tensor& largest, int64_t targets) {
  reranking::Lists lists = {};
  lists.index = values<int64_t>("index", index, ScalarType::Long, 2);
  lists.key = values<double>("key", key, ScalarType::Double, 2);
  lists.largest = values<double>("largest", largest, ScalarType::Double, 1);
  lists.rows = index.size(0);
  lists.k = index.size(1);
  if (key.size(0) != lists.rows || key.size(1) != lists.k || largest.size(0) < lists.rows)
    invalid("index and key must be [N, K], largest [N]");
  if (lists.k < 1 && lists.rows > 0) invalid("index must list one neighbour or more a row");
  for (int64_t e = 0; e < lists.rows * lists.k; e++)
    if (lists.index[e] < 0 || lists.index[e] >= targets)
      invalid("index must be in 0.." + std::to_string(targets - 1) + ", not " + std::to_string(lists.index[e]));
  return lists;
}

// Rows of query, then of gallery; both or neither are given.
reranking::Features features_of(std::optional<Tensor>& query, std::optional<Tensor>& gallery, int64_t rows) {
  reranking::Features features = {};
  if (!query || !gallery) return features;
  features.dtype = nd::dtype_of("query", *query);
  for (Tensor* x : {&*query, &*gallery}) {
    if (x->scalar_type() != ScalarType::Float && x->scalar_type() != ScalarType::Double)
      invalid("query and gallery must be float32 or float64");
    if (x->dim() != 2 || x->scalar_type() != query->scalar_type() || x->size(1) != query->size(1))
      invalid("query and gallery must be [N, D] of one dtype");
    if (x->stride(1) != 1) *x = torch::stable::contiguous(*x);
  }
  if (query->size(0) + gallery->size(0) != rows) invalid("query and gallery must have as many rows as there are lists");
  features.query = query->const_data_ptr();
  features.gallery = gallery->const_data_ptr();
  features.num_queries = query->size(0);
  features.dim = query->size(1);
  features.query_stride = query->stride(0);
  features.gallery_stride = gallery->stride(0);
  return features;
}

reranking::Options options_of(bool normalize, int64_t power) {
  if (power != 2 && power != 4) invalid("power must be 2 or 4, not " + std::to_string(power));
  reranking::Options options = {};
  options.normalize = normalize;
  options.power = static_cast<int>(power);
  return options;
}

reranking::Encoding encoding_of(Tensor& crow, Tensor& col, Tensor& value, int64_t num_queries) {
  reranking::Encoding encoding = {};
  encoding.start = values<int64_t>("crow", crow, ScalarType::Long, 1);
  encoding.column = values<int32_t>("col", col, ScalarType::Int, 1);
  encoding.value = values<float>("value", value, ScalarType::Float, 1);
  encoding.rows = crow.size(0) - 1;
  encoding.num_queries = num_queries;
  if (encoding.rows < 0 || num_queries < 0 || num_queries > encoding.rows || col.size(0) != value.size(0) ||
      encoding.start[encoding.rows] != col.size(0))
    invalid("crow, col and value must be a CSR matrix [N, N] with N >= num_queries");
  return encoding;
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
  reranking::Options options = options_of(normalize, power);
  if (forward < 1 || half < 1 || expand < 1) invalid("forward, half and expand must be positive");
  options.forward = forward;
  options.half = half;
  options.expand = expand;
  return tensors_of(reranking::reciprocal_encoding(lists, features, options, parallel), index);
}

void jaccard_rerank_cpu(Tensor crow, Tensor col, Tensor value, Tensor largest, Tensor distance, double lambda_value,
                        bool normalize, int64_t power) {
  ND_RANGE("jaccard_rerank");
  if (distance.dim() != 2 || distance.scalar_type() != ScalarType::Float || !distance.is_contiguous())
    invalid("distance must be contiguous float32 [nq, ng]");
  const reranking::Encoding encoding = encoding_of(crow, col, value, distance.size(0));
  if (distance.size(1) != encoding.rows - encoding.num_queries) invalid("distance must be [nq, N - nq]");
  const double* largest_at = values<double>("largest", largest, ScalarType::Double, 1);
  if (largest.size(0) < encoding.num_queries) invalid("largest must be [N]");
  reranking::mix_dense(encoding, largest_at, options_of(normalize, power), lambda_value,
                       static_cast<float*>(distance.mutable_data_ptr()), parallel);
}

Csr jaccard_rerank_top_k_cpu(Tensor crow, Tensor col, Tensor value, Tensor index, Tensor key, Tensor largest,
                             std::optional<Tensor> query, std::optional<Tensor> gallery, int64_t top_k,
                             double lambda_value, bool normalize, int64_t power) {
  ND_RANGE("jaccard_rerank_top_k");
  const reranking::Encoding encoding = encoding_of(crow, col, value, index.size(0));
  const reranking::Lists lists = lists_of(index, key, largest, encoding.rows);
  const reranking::Features features = features_of(query, gallery, encoding.rows);
  if (top_k < 1) invalid("top_k must be positive, not " + std::to_string(top_k));
  Tensor distance = nd::empty({lists.rows, top_k}, ScalarType::Double, index);
  Tensor found = nd::empty({lists.rows, top_k}, ScalarType::Long, index);
  Tensor rescanned = nd::empty({1}, ScalarType::Long, index);
  const reranking::TopK out = {top_k, static_cast<double*>(distance.mutable_data_ptr()),
                               static_cast<int64_t*>(found.mutable_data_ptr())};
  *static_cast<int64_t*>(rescanned.mutable_data_ptr()) =
      reranking::mix_top_k(encoding, lists, features, options_of(normalize, power), lambda_value, out, parallel);
  return {distance, found, rescanned};
}

Csr jaccard_distance_cpu(Tensor crow, Tensor col, Tensor value) {
  ND_RANGE("jaccard_distance");
  return tensors_of(reranking::jaccard_rows(encoding_of(crow, col, value, 0), parallel), crow);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def(
      "reciprocal_encoding(Tensor index, Tensor key, Tensor largest, Tensor? query, Tensor? gallery, int forward, int "
      "half, int expand, "
      "bool normalize, int power) -> (Tensor crow, Tensor col, Tensor value)");
  m.def(
      "jaccard_rerank(Tensor crow, Tensor col, Tensor value, Tensor largest, Tensor(a!) distance, float lambda_value, "
      "bool normalize, int power) -> ()");
  m.def(
      "jaccard_rerank_top_k(Tensor crow, Tensor col, Tensor value, Tensor index, Tensor key, Tensor largest, Tensor? "
      "query, Tensor? gallery, int top_k, float lambda_value, bool normalize, int power) -> (Tensor distance, Tensor "
      "found, Tensor "
      "rescanned)");
  m.def("jaccard_distance(Tensor crow, Tensor col, Tensor value) -> (Tensor crow_out, Tensor col_out, Tensor out)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("reciprocal_encoding", TORCH_BOX(&reciprocal_encoding_cpu));
  m.impl("jaccard_rerank", TORCH_BOX(&jaccard_rerank_cpu));
  m.impl("jaccard_rerank_top_k", TORCH_BOX(&jaccard_rerank_top_k_cpu));
  m.impl("jaccard_distance", TORCH_BOX(&jaccard_distance_cpu));
}
