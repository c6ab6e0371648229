// Operators of GNN re-ranking: checks around csrc/cpu/gnn_rerank.cpp and csrc/cuda/gnn_rerank.cu.
//
//   gnn_rerank        cosine distances [nq, N - nq] -> (1 - lambda) <A_i, A_g> + lambda cos(i, g), in place
//   gnn_rerank_top_k  the largest top_k of that matrix
//
// On CUDA they are called .._device, and the host waits once, for the size of the graph, unless expand is 1.
#include "neuraldeps/gnn_rerank.hpp"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <tuple>

#include "cuda_library.hpp"
#include "neighbor_lists.hpp"
#include "neuraldeps/nvtx.hpp"

namespace {

using nd::invalid;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace reranking = nd::reranking;

void check_expand(int64_t expand, const Tensor& index) {
  const int64_t k = index.size(1);
  if (expand < 1 || expand > k)
    invalid("expand must be in 1.." + std::to_string(k) + ", the length of the lists, not " + std::to_string(expand));
}

void check_distance(const Tensor& distance, int64_t rows) {
  if (distance.dim() != 2 || distance.scalar_type() != ScalarType::Float || !distance.is_contiguous() ||
      distance.size(0) + distance.size(1) != rows)
    invalid("distance must be contiguous float32 [nq, N - nq]");
}

void check_top_k(int64_t top_k) {
  if (top_k < 1) invalid("top_k must be positive, not " + std::to_string(top_k));
}

void gnn_rerank_cpu(Tensor index, Tensor key, Tensor distance, int64_t expand, double lambda_value) {
  ND_RANGE("gnn_rerank");
  const reranking::Lists lists = nd::lists_of(index, key, index.size(0));
  check_expand(expand, index);
  check_distance(distance, lists.rows);
  reranking::gnn_dense(lists, distance.size(0), expand, lambda_value, static_cast<float*>(distance.mutable_data_ptr()),
                       nd::parallel_rows);
}

std::tuple<Tensor, Tensor> gnn_rerank_top_k_cpu(Tensor index, Tensor key, Tensor query_index, Tensor query_key,
                                                Tensor query, Tensor gallery, int64_t top_k, int64_t expand,
                                                double lambda_value) {
  ND_RANGE("gnn_rerank_top_k");
  const reranking::Lists lists = nd::lists_of(index, key, index.size(0));
  const reranking::Lists query_lists = nd::lists_of(query_index, query_key, lists.rows);
  check_expand(expand, index);
  check_top_k(top_k);
  const reranking::Features features = nd::features_of(query, gallery, lists.rows);
  if (features.num_queries != query_lists.rows) invalid("query must have as many rows as query_index");
  Tensor score = nd::empty({query.size(0), top_k}, ScalarType::Double, index);
  Tensor found = nd::empty({query.size(0), top_k}, ScalarType::Long, index);
  const reranking::TopK out = {top_k, static_cast<double*>(score.mutable_data_ptr()),
                               static_cast<int64_t*>(found.mutable_data_ptr())};
  reranking::gnn_top_k(lists, query_lists, features, expand, lambda_value, out, nd::parallel_rows);
  return {score, found};
}

// ---- CUDA ----

// The scores that args ask for; `like`: a tensor on the device.
void rank_on_device(NdGnnArgs& args, const Tensor& like) {
  void* const stream = nd::current_cuda_stream(like.get_device_index());
  const auto bytes = static_cast<int64_t>(ND_CUDA(nd_gnn_layer_workspace)(&args));
  Tensor layer = nd::empty({bytes}, ScalarType::Byte, like), edges = nd::empty({1}, ScalarType::Long, like);
  if (args.expand > 1) {
    auto* const size = static_cast<int64_t*>(edges.mutable_data_ptr());
    nd::check_cuda(ND_CUDA(nd_gnn_layer)(&args, size, layer.mutable_data_ptr(), stream), "gnn_rerank");
    args.edges = nd::read_number(edges);
  }
  const auto more = static_cast<int64_t>(ND_CUDA(nd_gnn_rerank_workspace)(&args));
  Tensor workspace = nd::empty({more}, ScalarType::Byte, like);
  nd::check_cuda(ND_CUDA(nd_gnn_rerank)(&args, layer.mutable_data_ptr(), workspace.mutable_data_ptr(), stream),
                 "gnn_rerank");
}

void gnn_rerank_cuda(Tensor index, Tensor key, Tensor distance, int64_t expand, double lambda_value) {
  ND_RANGE("gnn_rerank");
  const torch::stable::accelerator::DeviceGuard guard(index.get_device_index());
  NdGnnArgs args = {};
  args.lists = nd::device_lists(index, key, index.size(0));
  check_expand(expand, index);
  check_distance(distance, index.size(0));
  if (distance.numel() == 0) return;
  args.num_queries = distance.size(0);
  args.expand = expand;
  args.lambda = lambda_value;
  args.distance = static_cast<float*>(distance.mutable_data_ptr());
  rank_on_device(args, index);
}

std::tuple<Tensor, Tensor> gnn_rerank_top_k_cuda(Tensor index, Tensor key, Tensor query_index, Tensor query_key,
                                                 Tensor query, Tensor gallery, int64_t top_k, int64_t expand,
                                                 double lambda_value) {
  ND_RANGE("gnn_rerank_top_k");
  const torch::stable::accelerator::DeviceGuard guard(index.get_device_index());
  NdGnnArgs args = {};
  args.lists = nd::device_lists(index, key, index.size(0));
  args.query_lists = nd::device_lists(query_index, query_key, index.size(0));
  check_expand(expand, index);
  check_top_k(top_k);
  const reranking::Features features = nd::features_of(query, gallery, index.size(0));
  if (features.num_queries != query_index.size(0)) invalid("query must have as many rows as query_index");
  args.features = nd::device_features(features);
  args.num_queries = features.num_queries;
  args.expand = expand;
  args.lambda = lambda_value;
  args.top_k = top_k;
  Tensor score = nd::empty({args.num_queries, top_k}, ScalarType::Double, index);
  Tensor found = nd::empty({args.num_queries, top_k}, ScalarType::Long, index);
  if (args.num_queries == 0) return {score, found};
  args.score = static_cast<double*>(score.mutable_data_ptr());
  args.found = static_cast<int64_t*>(found.mutable_data_ptr());
  rank_on_device(args, index);
  return {score, found};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  const auto define = [&](const std::string& name, const std::string& rest) {
    m.def((name + rest).c_str());
    m.def((name + "_device" + rest).c_str());
  };
  define("gnn_rerank", "(Tensor index, Tensor key, Tensor(a!) distance, int expand, float lambda_value) -> ()");
  define(
      "gnn_rerank_top_k",
      "(Tensor index, Tensor key, Tensor query_index, Tensor query_key, Tensor query, Tensor gallery, int top_k, int "
      "expand, float lambda_value) -> (Tensor score, Tensor found)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("gnn_rerank", TORCH_BOX(&gnn_rerank_cpu));
  m.impl("gnn_rerank_top_k", TORCH_BOX(&gnn_rerank_top_k_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CUDA, m) {
  m.impl("gnn_rerank_device", TORCH_BOX(&gnn_rerank_cuda));
  m.impl("gnn_rerank_top_k_device", TORCH_BOX(&gnn_rerank_top_k_cuda));
}
