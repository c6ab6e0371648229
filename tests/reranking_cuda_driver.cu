// Runs the CUDA kernels of re-ranking and of retrieval metrics on small random rows, for the sanitizers; results and
// workspaces have exactly the size asked for. Prints a line for each; 1 if a result is wrong, by what needs no second
// implementation: rows of V' sum to 1, best rows are the smallest of the dense result, ranks lie in the gallery.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace {

constexpr int64_t kQueries = 5, kGallery = 44, kRows = kQueries + kGallery, kDim = 6, kNeighbours = 13, kLonger = 16;

int failures = 0;

void expect(const char* what, bool holds) {
  if (holds) return;
  failures++;
  std::printf("  %s: does not hold\n", what);
}

struct Aligned {
  void* bytes;
  explicit Aligned(size_t size) : bytes(std::aligned_alloc(256, (size + 255) / 256 * 256)) {
    std::printf("%zu bytes of workspace\n", size);
  }
  ~Aligned() { std::free(bytes); }
};

struct Rows {
  std::vector<float> x;
  std::vector<int64_t> index, query_index;
  std::vector<double> key, query_key, largest;
  std::vector<float> dense;

  explicit Rows(bool cosine) : x(kRows * kDim) {
    unsigned state = 7;
    for (float& value : x) value = 0.1f + static_cast<float>((state = state * 1664525u + 1013904223u) >> 20) / 4096.0f;
    for (int64_t i = 0; i < kRows; i++) {
      std::vector<std::pair<double, int64_t>> all;
      for (int64_t j = 0; j < kRows; j++) all.push_back({i == j ? 0.0 : distance(i, j, cosine), j});
      std::sort(all.begin(), all.end());
      for (int64_t a = 0; a < kNeighbours; a++) index.push_back(all[a].second), key.push_back(all[a].first);
      largest.push_back(all.back().first);
      for (int64_t a = 0; i < kQueries && a < kLonger; a++)
        query_index.push_back(all[a].second), query_key.push_back(all[a].first);
      for (int64_t j = kQueries; i < kQueries && j < kRows; j++)
        dense.push_back(static_cast<float>(distance(i, j, cosine)));
    }
  }

  double distance(int64_t i, int64_t j, bool cosine) const {
    double squared = 0, product = 0, a = 0, b = 0;
    for (int64_t k = 0; k < kDim; k++) {
      const double u = x[i * kDim + k], v = x[j * kDim + k];
      squared += (u - v) * (u - v);
      product += u * v;
      a += u * u;
      b += v * v;
    }
    return cosine ? 1 - product / std::sqrt(a * b) : squared;
  }

  NdLists lists() const { return {kRows, kNeighbours, index.data(), key.data()}; }
  NdLists query_lists() const { return {kRows, kLonger, query_index.data(), query_key.data()}; }
  NdFeatures features() const { return {x.data(), x.data() + kQueries * kDim, 0, kQueries, kDim, kDim, kDim}; }
};

// Whether the best [kQueries, top_k], times sign, are the smallest of dense, times sign.
void expect_best(const std::vector<double>& best, const std::vector<float>& dense, int64_t top_k, double sign) {
  for (int64_t q = 0; q < kQueries; q++) {
    std::vector<double> row(dense.begin() + q * kGallery, dense.begin() + (q + 1) * kGallery);
    for (double& value : row) value *= sign;
    std::sort(row.begin(), row.end());
    for (int64_t a = 0; a < std::min(top_k, kGallery); a++)
      expect("best", std::fabs(sign * best[q * top_k + a] - row[a]) < 1e-5);
  }
}

void drive_jaccard() {
  const Rows rows(false);
  NdReciprocalEncodingArgs encoding = {};
  encoding.lists = rows.lists();
  encoding.largest = rows.largest.data();
  encoding.features = rows.features();
  encoding.forward = 11;
  encoding.half = 6;
  encoding.expand = 4;
  encoding.normalize = 1;
  encoding.power = 2;
  const int64_t room = kRows * nd_reciprocal_encoding_room(&encoding);
  std::vector<int64_t> crow(kRows + 1);
  std::vector<int32_t> col(room);
  std::vector<float> value(room);
  encoding.crow = crow.data();
  encoding.col = col.data();
  encoding.value = value.data();
  const Aligned first(nd_reciprocal_encoding_workspace(&encoding));
  expect("encoding", nd_reciprocal_encoding(&encoding, first.bytes, nullptr) == 0);
  for (int64_t i = 0; i < kRows; i++) {
    double sum = 0;
    for (int64_t e = crow[i]; e < crow[i + 1]; e++) sum += value[e];
    expect("sum of a row", std::fabs(sum - 1) < 1e-5);
  }

  NdJaccardArgs dense = {};
  dense.rows = kRows;
  dense.num_queries = kQueries;
  dense.crow = crow.data();
  dense.col = col.data();
  dense.value = value.data();
  dense.room = room;
  dense.largest = rows.largest.data();
  dense.lambda = 0.9;
  dense.normalize = 1;
  dense.power = 2;
  std::vector<float> mixed = rows.dense;
  dense.distance = mixed.data();
  const Aligned second(nd_jaccard_workspace(&dense));
  expect("dense", nd_jaccard_rerank(&dense, second.bytes, nullptr) == 0);
  for (const int64_t top_k : {3, 30, 50}) {
    std::vector<double> best(kQueries * top_k);
    std::vector<int64_t> found(kQueries * top_k), rescanned(1);
    NdJaccardArgs top = dense;
    top.distance = nullptr;
    top.lists = rows.query_lists();
    top.features = rows.features();
    top.top_k = top_k;
    top.best = best.data();
    top.found = found.data();
    top.rescanned = rescanned.data();
    const Aligned third(nd_jaccard_workspace(&top));
    expect("top rows", nd_jaccard_rerank_top_k(&top, third.bytes, nullptr) == 0);
    expect_best(best, mixed, top_k, 1);
    expect("rescanned", top_k < 30 || rescanned[0] > 0);
  }
  std::vector<int64_t> crow_out(kRows + 1);
  NdJaccardArgs pairs = dense;
  pairs.num_queries = 0;
  pairs.crow_out = crow_out.data();
  const Aligned fourth(nd_jaccard_workspace(&pairs));
  expect("count", nd_jaccard_distance_count(&pairs, fourth.bytes, nullptr) == 0);
  std::vector<int32_t> col_out(crow_out[kRows]);
  std::vector<float> value_out(crow_out[kRows]);
  pairs.col_out = col_out.data();
  pairs.value_out = value_out.data();
  expect("fill", nd_jaccard_distance_fill(&pairs, fourth.bytes, nullptr) == 0);
  for (const float distance : value_out) expect("Jaccard distance", distance >= 0 && distance <= 1);
}

void drive_gnn(int64_t expand) {
  const Rows rows(true);
  std::vector<float> scores = rows.dense;
  for (const int64_t top_k : {0, 5}) {
    std::vector<double> best(kQueries * top_k);
    std::vector<int64_t> found(kQueries * top_k), edges(1);
    NdGnnArgs args = {};
    args.lists = rows.lists();
    args.num_queries = kQueries;
    args.expand = expand;
    args.lambda = 0.3;
    args.distance = top_k ? nullptr : scores.data();
    args.query_lists = rows.query_lists();
    args.features = rows.features();
    args.top_k = top_k;
    args.score = best.data();
    args.found = found.data();
    const Aligned layer(nd_gnn_layer_workspace(&args));
    expect("layer", nd_gnn_layer(&args, edges.data(), layer.bytes, nullptr) == 0);
    args.edges = edges[0];
    const Aligned workspace(nd_gnn_rerank_workspace(&args));
    expect("scores", nd_gnn_rerank(&args, layer.bytes, workspace.bytes, nullptr) == 0);
    if (top_k) expect_best(best, scores, top_k, -1);
  }
}

void drive_metrics(bool bounded, int32_t precision) {
  const Rows rows(false);
  std::vector<int64_t> order, begin, end, group(kQueries, 0);
  std::vector<int32_t> identity(kGallery);
  for (int64_t j = 0; j < kGallery; j++) identity[j] = static_cast<int32_t>(j % 3);
  for (int32_t p = 0; p < 3; p++)
    for (int64_t j = p; j < kGallery; j += 3) order.push_back(j);
  for (int64_t q = 0; q < kQueries; q++) {
    begin.push_back(
        std::lower_bound(order.begin(), order.end(), q % 3, [](int64_t j, int64_t p) { return j % 3 < p; }) -
        order.begin());
    end.push_back(
        std::lower_bound(order.begin(), order.end(), q % 3 + 1, [](int64_t j, int64_t p) { return j % 3 < p; }) -
        order.begin());
  }
  std::vector<uint8_t> excluded(kGallery);
  excluded[4] = 1;
  std::vector<double> slack(kQueries, 0.05), unit(kRows, 1.0), ap(kQueries), inp(kQueries);
  std::vector<int64_t> camera(kRows), first_rank(kQueries);
  for (int64_t i = 0; i < kRows; i++) camera[i] = i % 4;
  NdRetrievalMetricsArgs args = {};
  args.distance = rows.dense.data();
  args.nq = kQueries;
  args.ng = kGallery;
  args.stride = kGallery;
  args.order = order.data();
  args.begin = begin.data();
  args.end = end.data();
  args.query_camera = camera.data();
  args.gallery_camera = camera.data() + kQueries;
  args.excluded = excluded.data();
  args.group = group.data();
  args.groups = 1;
  args.identity = identity.data();
  args.precision = precision;
  args.slack = bounded ? slack.data() : nullptr;
  args.features = rows.features();
  args.query_unit = unit.data();
  args.gallery_unit = unit.data();
  args.ap = ap.data();
  args.inp = inp.data();
  args.first_rank = first_rank.data();
  const Aligned workspace(nd_retrieval_metrics_workspace(&args));
  expect("metrics", nd_retrieval_metrics(&args, workspace.bytes, nullptr) == 0);
  for (int64_t q = 0; q < kQueries; q++) {
    expect("precision", ap[q] > 0 && ap[q] <= 1 && inp[q] > 0 && inp[q] <= 1);
    expect("rank", first_rank[q] >= 1 && first_rank[q] <= 3);
  }
}

}  // namespace

int main() {
  drive_jaccard();
  drive_gnn(1);
  drive_gnn(4);
  for (const bool bounded : {false, true})
    for (const int32_t precision : {0, 1, 2}) drive_metrics(bounded, precision);
  return failures > 0;
}
