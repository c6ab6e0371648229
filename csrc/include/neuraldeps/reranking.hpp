// k-reciprocal re-ranking from neighbour lists: sparse rows only, no N x N matrix (csrc/cpu/reranking.cpp).
//
// Rows are the queries first, then the gallery. t(i, j) is the original distance as it enters the result: the squared
// distance, divided by the largest of row i if `normalize`, squared if `power` is 4.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace nd::reranking {

struct Lists {
  int64_t rows, k;        // k neighbours of each row, itself included
  const int64_t* index;   // [rows, k] by ascending distance
  const double* key;      // [rows, k] squared distances
  const double* largest;  // [rows] the largest squared distance of each row
};

// Rows of float32 or float64 for distances that no list holds: the queries, then the gallery. With dim = 0 they are not
// known, and count as the last listed.
struct Features {
  const void *query, *gallery;
  cpu::Dtype dtype;
  int64_t num_queries, dim, query_stride, gallery_stride;
};

struct Options {
  int64_t forward;  // entries of a list that count: k1 + 1, or k1
  int64_t half;     // the same of the lists behind an expansion: round(k1 / 2) + 1
  int64_t expand;   // k2: rows averaged into one; 1: none
  bool normalize;
  int power;  // 2 or 4
};

// Compressed sparse rows, columns ascending.
struct Rows {
  std::vector<int64_t> start;  // [rows + 1]
  std::vector<int32_t> column;
  std::vector<float> value;
};

// parallel(count, f) calls f(begin, end) over ranges of [0, count), each on one thread.
using Parallel = std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)>;

// Weights V' of the k-reciprocal neighbours of every row, expanded over its first k2 neighbours: rows sum to 1.
Rows reciprocal_encoding(const Lists& lists, const Features& features, const Options& options,
                         const Parallel& parallel);

// What the encoding is asked for, given queries [0, num_queries) and gallery [num_queries, rows).
struct Encoding {
  int64_t rows, num_queries;
  const int64_t* start;   // [rows + 1]
  const int32_t* column;  // entries of V'
  const float* value;
};

// distance [num_queries, rows - num_queries] squared distances -> (1 - lambda) Jaccard + lambda t, in place.
void mix_dense(const Encoding& encoding, const double* largest, const Options& options, double lambda, float* distance,
               const Parallel& parallel);

// The top_k of every row of that matrix, ascending, ties by index, padded with -1 and infinity where the gallery is
// smaller. Lists are those of the queries alone; `rescanned` counts rows whose lists were too short to decide.
struct TopK {
  int64_t top_k;
  double* distance;  // [num_queries, top_k]
  int64_t* index;    // [num_queries, top_k] in the gallery
};
int64_t mix_top_k(const Encoding& encoding, const Lists& query_lists, const Features& features, const Options& options,
                  double lambda, const TopK& out, const Parallel& parallel);

// Jaccard distances of all rows with all, those below 1.
Rows jaccard_rows(const Encoding& encoding, const Parallel& parallel);

}  // namespace nd::reranking
