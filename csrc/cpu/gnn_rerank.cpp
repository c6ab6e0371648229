// GNN re-ranking from neighbour lists (paper: Zhang et al. 2020; every choice as in the package's docs).
//
//   w(i,a) = cos(i, r(i,a))^2, r(i,a) the a-th nearest of i     A_0(i, r(i,a)) = 1 for a < k1
//   B_l = A_l + A_l^T,     A_{l+1}(i) = sum_{a<k2} w(i,a) B_l(r(i,a)) / norm,     two layers
//   score(i,g) = (1 - lambda) <A_2(i), A_2(g)> + lambda cos(i, g)
//
// A_2 has thousands of entries a row, B_1 hundreds: only the rows A_2 of queries are formed, one at a time, and
//
//   z_i = B_1 A_2(i),      <A_2(i), A_2(g)> = sum_{a<k2} w(g,a) z_i(r(g,a)) / norm(g).
//
// Work: entries of A_2(i) times those of a row of B_1 for every query, additions at scattered places of z_i, which
// stays in the second-level cache; so one scalar version serves all machines. Sums run in the order of lists and
// columns: the same bits for any number of threads.
#include "neuraldeps/gnn_rerank.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace nd::reranking {
namespace {

// Sum of sparse rows. `touched` lists its columns in the order of their first entry.
struct SparseSum {
  std::vector<float> value;  // by column
  std::vector<int32_t> touched;

  explicit SparseSum(int64_t columns) : value(static_cast<size_t>(columns)), owner(value.size(), -1) {}

  void begin(int64_t i) {
    row = static_cast<int32_t>(i);
    touched.clear();
  }
  void add(const Rows& rows, int64_t j, float factor) {
    for (size_t e = static_cast<size_t>(rows.start[static_cast<size_t>(j)]);
         e < static_cast<size_t>(rows.start[static_cast<size_t>(j) + 1]); e++) {
      const size_t c = static_cast<size_t>(rows.column[e]);
      if (owner[c] != row) {
        owner[c] = row;
        value[c] = 0;
        touched.push_back(rows.column[e]);
      }
      value[c] += factor * rows.value[e];
    }
  }
  double norm() const {
    double sum = 0;
    for (const int32_t c : touched) sum += std::pow(static_cast<double>(value[static_cast<size_t>(c)]), 2);
    return std::sqrt(sum);
  }

 private:
  std::vector<int32_t> owner;  // row that a value belongs to
  int32_t row = -1;
};

// The graph that all queries share: row i is a sum over its first `count` neighbours.
struct Graph {
  const Lists& lists;
  int64_t num_queries, count;
  std::vector<float> weight;  // [rows, count], at last over the norms of the rows of A_2
  Rows edges;                 // B_l, at last B_1; none for k2 = 1, where A_0 is all

  Graph(const Lists& l, int64_t queries, int64_t expand, const Parallel& parallel)
      : lists(l), num_queries(queries), count(expand > 1 ? expand : l.k) {
    weight.resize(static_cast<size_t>(lists.rows * count), 1.f);
    if (expand == 1) return;
    for (int64_t i = 0; i < lists.rows; i++)
      for (int64_t a = 0; a < count; a++)
        weight[static_cast<size_t>(i * count + a)] = static_cast<float>(std::pow(1 - lists.key[i * lists.k + a], 2));
    edges = symmetric(neighbours(), parallel);
    edges = symmetric(next_layer(parallel), parallel);
    divide_by_norms(parallel);
  }

  // Row i of the layer after `edges`, up to its norm.
  void sum_row(int64_t i, SparseSum& sum) const {
    sum.begin(i);
    for (int64_t a = 0; a < count; a++)
      sum.add(edges, lists.index[i * lists.k + a], weight[static_cast<size_t>(i * count + a)]);
  }

  // <A(i), A(g)> of query i with all of the gallery.
  void similarities(int64_t i, SparseSum& sum, std::vector<float>& z, float* similarity) const {
    std::fill(z.begin(), z.end(), 0.f);
    if (edges.start.empty()) {
      for (int64_t a = 0; a < count; a++) z[static_cast<size_t>(lists.index[i * lists.k + a])] = 1;
    } else {
      sum_row(i, sum);
      for (const int32_t c : sum.touched) {
        const float own = sum.value[static_cast<size_t>(c)];
        const int64_t end = edges.start[static_cast<size_t>(c) + 1];
        for (int64_t e = edges.start[static_cast<size_t>(c)]; e < end; e++)
          z[static_cast<size_t>(edges.column[static_cast<size_t>(e)])] += own * edges.value[static_cast<size_t>(e)];
      }
    }
    for (int64_t g = num_queries; g < lists.rows; g++) {
      const int64_t* near = lists.index + g * lists.k;
      const float* w = weight.data() + g * count;
      float score = 0;
      for (int64_t a = 0; a < count; a++) score += w[a] * z[static_cast<size_t>(near[a])];
      similarity[g - num_queries] = score;
    }
  }

 private:
  // A_0, columns ascending.
  Rows neighbours() const {
    Rows a;
    a.start.resize(static_cast<size_t>(lists.rows) + 1);
    a.column.resize(static_cast<size_t>(lists.rows * lists.k));
    a.value.resize(a.column.size(), 1.f);
    for (int64_t i = 0; i <= lists.rows; i++) a.start[static_cast<size_t>(i)] = i * lists.k;
    for (size_t e = 0; e < a.column.size(); e++) a.column[e] = static_cast<int32_t>(lists.index[e]);
    for (int64_t i = 0; i < lists.rows; i++)
      std::sort(a.column.begin() + i * lists.k, a.column.begin() + (i + 1) * lists.k);
    return a;
  }

  Rows next_layer(const Parallel& parallel) const {
    Rows a;
    a.start.assign(static_cast<size_t>(lists.rows) + 1, 0);
    parallel(lists.rows, [&](int64_t begin, int64_t end) {
      SparseSum sum(lists.rows);
      for (int64_t i = begin; i < end; i++) {
        sum_row(i, sum);
        a.start[static_cast<size_t>(i) + 1] = static_cast<int64_t>(sum.touched.size());
      }
    });
    for (size_t i = 1; i < a.start.size(); i++) a.start[i] += a.start[i - 1];
    a.column.resize(static_cast<size_t>(a.start.back()));
    a.value.resize(a.column.size());
    parallel(lists.rows, [&](int64_t begin, int64_t end) {
      SparseSum sum(lists.rows);
      for (int64_t i = begin; i < end; i++) {
        sum_row(i, sum);
        std::sort(sum.touched.begin(), sum.touched.end());
        const float factor = static_cast<float>(1 / sum.norm());
        size_t at = static_cast<size_t>(a.start[static_cast<size_t>(i)]);
        for (const int32_t c : sum.touched) {
          a.column[at] = c;
          a.value[at++] = factor * sum.value[static_cast<size_t>(c)];
        }
      }
    });
    return a;
  }

  static Rows transposed(const Rows& a) {
    Rows t;
    t.start.assign(a.start.size(), 0);
    t.column.resize(a.column.size());
    t.value.resize(a.value.size());
    for (const int32_t c : a.column) t.start[static_cast<size_t>(c) + 1]++;
    for (size_t c = 1; c < t.start.size(); c++) t.start[c] += t.start[c - 1];
    std::vector<int64_t> next(t.start.begin(), t.start.end() - 1);
    for (size_t i = 0; i + 1 < a.start.size(); i++)
      for (size_t e = static_cast<size_t>(a.start[i]); e < static_cast<size_t>(a.start[i + 1]); e++) {
        const size_t at = static_cast<size_t>(next[static_cast<size_t>(a.column[e])]++);
        t.column[at] = static_cast<int32_t>(i);
        t.value[at] = a.value[e];
      }
    return t;
  }

  // Calls put(column, value) for the entries of row i of a + t, columns ascending.
  template <class Put>
  static void for_each_sum(const Rows& a, const Rows& t, size_t i, const Put& put) {
    constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
    size_t x = static_cast<size_t>(a.start[i]), y = static_cast<size_t>(t.start[i]);
    const size_t x_end = static_cast<size_t>(a.start[i + 1]), y_end = static_cast<size_t>(t.start[i + 1]);
    while (x < x_end || y < y_end) {
      const int32_t of_x = x < x_end ? a.column[x] : kNone, of_y = y < y_end ? t.column[y] : kNone;
      const int32_t column = std::min(of_x, of_y);
      const float from_x = of_x == column ? a.value[x++] : 0, from_y = of_y == column ? t.value[y++] : 0;
      put(column, from_x + from_y);
    }
  }

  static Rows symmetric(const Rows& a, const Parallel& parallel) {
    const Rows t = transposed(a);
    Rows b;
    b.start.assign(a.start.size(), 0);
    const int64_t rows = static_cast<int64_t>(a.start.size()) - 1;
    parallel(rows, [&](int64_t begin, int64_t end) {
      for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); i++) {
        int64_t size = 0;
        for_each_sum(a, t, i, [&](int32_t, float) { size++; });
        b.start[i + 1] = size;
      }
    });
    for (size_t i = 1; i < b.start.size(); i++) b.start[i] += b.start[i - 1];
    b.column.resize(static_cast<size_t>(b.start.back()));
    b.value.resize(b.column.size());
    parallel(rows, [&](int64_t begin, int64_t end) {
      for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); i++) {
        size_t at = static_cast<size_t>(b.start[i]);
        for_each_sum(a, t, i, [&](int32_t column, float value) {
          b.column[at] = column;
          b.value[at++] = value;
        });
      }
    });
    return b;
  }

  void divide_by_norms(const Parallel& parallel) {
    parallel(lists.rows, [&](int64_t begin, int64_t end) {
      SparseSum sum(lists.rows);
      for (int64_t i = begin; i < end; i++) {
        sum_row(i, sum);
        const double norm = sum.norm();
        for (int64_t a = 0; a < count; a++) {
          float& w = weight[static_cast<size_t>(i * count + a)];
          w = static_cast<float>(static_cast<double>(w) / norm);
        }
      }
    });
  }
};

// Cosines of any two rows.
struct Cosines {
  const Features& features;
  std::vector<double> inverse_norm;

  Cosines(const Features& f, int64_t rows, const Parallel& parallel)
      : features(f), inverse_norm(static_cast<size_t>(rows)) {
    parallel(rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) inverse_norm[static_cast<size_t>(i)] = 1 / std::sqrt(product(i, i));
    });
  }

  double operator()(int64_t i, int64_t j) const {
    return product(i, j) * inverse_norm[static_cast<size_t>(i)] * inverse_norm[static_cast<size_t>(j)];
  }

 private:
  double product(int64_t i, int64_t j) const {
    return features.dtype == cpu::Dtype::kFloat32 ? product(row_of<float>(i), row_of<float>(j))
                                                  : product(row_of<double>(i), row_of<double>(j));
  }
  template <class T>
  const T* row_of(int64_t i) const {
    return i < features.num_queries
               ? static_cast<const T*>(features.query) + i * features.query_stride
               : static_cast<const T*>(features.gallery) + (i - features.num_queries) * features.gallery_stride;
  }
  template <class T>
  double product(const T* x, const T* y) const {
    constexpr int64_t kLanes = 8;
    double sum[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= features.dim; k += kLanes)
      for (int64_t l = 0; l < kLanes; l++) sum[l] += static_cast<double>(x[k + l]) * static_cast<double>(y[k + l]);
    for (; k < features.dim; k++) sum[0] += static_cast<double>(x[k]) * static_cast<double>(y[k]);
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
};

struct Scored {
  double score;
  int64_t index;
  bool operator<(const Scored& other) const {
    return score > other.score || (score == other.score && index < other.index);
  }
};

// Keeps the top_k largest of what it is offered, sorted.
struct Best {
  size_t top_k;
  std::vector<Scored> found = {};

  void offer(const Scored& one) {
    if (found.size() == top_k && !(one < found.back())) return;
    found.insert(std::lower_bound(found.begin(), found.end(), one), one);
    if (found.size() > top_k) found.pop_back();
  }
  double worst() const { return found.size() < top_k ? -std::numeric_limits<double>::infinity() : found.back().score; }
};

}  // namespace

void gnn_dense(const Lists& lists, int64_t num_queries, int64_t expand, double lambda, float* distance,
               const Parallel& parallel) {
  const Graph graph(lists, num_queries, expand, parallel);
  const int64_t gallery = lists.rows - num_queries;
  const float rest = static_cast<float>(1 - lambda), factor = static_cast<float>(lambda);
  parallel(num_queries, [&](int64_t begin, int64_t end) {
    SparseSum sum(lists.rows);
    std::vector<float> z(static_cast<size_t>(lists.rows)), similarity(static_cast<size_t>(gallery));
    for (int64_t i = begin; i < end; i++) {
      graph.similarities(i, sum, z, similarity.data());
      float* own = distance + i * gallery;
      for (int64_t j = 0; j < gallery; j++) own[j] = rest * similarity[static_cast<size_t>(j)] + factor * (1 - own[j]);
    }
  });
}

// What is not listed has at most the last listed cosine; by falling similarity, the rest cannot enter once its bound is
// below the worst kept.
void gnn_top_k(const Lists& lists, const Lists& query_lists, const Features& features, int64_t expand, double lambda,
               const TopK& out, const Parallel& parallel) {
  const int64_t num_queries = features.num_queries, gallery = lists.rows - num_queries;
  const Graph graph(lists, num_queries, expand, parallel);
  const Cosines cosine(features, lists.rows, parallel);
  parallel(num_queries, [&](int64_t begin, int64_t end) {
    SparseSum sum(lists.rows);
    std::vector<float> z(static_cast<size_t>(lists.rows)), similarity(static_cast<size_t>(gallery));
    std::vector<Scored> candidates;
    for (int64_t i = begin; i < end; i++) {
      graph.similarities(i, sum, z, similarity.data());
      Best best{static_cast<size_t>(out.top_k)};
      const double* key = query_lists.key + i * query_lists.k;
      for (int64_t a = 0; a < query_lists.k; a++) {
        const int64_t j = query_lists.index[i * query_lists.k + a] - num_queries;
        if (j < 0) continue;
        float& s = similarity[static_cast<size_t>(j)];
        best.offer({(1 - lambda) * static_cast<double>(s) + lambda * (1 - key[a]), j});
        s = std::numeric_limits<float>::quiet_NaN();  // no candidate
      }
      const double last = lambda * (1 - key[query_lists.k - 1]), worst = best.worst();
      candidates.clear();
      for (int64_t j = 0; j < gallery; j++) {
        const double bound = (1 - lambda) * static_cast<double>(similarity[static_cast<size_t>(j)]) + last;
        if (bound >= worst) candidates.push_back({bound, j});
      }
      std::sort(candidates.begin(), candidates.end());
      for (const Scored& next : candidates) {
        if (next.score < best.worst()) break;
        best.offer({next.score - last + lambda * cosine(i, num_queries + next.index), next.index});
      }
      for (int64_t a = 0; a < out.top_k; a++) {
        const bool there = a < static_cast<int64_t>(best.found.size());
        out.distance[i * out.top_k + a] =
            there ? best.found[static_cast<size_t>(a)].score : -std::numeric_limits<double>::infinity();
        out.index[i * out.top_k + a] = there ? best.found[static_cast<size_t>(a)].index : -1;
      }
    }
  });
}

}  // namespace nd::reranking
