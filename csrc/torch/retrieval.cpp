// Operators of the hot path retrieval: checks and threads.
//
//   neighbors   for every row of x the k rows of y (or of x) of smallest (key, index), the key in float64; the largest
//               key of every row; the keys of the first num_queries rows with all others
//   neighbors_and_largest   the same for rows of x in y with squared distances, and the largest of every row
//
// Kernels: csrc/cpu/retrieval.cpp and csrc/cuda/retrieval.cu. On CUDA neuraldeps_kernels/ops/retrieval_cuda.py calls
// the stages neighbors_prepare, neighbors_offer, neighbors_finish and neighbors_dense, with matrix products in between.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
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

using nd::allocate;
using nd::hand_out;
using nd::hand_out_ranges;
using nd::invalid;
using nd::Memory;
using nd::cpu::Dtype;
using nd::cpu::Metric;
using nd::cpu::NeighborsArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 64;         // rows handed out together
constexpr int64_t kFewUndecided = 64;  // one row in so many may be left to float64

Metric metric_of(const std::string& name) {
  if (name == "sqeuclidean") return Metric::kSquaredEuclidean;
  if (name == "cosine") return Metric::kCosine;
  if (name == "inner_product") return Metric::kInnerProduct;
  invalid("metric must be sqeuclidean, cosine or inner_product, not " + name);
}

// Rows that the kernel reads: float32 or float64, values of a row side by side.
Tensor readable(const char* name, Tensor x) {
  if (x.dim() != 2) invalid(std::string(name) + " must be [N, D]");
  const Dtype dtype = nd::dtype_of(name, x);
  if (dtype == Dtype::kBfloat16 || dtype == Dtype::kFloat16) {
    Tensor wide = nd::empty({x.size(0), x.size(1)}, ScalarType::Float, x);
    torch::stable::copy_(wide, x);
    return wide;
  }
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

// Rows that are searched for.
int64_t num_searched(const NeighborsArgs& args) { return args.joined ? args.n + args.m : args.n; }

[[noreturn]] void refuse_row(const NeighborsArgs& args, int64_t row) {
  const std::string name = row < args.n ? "x" : "y", number = std::to_string(row < args.n ? row : row - args.n);
  const std::string wanted = args.metric == Metric::kCosine ? "finite and without zero rows" : "finite";
  invalid(name + " must be " + wanted + ", but its row " + number + " is not");
}

// All stages but for the rows that ran out of room, which are returned.
std::vector<int64_t> search_in_lists(NeighborsArgs& args, const nd::cpu::NeighborsPlan& plan) {
  const nd::cpu::Kernels& kernels = nd::cpu::kernels();
  const int64_t rows = num_searched(args);
  const std::unique_ptr<bool[]> undecided(new bool[static_cast<size_t>(rows)]);
  args.undecided = undecided.get();
  hand_out_ranges(plan.rows, kGrain, 0,
                  [&](int64_t begin, int64_t end, void*) { kernels.neighbors_scan(args, begin, end); });
  const int64_t bad = kernels.neighbors_settle(args);
  if (bad >= 0) refuse_row(args, bad);
  hand_out(plan.strips, 0, [&](int64_t strip, void*) { kernels.neighbors_pack(args, strip, strip + 1); });
  hand_out(plan.search_tasks, plan.workspace_bytes,
           [&](int64_t task, void* workspace) { kernels.neighbors_search(args, task, workspace); });
  hand_out_ranges(rows, kGrain, plan.workspace_bytes, [&](int64_t begin, int64_t end, void* workspace) {
    kernels.neighbors_finish(args, begin, end, workspace);
  });
  std::vector<int64_t> left;
  for (int64_t i = 0; i < rows; i++)
    if (undecided[static_cast<size_t>(i)]) left.push_back(i);
  return left;
}

// Candidates in bfloat16 if wanted; where many rows have too many of them, in float32; what is left in float64.
void search(NeighborsArgs args) {
  for (;;) {
    const nd::cpu::NeighborsPlan plan = nd::cpu::kernels().neighbors_plan(args);
    const Memory state = allocate(plan.state_bytes);
    args.state = state.get();
    const std::vector<int64_t> left = search_in_lists(args, plan);
    const int64_t count = static_cast<int64_t>(left.size());
    if (args.reduced && count > num_searched(args) / kFewUndecided) {
      args.reduced = false;
      continue;
    }
    hand_out(count, plan.workspace_bytes, [&](int64_t task, void* workspace) {
      nd::cpu::kernels().neighbors_exact(args, left[static_cast<size_t>(task)], workspace);
    });
    return;
  }
}

// Arguments of the rows x and y, which may be replaced by copies; without y, x is searched within itself.
NeighborsArgs problem(Tensor& x, std::optional<Tensor>& y, bool joined, int64_t k, const std::string& metric,
                      bool reduced) {
  x = readable("x", x);
  NeighborsArgs args = {};
  if (y) {
    y = readable("y", *y);
    if (y->scalar_type() != x.scalar_type()) invalid("y must have the dtype of x");
    if (y->size(1) != x.size(1)) invalid("y must have as many columns as x");
    args.y = y->const_data_ptr();
    args.m = y->size(0);
    args.y_stride = y->stride(0);
  }
  args.joined = joined || !y;
  args.x = x.const_data_ptr();
  args.dtype = nd::dtype_of("x", x);
  args.n = x.size(0);
  args.dim = x.size(1);
  args.x_stride = x.stride(0);
  args.metric = metric_of(metric);
  args.k = k;
  args.reduced = reduced;
  const int64_t among = args.joined ? args.n + args.m : args.m;
  if (k < 1 || k > among)
    invalid("k must be in 1.." + std::to_string(among) + ", the rows to search in, not " + std::to_string(k));
  if (among > std::numeric_limits<int32_t>::max()) invalid("rows must be fewer than 2^31");
  if (args.dim < 1) invalid("x must have columns");
  return args;
}

std::tuple<Tensor, Tensor> neighbors_cpu(Tensor x, std::optional<Tensor> y, int64_t k, std::string metric,
                                         bool reduced) {
  ND_RANGE("neighbors");
  NeighborsArgs args = problem(x, y, false, k, metric, reduced);
  Tensor key = nd::empty({args.n, k}, ScalarType::Double, x), index = nd::empty({args.n, k}, ScalarType::Long, x);
  if (args.n == 0) return {key, index};
  args.key = static_cast<double*>(key.mutable_data_ptr());
  args.index = static_cast<int64_t*>(index.mutable_data_ptr());
  search(args);
  return {key, index};
}

std::tuple<Tensor, Tensor, Tensor> neighbors_and_largest_cpu(Tensor x, Tensor y, int64_t k, bool reduced) {
  ND_RANGE("neighbors_and_largest");
  std::optional<Tensor> base = y;
  NeighborsArgs args = problem(x, base, false, k, "sqeuclidean", reduced);
  Tensor key = nd::empty({args.n, k}, ScalarType::Double, x), index = nd::empty({args.n, k}, ScalarType::Long, x);
  Tensor largest = nd::empty({args.n}, ScalarType::Double, x);
  if (args.n == 0) return {key, index, largest};
  args.key = static_cast<double*>(key.mutable_data_ptr());
  args.index = static_cast<int64_t*>(index.mutable_data_ptr());
  args.largest = static_cast<double*>(largest.mutable_data_ptr());
  search(args);
  return {key, index, largest};
}

using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Lists neighbor_lists_cpu(Tensor query, Tensor gallery, int64_t k, int64_t query_k, bool dense, bool reduced,
                         std::string metric) {
  ND_RANGE("neighbor_lists");
  std::optional<Tensor> y = gallery;
  NeighborsArgs args = problem(query, y, true, k, metric, reduced);
  if (dense && args.metric == Metric::kInnerProduct) invalid("metric must not be inner_product with dense");
  const int64_t N = args.n + args.m, Q = args.n;
  if (query_k != 0 && (query_k < k || query_k > N))
    invalid("query_k must be 0 or in k.." + std::to_string(N) + ", not " + std::to_string(query_k));
  Tensor key = nd::empty({N, k}, ScalarType::Double, query), index = nd::empty({N, k}, ScalarType::Long, query);
  Tensor largest = nd::empty({N}, ScalarType::Double, query);
  Tensor query_key = nd::empty({Q, query_k}, ScalarType::Double, query);
  Tensor query_index = nd::empty({Q, query_k}, ScalarType::Long, query);
  Tensor block = nd::empty({dense ? Q : 0, dense ? N - Q : 0}, ScalarType::Float, query);
  args.num_queries = Q;
  args.query_k = query_k;
  args.key = static_cast<double*>(key.mutable_data_ptr());
  args.index = static_cast<int64_t*>(index.mutable_data_ptr());
  args.largest = static_cast<double*>(largest.mutable_data_ptr());
  if (query_key.numel() > 0) {
    args.query_key = static_cast<double*>(query_key.mutable_data_ptr());
    args.query_index = static_cast<int64_t*>(query_index.mutable_data_ptr());
  }
  if (block.numel() > 0) args.dense = static_cast<float*>(block.mutable_data_ptr());
  search(args);
  return {key, index, largest, query_key, query_index, block};
}

// ---- CUDA: stages of one search; nothing waits for the device ----

// Of rows x and y (or none) in float32 or float64, values side by side, and how = joined, metric, k, num_queries,
// query_k, wants_largest, split, fine, bfloat16 as in NdNeighborsArgs, whose copies are left null.
NdNeighborsArgs device_arguments(const Tensor& x, const std::optional<Tensor>& y, const std::vector<int64_t>& how) {
  if (how.size() != 9) invalid("how must have 9 numbers");
  const auto check = [](const char* name, const Tensor& rows) {
    if (rows.dim() != 2 || (rows.stride(1) != 1 && rows.size(1) > 1) || nd::dtype_of(name, rows) > Dtype::kFloat64)
      invalid(std::string(name) + " must be [N, D], float32 or float64, with the values of a row side by side");
  };
  check("x", x);
  NdNeighborsArgs args = {};
  args.x = x.const_data_ptr();
  args.dtype = static_cast<int32_t>(nd::dtype_of("x", x));  // numbered alike
  args.n = x.size(0);
  args.dim = x.size(1);
  args.x_stride = x.stride(0);
  if (y) {
    check("y", *y);
    if (y->scalar_type() != x.scalar_type() || y->size(1) != x.size(1) || y->get_device_index() != x.get_device_index())
      invalid("y must have the dtype, the columns and the device of x");
    args.y = y->const_data_ptr();
    args.m = y->size(0);
    args.y_stride = y->stride(0);
  }
  args.joined = static_cast<int32_t>(how[0]);
  args.metric = static_cast<int32_t>(how[1]);
  args.k = how[2];
  args.num_queries = how[3];
  args.query_k = how[4];
  args.wants_largest = static_cast<int32_t>(how[5]);
  args.split = static_cast<int32_t>(how[6]);
  args.fine = static_cast<int32_t>(how[7]);
  args.bfloat16 = static_cast<int32_t>(how[8]);
  return args;
}

int64_t rounded_up(int64_t count) { return (count + 7) / 8 * 8; }

std::tuple<Tensor, Tensor, Tensor> neighbors_prepare_cuda(Tensor x, std::optional<Tensor> y, std::vector<int64_t> how) {
  ND_RANGE("neighbors_prepare");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NdNeighborsArgs args = device_arguments(x, y, how);
  const ScalarType type = args.bfloat16 ? ScalarType::BFloat16 : ScalarType::Half;
  const int64_t width = (args.split ? 3 : 1) * rounded_up(args.dim);
  const bool one_copy = args.joined && !args.split;
  Tensor left = nd::empty({rounded_up(args.joined ? args.n + args.m : args.n), width}, type, x);
  Tensor right = nd::empty({one_copy ? 0 : rounded_up(args.joined ? args.n + args.m : args.m), width}, type, x);
  args.left = left.mutable_data_ptr();
  args.right = one_copy ? args.left : right.mutable_data_ptr();
  const auto bytes = static_cast<int64_t>(ND_CUDA(nd_neighbors_workspace)(&args));
  Tensor workspace = nd::empty({bytes}, ScalarType::Byte, x);
  void* const stream = nd::current_cuda_stream(x.get_device_index());
  nd::check_cuda(ND_CUDA(nd_neighbors_prepare)(&args, workspace.mutable_data_ptr(), stream), "neighbors_prepare");
  return {left, right, workspace};
}

// Rows of products, ld apart, of at least so many columns.
const float* products_of(const Tensor& product, int64_t rows, int64_t columns) {
  if (product.dim() != 2 || product.scalar_type() != ScalarType::Float || product.size(0) < rows ||
      product.size(1) < columns || product.stride(1) != 1)
    invalid("product must be float32 [rows, columns], the values of a row side by side");
  return static_cast<const float*>(product.const_data_ptr());
}

void neighbors_offer_cuda(Tensor x, std::optional<Tensor> y, std::vector<int64_t> how, Tensor workspace, Tensor product,
                          int64_t first_row, int64_t rows, int64_t first_column, int64_t columns) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const NdNeighborsArgs args = device_arguments(x, y, how);
  const float* const values = products_of(product, rows, columns);
  void* const stream = nd::current_cuda_stream(x.get_device_index());
  nd::check_cuda(ND_CUDA(nd_neighbors_offer)(&args, values, product.stride(0), first_row, rows, first_column, columns,
                                             workspace.mutable_data_ptr(), stream),
                 "neighbors_offer");
}

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Found neighbors_finish_cuda(Tensor x, std::optional<Tensor> y, std::vector<int64_t> how, Tensor workspace) {
  ND_RANGE("neighbors_finish");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const NdNeighborsArgs args = device_arguments(x, y, how);
  const int64_t N = args.joined ? args.n + args.m : args.n, Q = args.num_queries;
  Tensor key = nd::empty({N, args.k}, ScalarType::Double, x), index = nd::empty({N, args.k}, ScalarType::Long, x);
  Tensor largest = nd::empty({args.wants_largest ? N : 0}, ScalarType::Double, x);
  Tensor query_key = nd::empty({Q, args.query_k}, ScalarType::Double, x);
  Tensor query_index = nd::empty({Q, args.query_k}, ScalarType::Long, x);
  const auto doubles = [](Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
  const auto longs = [](Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); };
  void* const stream = nd::current_cuda_stream(x.get_device_index());
  nd::check_cuda(
      ND_CUDA(nd_neighbors_finish)(&args, doubles(key), longs(index), args.wants_largest ? doubles(largest) : nullptr,
                                   doubles(query_key), longs(query_index), workspace.mutable_data_ptr(), stream),
      "neighbors_finish");
  return {key, index, largest, query_key, query_index};
}

void neighbors_dense_cuda(Tensor x, std::optional<Tensor> y, std::vector<int64_t> how, Tensor workspace, Tensor product,
                          int64_t first_row, int64_t rows, Tensor dense) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const NdNeighborsArgs args = device_arguments(x, y, how);
  const int64_t others = args.n + args.m - args.num_queries;
  const float* const values = products_of(product, rows, others);
  if (dense.dim() != 2 || dense.size(0) != args.num_queries || dense.size(1) != others ||
      dense.scalar_type() != ScalarType::Float || !dense.is_contiguous())
    invalid("dense must be contiguous float32 [num_queries, N - num_queries]");
  void* const stream = nd::current_cuda_stream(x.get_device_index());
  nd::check_cuda(
      ND_CUDA(nd_neighbors_dense)(&args, values, product.stride(0), first_row, rows,
                                  static_cast<float*>(dense.mutable_data_ptr()), workspace.mutable_data_ptr(), stream),
      "neighbors_dense");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("neighbors(Tensor x, Tensor? y, int k, str metric, bool reduced) -> (Tensor key, Tensor index)");
  m.def("neighbors_and_largest(Tensor x, Tensor y, int k, bool reduced) -> (Tensor key, Tensor index, Tensor largest)");
  m.def(
      "neighbor_lists(Tensor query, Tensor gallery, int k, int query_k, bool dense, bool reduced, str "
      "metric=\"sqeuclidean\") -> (Tensor key, Tensor index, Tensor largest, Tensor query_key, Tensor query_index, "
      "Tensor dense)");
  m.def("neighbors_prepare(Tensor x, Tensor? y, int[] how) -> (Tensor left, Tensor right, Tensor workspace)");
  m.def(
      "neighbors_offer(Tensor x, Tensor? y, int[] how, Tensor(a!) workspace, Tensor product, int first_row, int rows, "
      "int first_column, int columns) -> ()");
  m.def(
      "neighbors_finish(Tensor x, Tensor? y, int[] how, Tensor(a!) workspace) -> (Tensor key, Tensor index, Tensor "
      "largest, Tensor query_key, Tensor query_index)");
  m.def(
      "neighbors_dense(Tensor x, Tensor? y, int[] how, Tensor(a!) workspace, Tensor product, int first_row, int rows, "
      "Tensor(b!) dense) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("neighbors", TORCH_BOX(&neighbors_cpu));
  m.impl("neighbors_and_largest", TORCH_BOX(&neighbors_and_largest_cpu));
  m.impl("neighbor_lists", TORCH_BOX(&neighbor_lists_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CUDA, m) {
  m.impl("neighbors_prepare", TORCH_BOX(&neighbors_prepare_cuda));
  m.impl("neighbors_offer", TORCH_BOX(&neighbors_offer_cuda));
  m.impl("neighbors_finish", TORCH_BOX(&neighbors_finish_cuda));
  m.impl("neighbors_dense", TORCH_BOX(&neighbors_dense_cuda));
}
