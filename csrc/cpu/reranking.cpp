// k-reciprocal re-ranking from neighbour lists (papers: Zhong et al. 2017; every choice as in the package's docs).
//
//   R(i)   = { g among the first `forward` of list i : i among those of list g }
//   R*(i)  = R(i) and, for every c in R(i) of which more than 2/3 of R_half(c) lie in R(i), all of R_half(c)
//   V(i,g) = exp(-t(i, g)) / sum over R*(i)                V'(i) = mean of V(j) over the first `expand` of list i
//   s(i,j) = sum_c min(V'(i, c), V'(j, c))                 Jaccard = 1 - s / (2 - s), as rows sum to 1
//
// Work: some 20 members a row, 100 after expansion; s is accumulated column by column of the transposed gallery, a few
// thousand touched entries a query. Bound by scattered reads, so one scalar version serves all machines. Sums run in
// the order of the lists and columns: the same bits for any number of threads.
#include "neuraldeps/reranking.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace nd::reranking {
namespace {

constexpr float kSeen = -1;  // accumulator of an entry that is already scored, minus its sum

template <class T>
double squared_distance(const T* x, const T* y, int64_t dim) {
  constexpr int64_t kLanes = 8;
  double sum[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= dim; k += kLanes)
    for (int64_t l = 0; l < kLanes; l++) {
      const double d = static_cast<double>(x[k + l]) - static_cast<double>(y[k + l]);
      sum[l] += d * d;
    }
  for (; k < dim; k++) {
    const double d = static_cast<double>(x[k]) - static_cast<double>(y[k]);
    sum[0] += d * d;
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

template <class T>
const T* row_of(const Features& f, int64_t i) {
  return i < f.num_queries ? static_cast<const T*>(f.query) + i * f.query_stride
                           : static_cast<const T*>(f.gallery) + (i - f.num_queries) * f.gallery_stride;
}

double squared_distance(const Features& f, int64_t i, int64_t j) {
  return f.dtype == cpu::Dtype::kFloat32 ? squared_distance(row_of<float>(f, i), row_of<float>(f, j), f.dim)
                                         : squared_distance(row_of<double>(f, i), row_of<double>(f, j), f.dim);
}

// t of a squared distance of a row whose largest is `largest`.
double original(double key, double largest, const Options& options) {
  const double t = !options.normalize ? key : largest > 0 ? key / largest : 0;
  return options.power == 4 ? t * t : t;
}

bool contains(const int64_t* list, int64_t count, int64_t value) {
  for (int64_t a = 0; a < count; a++)
    if (list[a] == value) return true;
  return false;
}

// Mutual neighbours of i within the first `count` entries of the lists; returns their number.
int64_t reciprocal(const Lists& lists, int64_t i, int64_t count, int64_t* found) {
  const int64_t* own = lists.index + i * lists.k;
  int64_t size = 0;
  for (int64_t a = 0; a < count; a++)
    if (contains(lists.index + own[a] * lists.k, count, i)) found[size++] = own[a];
  return size;
}

// Squared distance of i and j: from either list, from the features, or as far as list i goes.
double key_of(const Lists& lists, const Features& features, int64_t i, int64_t j) {
  for (const auto& [from, to] : {std::pair{i, j}, std::pair{j, i}})
    for (int64_t a = 0; a < lists.k; a++)
      if (lists.index[from * lists.k + a] == to) return lists.key[from * lists.k + a];
  return features.dim > 0 ? squared_distance(features, i, j) : lists.key[i * lists.k + lists.k - 1];
}

// Sparse rows that threads make in any order.
struct Parts {
  std::vector<std::vector<std::pair<int32_t, float>>> rows;
  explicit Parts(int64_t count) : rows(static_cast<size_t>(count)) {}

  Rows joined(const Parallel& parallel) {
    Rows all;
    all.start.assign(rows.size() + 1, 0);
    for (size_t i = 0; i < rows.size(); i++) all.start[i + 1] = all.start[i] + static_cast<int64_t>(rows[i].size());
    all.column.resize(static_cast<size_t>(all.start.back()));
    all.value.resize(all.column.size());
    parallel(static_cast<int64_t>(rows.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        int64_t at = all.start[static_cast<size_t>(i)];
        for (const auto& [column, value] : rows[static_cast<size_t>(i)]) {
          all.column[static_cast<size_t>(at)] = column;
          all.value[static_cast<size_t>(at++)] = value;
        }
        std::vector<std::pair<int32_t, float>>().swap(rows[static_cast<size_t>(i)]);
      }
    });
    return all;
  }
};

// V of all rows.
Rows weights(const Lists& lists, const Features& features, const Options& options, const Parallel& parallel) {
  const int64_t half = std::min(options.half, lists.k), forward = std::min(options.forward, lists.k);
  std::vector<int64_t> halves(static_cast<size_t>(lists.rows * half)), half_size(static_cast<size_t>(lists.rows));
  parallel(lists.rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      half_size[static_cast<size_t>(i)] = reciprocal(lists, i, half, halves.data() + i * half);
  });
  Parts parts(lists.rows);
  parallel(lists.rows, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> members(static_cast<size_t>(forward)), all;
    for (int64_t i = begin; i < end; i++) {
      const int64_t size = reciprocal(lists, i, forward, members.data());
      all.assign(members.begin(), members.begin() + size);
      for (int64_t a = 0; a < size; a++) {
        const int64_t c = members[static_cast<size_t>(a)], count = half_size[static_cast<size_t>(c)];
        const int64_t* other = halves.data() + c * half;
        int64_t shared = 0;
        for (int64_t b = 0; b < count; b++) shared += contains(members.data(), size, other[b]);
        if (3 * shared > 2 * count) all.insert(all.end(), other, other + count);
      }
      std::sort(all.begin(), all.end());
      all.erase(std::unique(all.begin(), all.end()), all.end());
      auto& row = parts.rows[static_cast<size_t>(i)];
      double sum = 0;
      for (const int64_t j : all) {
        const double weight = std::exp(-original(key_of(lists, features, i, j), lists.largest[i], options));
        row.emplace_back(static_cast<int32_t>(j), static_cast<float>(weight));
        sum += weight;
      }
      for (auto& [column, value] : row) value = static_cast<float>(static_cast<double>(value) / sum);
    }
  });
  return parts.joined(parallel);
}

// Means of rows over the first `count` neighbours.
Rows expanded(const Rows& v, const Lists& lists, int64_t count, const Parallel& parallel) {
  Parts parts(lists.rows);
  parallel(lists.rows, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(static_cast<size_t>(lists.rows), 0.f);
    std::vector<int32_t> touched;
    for (int64_t i = begin; i < end; i++) {
      touched.clear();
      for (int64_t a = 0; a < count; a++) {
        const size_t j = static_cast<size_t>(lists.index[i * lists.k + a]);
        for (size_t e = static_cast<size_t>(v.start[j]); e < static_cast<size_t>(v.start[j + 1]); e++) {
          float& entry = sum[static_cast<size_t>(v.column[e])];
          if (entry == 0) touched.push_back(v.column[e]);
          entry += v.value[e];
        }
      }
      std::sort(touched.begin(), touched.end());
      // A weight that underflowed to 0 is listed once an entry of its column: no column may come twice.
      touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
      auto& row = parts.rows[static_cast<size_t>(i)];
      for (const int32_t column : touched) {
        float& entry = sum[static_cast<size_t>(column)];
        row.emplace_back(column, entry / static_cast<float>(count));
        entry = 0;
      }
    }
  });
  return parts.joined(parallel);
}

// Entries of rows [first, rows) by column, rows ascending.
struct Columns {
  std::vector<int64_t> start;
  std::vector<int32_t> row;
  std::vector<float> value;

  Columns(const Encoding& encoding, int64_t first) : start(static_cast<size_t>(encoding.rows) + 1, 0) {
    const int64_t begin = encoding.start[first], end = encoding.start[encoding.rows];
    for (int64_t e = begin; e < end; e++) start[static_cast<size_t>(encoding.column[e]) + 1]++;
    for (size_t c = 1; c < start.size(); c++) start[c] += start[c - 1];
    row.resize(static_cast<size_t>(end - begin));
    value.resize(row.size());
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = first; i < encoding.rows; i++)
      for (int64_t e = encoding.start[i]; e < encoding.start[i + 1]; e++) {
        const size_t at = static_cast<size_t>(next[static_cast<size_t>(encoding.column[e])]++);
        row[at] = static_cast<int32_t>(i);
        value[at] = encoding.value[e];
      }
  }
};

// Calls add(j, min(V'(i, c), V'(j, c))) for every column c that i shares with j.
template <class Add>
void for_each_shared(const Encoding& encoding, const Columns& columns, int64_t i, const Add& add) {
  for (int64_t e = encoding.start[i]; e < encoding.start[i + 1]; e++) {
    const size_t c = static_cast<size_t>(encoding.column[e]);
    const float v = encoding.value[e];
    for (size_t f = static_cast<size_t>(columns.start[c]); f < static_cast<size_t>(columns.start[c + 1]); f++)
      add(columns.row[f], std::min(v, columns.value[f]));
  }
}

double jaccard(double shared) { return std::max(0.0, 1 - shared / (2 - shared)); }

struct Scored {
  double distance;
  int64_t index;
  bool operator<(const Scored& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

// Keeps the top_k smallest of what it is offered, sorted.
struct Best {
  size_t top_k;
  std::vector<Scored> found;

  void offer(const Scored& one) {
    if (found.size() == top_k && !(one < found.back())) return;
    found.insert(std::lower_bound(found.begin(), found.end(), one), one);
    if (found.size() > top_k) found.pop_back();
  }
  double worst() const {
    return found.size() < top_k ? std::numeric_limits<double>::infinity() : found.back().distance;
  }
};

// Top rows of one query. Exact: what is not listed and shares nothing is at least (1 - lambda) + lambda t_last, what
// is not listed and shares is at least (1 - lambda) Jaccard + lambda t_last. Without features t_last is their t.
struct QueryScorer {
  const Encoding& encoding;
  const Lists& lists;
  const Features& features;
  const Options& options;
  double lambda;
  const Columns& columns;
  std::vector<float> shared;
  std::vector<int32_t> touched;
  std::vector<Scored> sharing;

  QueryScorer(const Encoding& e, const Lists& l, const Features& f, const Options& o, double la, const Columns& c)
      : encoding(e),
        lists(l),
        features(f),
        options(o),
        lambda(la),
        columns(c),
        shared(static_cast<size_t>(e.rows), 0.f) {}

  double mixed(double similarity, double t) const { return (1 - lambda) * jaccard(similarity) + lambda * t; }

  // Fills best; returns whether it is certain.
  bool score(int64_t i, Best& best) {
    touched.clear();
    sharing.clear();
    for_each_shared(encoding, columns, i, [&](int32_t j, float least) {
      float& entry = shared[static_cast<size_t>(j)];
      if (entry == 0) touched.push_back(j);
      entry += least;
    });
    const double largest = lists.largest[i];
    for (int64_t a = 0; a < lists.k; a++) {
      const int64_t j = lists.index[i * lists.k + a];
      if (j < encoding.num_queries) continue;
      float& entry = shared[static_cast<size_t>(j)];
      best.offer({mixed(entry, original(lists.key[i * lists.k + a], largest, options)), j - encoding.num_queries});
      if (entry > 0) entry = kSeen;
    }
    for (const int32_t j : touched) {
      float& entry = shared[static_cast<size_t>(j)];
      if (entry > 0) sharing.push_back({(1 - lambda) * jaccard(entry), j});
      entry = 0;
    }
    const double last = lambda * last_listed(i);
    std::make_heap(sharing.begin(), sharing.end(), [](const Scored& a, const Scored& b) { return b < a; });
    while (!sharing.empty()) {
      std::pop_heap(sharing.begin(), sharing.end(), [](const Scored& a, const Scored& b) { return b < a; });
      const Scored next = sharing.back();
      sharing.pop_back();
      if (next.distance + last > best.worst()) break;
      const double t =
          features.dim == 0 ? last : lambda * original(squared_distance(features, i, next.index), largest, options);
      best.offer({next.distance + t, next.index - encoding.num_queries});
    }
    const double least = (1 - lambda) + last;
    return lists.k == encoding.rows || best.worst() < least || (features.dim > 0 && best.worst() == least);
  }

  // The same from all rows.
  void rescan(int64_t i, Best& best) {
    best.found.clear();
    for_each_shared(encoding, columns, i, [&](int32_t j, float least) { shared[static_cast<size_t>(j)] += least; });
    const double largest = lists.largest[i];
    for (int64_t a = 0; a < lists.k; a++) {
      const int64_t j = lists.index[i * lists.k + a];
      if (j < encoding.num_queries) continue;
      float& entry = shared[static_cast<size_t>(j)];
      best.offer({mixed(entry, original(lists.key[i * lists.k + a], largest, options)), j - encoding.num_queries});
      entry = kSeen;
    }
    for (int64_t j = encoding.num_queries; j < encoding.rows; j++) {
      float& entry = shared[static_cast<size_t>(j)];
      if (entry != kSeen) {
        const double t =
            features.dim == 0 ? last_listed(i) : original(squared_distance(features, i, j), largest, options);
        best.offer({mixed(entry, t), j - encoding.num_queries});
      }
      entry = 0;
    }
  }

  double last_listed(int64_t i) const {
    return original(lists.key[i * lists.k + lists.k - 1], lists.largest[i], options);
  }
};

}  // namespace

Rows reciprocal_encoding(const Lists& lists, const Features& features, const Options& options,
                         const Parallel& parallel) {
  Rows v = weights(lists, features, options, parallel);
  const int64_t count = std::min(options.expand, lists.k);
  return count > 1 ? expanded(v, lists, count, parallel) : v;
}

void mix_dense(const Encoding& encoding, const double* largest, const Options& options, double lambda, float* distance,
               const Parallel& parallel) {
  const Columns columns(encoding, encoding.num_queries);
  const int64_t gallery = encoding.rows - encoding.num_queries;
  const float rest = static_cast<float>(1 - lambda), factor = static_cast<float>(lambda);
  parallel(encoding.num_queries, [&](int64_t begin, int64_t end) {
    std::vector<float> shared(static_cast<size_t>(gallery), 0.f);
    for (int64_t i = begin; i < end; i++) {
      float* const by_row = shared.data() - encoding.num_queries;
      for_each_shared(encoding, columns, i, [&](int32_t j, float least) { by_row[j] += least; });
      float* own = distance + i * gallery;
      const float unit = !options.normalize ? 1 : largest[i] > 0 ? static_cast<float>(1 / largest[i]) : 0;
      for (int64_t j = 0; j < gallery; j++) {
        const float t = own[j] * unit, s = shared[static_cast<size_t>(j)];
        const float far = std::max(0.f, 1 - s / (2 - s));
        own[j] = rest * far + factor * (options.power == 4 ? t * t : t);
        shared[static_cast<size_t>(j)] = 0;
      }
    }
  });
}

int64_t mix_top_k(const Encoding& encoding, const Lists& query_lists, const Features& features, const Options& options,
                  double lambda, const TopK& out, const Parallel& parallel) {
  const Columns columns(encoding, encoding.num_queries);
  std::vector<uint8_t> rescanned(static_cast<size_t>(encoding.num_queries), 0);
  parallel(encoding.num_queries, [&](int64_t begin, int64_t end) {
    QueryScorer scorer(encoding, query_lists, features, options, lambda, columns);
    for (int64_t i = begin; i < end; i++) {
      Best best{static_cast<size_t>(out.top_k), {}};
      if (!scorer.score(i, best)) {
        scorer.rescan(i, best);
        rescanned[static_cast<size_t>(i)] = 1;
      }
      for (int64_t a = 0; a < out.top_k; a++) {
        const bool there = a < static_cast<int64_t>(best.found.size());
        out.distance[i * out.top_k + a] =
            there ? best.found[static_cast<size_t>(a)].distance : std::numeric_limits<double>::infinity();
        out.index[i * out.top_k + a] = there ? best.found[static_cast<size_t>(a)].index : -1;
      }
    }
  });
  return std::count(rescanned.begin(), rescanned.end(), 1);
}

Rows jaccard_rows(const Encoding& encoding, const Parallel& parallel) {
  const Columns columns(encoding, 0);
  Parts parts(encoding.rows);
  parallel(encoding.rows, [&](int64_t begin, int64_t end) {
    std::vector<float> shared(static_cast<size_t>(encoding.rows), 0.f);
    std::vector<int32_t> touched;
    for (int64_t i = begin; i < end; i++) {
      touched.clear();
      for_each_shared(encoding, columns, i, [&](int32_t j, float least) {
        float& entry = shared[static_cast<size_t>(j)];
        if (entry == 0) touched.push_back(j);
        entry += least;
      });
      std::sort(touched.begin(), touched.end());
      touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
      auto& row = parts.rows[static_cast<size_t>(i)];
      for (const int32_t j : touched) {
        float& entry = shared[static_cast<size_t>(j)];
        if (entry > 0) row.emplace_back(j, j == i ? 0.f : static_cast<float>(jaccard(entry)));
        entry = 0;
      }
    }
  });
  return parts.joined(parallel);
}

}  // namespace nd::reranking
