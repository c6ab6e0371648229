// GNN re-ranking from neighbour lists: sparse rows only, no N x N matrix (csrc/cpu/gnn_rerank.cpp).
//
// Rows are the queries first, then the gallery. Lists hold cosine distances; `largest` is not used.
#pragma once
#include "neuraldeps/reranking.hpp"

namespace nd::reranking {

// distance [num_queries, rows - num_queries] cosine distances -> (1 - lambda) <A_i, A_g> + lambda cos(i, g), in place.
// `expand` is k2, 1 .. lists.k.
void gnn_dense(const Lists& lists, int64_t num_queries, int64_t expand, double lambda, float* distance,
               const Parallel& parallel);

// The top_k largest of every row of that matrix, descending, ties by index, padded with -1 and -infinity where the
// gallery is smaller; `distance` of TopK holds the scores. query_lists: longer lists of the queries alone.
void gnn_top_k(const Lists& lists, const Lists& query_lists, const Features& features, int64_t expand, double lambda,
               const TopK& out, const Parallel& parallel);

}  // namespace nd::reranking
