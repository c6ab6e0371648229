// Operators of GNN re-ranking: checks and threads around csrc/cpu/gnn_rerank.cpp.
//
//   gnn_rerank        cosine distances [nq, N - nq] -> (1 - lambda) <A_i, A_g> + lambda cos(i, g), in place
//   gnn_rerank_top_k  the largest top_k of that matrix
//
// CUDA tensors go to the PyTorch reference, registered from Python.
#include "neuraldeps/gnn_rerank.hpp"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <tuple>

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

reranking::Lists lists_of(Tensor& index, Tensor& key, int64_t targets) {
  if (index.scalar_type() != ScalarType::Long || key.scalar_type() != ScalarType::Double || index.dim() != 2 ||
      key.dim() != 2 || key.size(0) != index.size(0) || key.size(1) != index.size(1) || index.size(1) < 1)
    invalid("index int64 and key float64 must be [N, K], K of 1 or more");
  index = torch::stable::contiguous(index);
  key = torch::stable::contiguous(key);
  const reranking::Lists lists = {index.size(0), index.size(1), static_cast<const int64_t*>(index.const_data_ptr()),
                                  static_cast<const double*>(key.const_data_ptr()), nullptr};
  for (int64_t e = 0; e < lists.rows * lists.k; e++)
    if (lists.index[e] < 0 || lists.index[e] >= targets)
      invalid("index must be in 0.." + std::to_string(targets - 1) + ", not " + std::to_string(lists.index[e]));
  return lists;
}

void check_expand(int64_t expand, const reranking::Lists& lists) {
  if (expand < 1 || expand > lists.k)
    invalid("expand must be in 1.." + std::to_string(lists.k) + ", the length of the lists, not " +
            std::to_string(expand));
}

void gnn_rerank_cpu(Tensor index, Tensor key, Tensor distance, int64_t expand, double lambda_value) {
  ND_RANGE("gnn_rerank");
  const reranking::Lists lists = lists_of(index, key, index.size(0));
  check_expand(expand, lists);
  if (distance.dim() != 2 || distance.scalar_type() != ScalarType::Float || !distance.is_contiguous() ||
      distance.size(0) + distance.size(1) != lists.rows)
    invalid("distance must be contiguous float32 [nq, N - nq]");
  reranking::gnn_dense(lists, distance.size(0), expand, lambda_value, static_cast<float*>(distance.mutable_data_ptr()),
                       parallel);
}

std::tuple<Tensor, Tensor> gnn_rerank_top_k_cpu(Tensor index, Tensor key, Tensor query_index, Tensor query_key,
                                                Tensor query, Tensor gallery, int64_t top_k, int64_t expand,
                                                double lambda_value) {
  ND_RANGE("gnn_rerank_top_k");
  const reranking::Lists lists = lists_of(index, key, index.size(0));
  const reranking::Lists query_lists = lists_of(query_index, query_key, lists.rows);
  check_expand(expand, lists);
  if (top_k < 1) invalid("top_k must be positive, not " + std::to_string(top_k));
  for (Tensor* x : {&query, &gallery}) {
    if ((x->scalar_type() != ScalarType::Float && x->scalar_type() != ScalarType::Double) ||
        x->scalar_type() != query.scalar_type() || x->dim() != 2 || x->size(1) != query.size(1))
      invalid("query and gallery must be [N, D] float32 or float64, of one dtype");
    if (x->stride(1) != 1) *x = torch::stable::contiguous(*x);
  }
  if (query.size(0) != query_lists.rows || query.size(0) + gallery.size(0) != lists.rows)
    invalid("query and gallery must have as many rows as there are lists");
  const reranking::Features features = {
      query.const_data_ptr(), gallery.const_data_ptr(), nd::dtype_of("query", query), query.size(0), query.size(1),
      query.stride(0),        gallery.stride(0)};
  Tensor score = nd::empty({query.size(0), top_k}, ScalarType::Double, index);
  Tensor found = nd::empty({query.size(0), top_k}, ScalarType::Long, index);
  const reranking::TopK out = {top_k, static_cast<double*>(score.mutable_data_ptr()),
                               static_cast<int64_t*>(found.mutable_data_ptr())};
  reranking::gnn_top_k(lists, query_lists, features, expand, lambda_value, out, parallel);
  return {score, found};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("gnn_rerank(Tensor index, Tensor key, Tensor(a!) distance, int expand, float lambda_value) -> ()");
  m.def(
      "gnn_rerank_top_k(Tensor index, Tensor key, Tensor query_index, Tensor query_key, Tensor query, Tensor gallery, "
      "int top_k, int expand, float lambda_value) -> (Tensor score, Tensor found)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("gnn_rerank", TORCH_BOX(&gnn_rerank_cpu));
  m.impl("gnn_rerank_top_k", TORCH_BOX(&gnn_rerank_top_k_cpu));
}
