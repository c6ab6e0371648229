/* C interface of libneuraldeps_cuda: no framework types, sizes in elements, work queued on `stream`.
   Every function returns a cudaError_t (0 is success) and never synchronises. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define ND_CUDA_API_VERSION 2
#define ND_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif
ND_API int nd_cuda_api_version(void);
ND_API const char* nd_cuda_error_string(int code);
ND_API int nd_cuda_device_count(int* count);

/* The problems of one call, t < num_targets, and their penalties l < num_lams, a_j = (lam[t, l] / 2) penalty_j:

     minimise  theta' S theta - 2 c' theta + v + ridge |theta|^2 + 2 sum_j a_j |theta_j|     (theta >= 0 if nonnegative)

   All pointers lie on the device; T is the type of the function called, float or double.
   Without cross: c = row targets[t] of S, v = S_ii, and category i = targets[t] is left out.
   With cross:    c = row targets[t] of cross, v = variance[targets[t]], and nothing is left out but by penalty.
   S comes with the ridge on its diagonal and, like cross, multiplied by *scale; everything else, in and out, is in
   units of the covariance before that. */
typedef struct {
  const void* cov;        /* T [n, ld], or one such matrix a problem: symmetric, rows aligned to 16 bytes */
  int64_t cov_stride;     /* values from the matrix of one problem to that of the next; 0: one for all */
  int64_t n, ld;          /* ld: n or more, rounded up to 16 bytes; what lies in columns n..ld-1 is not used */
  const void* cross;      /* T, rows of n values, ld apart, or null */
  const double* variance; /* one a row of cross; null without */
  const int64_t* targets; /* [num_targets] rows, of S or of cross; with cov_stride of their own matrix */
  int64_t num_targets;
  const double* lam;          /* [num_targets, num_lams] >= 0, solved in this order from one solution to the next */
  int64_t num_lams;           /* >= 1 */
  const void* penalty;        /* T [n] or [num_targets, n], > 0; +inf: may not enter; null: all ones */
  int64_t penalty_stride;     /* 0 for one row shared by all, else the distance of rows */
  double ridge;               /* >= 0, in units before scaling: what the diagonal of S / *scale contains of it */
  const double* scale;        /* [1] on the device, a power of four; null: 1 */
  int32_t nonnegative;        /* 0 or 1 */
  const void* start_value;    /* T [num_targets, start_capacity], of which signs are used; null: a cold start */
  const int32_t* start_index; /* [num_targets, start_capacity]; what cannot be an active set is skipped */
  const int32_t* start_count; /* [num_targets] */
  int64_t start_capacity;
  double tol;         /* KKT violation allowed, relative to lambda_max / 2 of the problem */
  int64_t max_pivots; /* coordinates added or dropped before one penalty of one problem is given up as capped */
  int32_t* index;     /* [num_targets, num_lams, capacity] support in increasing order, then zeros */
  void* value;        /* T [num_targets, num_lams, capacity] coefficients, then zeros */
  int64_t capacity;   /* a larger support is cut and reported as capped; so is one that, on the way, grows
                         beyond max(2 capacity, 1024) coordinates */
  int32_t* count;     /* [num_targets, num_lams] */
  double* info;       /* [num_targets, num_lams, 6]: err2, duality gap, KKT violation, pivots, status, lambda_max */
} NdCovlassoArgs;

/* Bytes of the workspace of a call with this n, num_targets and capacity; no pointer is read. More
   capacity needs no less. */
ND_API size_t nd_covlasso_workspace_f32(const NdCovlassoArgs* args);
ND_API size_t nd_covlasso_workspace_f64(const NdCovlassoArgs* args);
ND_API int nd_covlasso_f32(const NdCovlassoArgs* args, void* workspace, void* stream);
ND_API int nd_covlasso_f64(const NdCovlassoArgs* args, void* workspace, void* stream);

/* The first segment (low, high) of the path from lambda_max down that has exactly k nonzeros, and the solution at
   lam = high - position (high - low), 0 < position < 1, which is written to lam_out [num_targets]. Of args, lam,
   num_lams and start_* are not used, and capacity is k or more. Status 4: the path ends without one, and the solution
   is that of the end. */
ND_API int nd_covlasso_top_k_f64(const NdCovlassoArgs* args, int64_t k, double position, double* lam_out,
                                 void* workspace, void* stream);

/* Of a [batch, m, n], k = min(m, n), one of:
     values    singular values sigma_1 >= .. >= sigma_k, NaN where a matrix is not finite
     rank      #{ i : sigma_i > max(atol, rtol_r sigma_1) }, -1 where a matrix is not finite
     values with basis: also singular vectors of the shorter side, one a row
     gradient  sum_i g_i u_i v_i' for value_gradient g
   Device pointers but for rtol; batch may be 0. A matrix without a gap at a threshold may count either way within
   1e-8 of it, and float32 and shorter also within about 1e-15 of sigma_1. */
#define ND_SPECTRUM_LONGEST 1024
typedef struct {
  const void* a;                    /* [batch, m, n] */
  int32_t dtype;                    /* 0 float32, 1 float64, 2 bfloat16, 3 float16 */
  int64_t batch, m, n;              /* m, n >= 1, k <= ND_SPECTRUM_LONGEST */
  int64_t batch_stride, row_stride; /* in elements; those of a row are neighbours */
  int32_t hermitian;                /* with rank: m = n, sigma are the absolute eigenvalues of the lower triangle */
  void* values;                     /* [batch, k] float64 for float64 input or with basis, else float32 */
  int64_t* rank;                    /* [batch, num_rtol] */
  const double* rtol;               /* on the host: [num_rtol] >= 0, read before the call returns */
  int64_t num_rtol;
  double atol;                /* >= 0 */
  double* basis;              /* [batch, k, k] or null */
  const void* value_gradient; /* [batch, k] float64 for float64 input, else float32 */
  void* gradient;             /* [batch, m, n] likewise */
} NdSpectrumArgs;

/* Bytes of the workspace of a call, aligned to 256; reads no pointer, but looks which are null. */
ND_API size_t nd_spectrum_workspace(const NdSpectrumArgs* args);
ND_API int nd_spectrum(const NdSpectrumArgs* args, void* workspace, void* stream);

/* The Fourier filter y = irfft2(rfft2(x) K) of every channel, and its gradients; see csrc/cuda/fourier_filter.cu. All
   pointers lie on the device; images are dense. */
typedef struct {
  int64_t batch, height, width;
  int64_t channels;    /* 1 to 2^19 */
  int32_t dtype;       /* of images: 0 float32, 2 bfloat16, 3 float16 */
  int32_t planes;      /* images [batch, height, width, channels] if 0, [batch, channels, height, width] if 1 */
  const float* weight; /* K [height, width/2 + 1, channels, 2], aligned to 8 bytes */
} NdFourierFilterArgs;

/* 1 if there are kernels for these sizes and dtype, else 0; reads no pointer. */
ND_API int nd_fourier_filter_serves(const NdFourierFilterArgs* args);
ND_API int nd_fourier_filter(const NdFourierFilterArgs* args, const void* x, void* y, void* stream);

/* dweight is laid out as weight; the workspace is aligned to 8 bytes. */
ND_API size_t nd_fourier_filter_backward_workspace(const NdFourierFilterArgs* args);
ND_API int nd_fourier_filter_backward(const NdFourierFilterArgs* args, const void* grad, const void* x, void* dx,
                                      float* dweight, void* workspace, void* stream);

/* Nearest neighbours in float64, see csrc/cuda/retrieval.cu: nd_neighbors_prepare once; then every tile of products,
   left by right transposed, to nd_neighbors_offer (in one set those of columns from the first row of the tile on); then
   nd_neighbors_finish. All pointers lie on the device, and the workspace is aligned to 256 bytes. */
#define ND_SQUARED_EUCLIDEAN 0
#define ND_COSINE 1
#define ND_INNER_PRODUCT 2
typedef struct {
  const void *x, *y; /* [n, dim], [m, dim] of dtype, rows x_stride and y_stride apart */
  int32_t dtype;     /* 0 float32, 1 float64 */
  int32_t joined;    /* 1: rows of x, then of y, are one set of N = n + m, searched within itself; 0: x is
                        searched in y, N = n */
  int32_t metric;    /* ND_... */
  int64_t n, m;      /* n + m < 2^31 */
  int64_t dim, x_stride, y_stride;
  int64_t k;             /* 1 to the rows searched among */
  int64_t num_queries;   /* in one set: its first rows, which have distances from all others .. */
  int64_t query_k;       /* .. and query_k >= k neighbours, or k if 0 */
  int32_t wants_largest; /* 1: the largest key of every row too */
  int32_t split;         /* 1: copies of three parts, a product's high and low halves; 0: of the high one alone */
  int32_t fine;          /* 1: products are of all parts; 0: of the first; needs split */
  int32_t bfloat16;      /* type of the copies: 0 float16, 1 bfloat16 */
  void *left, *right;    /* written: rows searched for, and among, each rounded up to 8, of 1 or 3 times dim
                            rounded up to 8; one copy may serve as both if joined and not split */
} NdNeighborsArgs;

/* Reads no pointer. */
ND_API size_t nd_neighbors_workspace(const NdNeighborsArgs* args);
ND_API int nd_neighbors_prepare(const NdNeighborsArgs* args, void* workspace, void* stream);
/* product [rows, ld >= columns] of rows first_row .. with columns first_column .. */
ND_API int nd_neighbors_offer(const NdNeighborsArgs* args, const float* product, int64_t ld, int64_t first_row,
                              int64_t rows, int64_t first_column, int64_t columns, void* workspace, void* stream);
/* key, index [N, k]; largest [N] or null; query_key, query_index [num_queries, query_k]. */
ND_API int nd_neighbors_finish(const NdNeighborsArgs* args, double* key, int64_t* index, double* largest,
                               double* query_key, int64_t* query_index, void* workspace, void* stream);
/* Keys of queries first_row .. with all rows that are none, into their rows of dense [num_queries, N - num_queries],
   from the fine products [rows, ld]; not for inner products. */
ND_API int nd_neighbors_dense(const NdNeighborsArgs* args, const float* product, int64_t ld, int64_t first_row,
                              int64_t rows, float* dense, void* workspace, void* stream);

/* Re-ranking from neighbour lists; see csrc/cuda/reranking.cu and gnn_rerank.cu. Rows are the queries, then the
   gallery, fewer than 2^31. All pointers lie on the device. Indices that are no row count as the nearest that is one.
 */
typedef struct {
  int64_t rows, k;      /* k >= 1 */
  const int64_t* index; /* [rows, k] by ascending distance */
  const double* key;    /* [rows, k] */
} NdLists;

/* Rows for distances that no list holds; dim = 0: not known, they count as the last listed. */
typedef struct {
  const void *query, *gallery;
  int32_t dtype; /* 0 float32, 1 float64 */
  int64_t num_queries, dim, query_stride, gallery_stride;
} NdFeatures;

typedef struct {
  NdLists lists;         /* squared distances */
  const double* largest; /* [rows] */
  NdFeatures features;
  int64_t forward, half, expand; /* each >= 1: entries of a list that count, those behind an expansion, k2 */
  int32_t normalize, power;      /* t = d / largest, d if not; t^2 if power is 4, not 2 */
  int64_t* crow;                 /* [rows + 1] */
  int32_t* col;                  /* [rows * room] columns ascending, and nothing behind crow[rows] */
  float* value;                  /* [rows * room] */
} NdReciprocalEncodingArgs;

/* Most entries of a row; reads no pointer. */
ND_API int64_t nd_reciprocal_encoding_room(const NdReciprocalEncodingArgs* args);
ND_API size_t nd_reciprocal_encoding_workspace(const NdReciprocalEncodingArgs* args);
ND_API int nd_reciprocal_encoding(const NdReciprocalEncodingArgs* args, void* workspace, void* stream);

typedef struct {
  int64_t rows, num_queries; /* num_queries = 0: all pairs of rows */
  const int64_t* crow;       /* [rows + 1] the encoding */
  const int32_t* col;        /* [room] */
  const float* value;        /* [room] */
  int64_t room;              /* crow[rows] or more */
  const double* largest;     /* [num_queries] */
  double lambda;
  int32_t normalize, power;
  float* distance; /* dense: [num_queries, rows - num_queries] squared distances, replaced by the result */
  NdLists lists;   /* top_k: of the queries */
  NdFeatures features;
  int64_t top_k;
  double* best;       /* [num_queries, top_k] ascending, padded with infinity */
  int64_t* found;     /* [num_queries, top_k] places in the gallery, padded with -1 */
  int64_t* rescanned; /* [1] queries whose lists were too short */
  int64_t* crow_out;  /* all pairs: [rows + 1], written by _count */
  int32_t* col_out;   /* [crow_out[rows]], written by _fill */
  float* value_out;
} NdJaccardArgs;

/* Bytes for all of these functions; looks whether crow_out and top_k are 0. _fill finds what _count left there. */
ND_API size_t nd_jaccard_workspace(const NdJaccardArgs* args);
ND_API int nd_jaccard_rerank(const NdJaccardArgs* args, void* workspace, void* stream);
ND_API int nd_jaccard_rerank_top_k(const NdJaccardArgs* args, void* workspace, void* stream);
ND_API int nd_jaccard_distance_count(const NdJaccardArgs* args, void* workspace, void* stream);
ND_API int nd_jaccard_distance_fill(const NdJaccardArgs* args, void* workspace, void* stream);

typedef struct {
  NdLists lists;               /* cosine distances */
  int64_t num_queries, expand; /* expand: k2, 1 .. lists.k */
  double lambda;
  int64_t edges;       /* of the first layer, as found by nd_gnn_layer */
  float* distance;     /* dense: [num_queries, rows - num_queries] cosine distances, replaced by scores */
  NdLists query_lists; /* top_k, 0 for dense: longer lists of the queries */
  NdFeatures features;
  int64_t top_k;
  double* score;  /* [num_queries, top_k] descending, padded with -infinity */
  int64_t* found; /* [num_queries, top_k] places in the gallery, padded with -1 */
} NdGnnArgs;

/* First the size of the graph to `edges`, on the device, then the scores; `layer` is the workspace of nd_gnn_layer. */
ND_API size_t nd_gnn_layer_workspace(const NdGnnArgs* args);
ND_API int nd_gnn_layer(const NdGnnArgs* args, int64_t* edges, void* workspace, void* stream);
ND_API size_t nd_gnn_rerank_workspace(const NdGnnArgs* args);
ND_API int nd_gnn_rerank(const NdGnnArgs* args, void* layer, void* workspace, void* stream);

/* Evaluation of a ranked gallery; see csrc/cuda/retrieval_metrics.cu. Device pointers; optional ones may be null. */
typedef struct {
  const void* distance; /* [nq, ng], rows `stride` apart */
  int32_t dtype;        /* of distances: 0 float32, 1 float64 */
  int64_t nq, ng, stride;
  const int64_t *order, *begin, *end;           /* items of the identity of query q: order[begin[q] .. end[q]) */
  const int64_t *query_camera, *gallery_camera; /* optional: of one identity, items of the query's camera are junk */
  const uint8_t* excluded;                      /* optional [groups, ng]: what is junk for queries of a group */
  const int64_t* group;                         /* [nq] */
  int64_t groups;
  const int32_t* identity; /* optional [ng], below ng: first ranks count identities */
  int32_t precision;       /* 0 standard, 1 trapezoid, 2 equal keys share one */
  const double* slack;     /* optional [nq]: distances are within this of the keys, which are float64 sums over */
  NdFeatures features;     /* num_queries = nq, */
  const double *query_unit, *gallery_unit; /* times these factors: |x - y|^2 */
  int32_t inner_product;                   /* or -<x, y> */
  double *ap, *inp;                        /* [nq] NaN without a positive or with a NaN distance */
  int64_t* first_rank;                     /* [nq] 0, -1 then */
} NdRetrievalMetricsArgs;

ND_API size_t nd_retrieval_metrics_workspace(const NdRetrievalMetricsArgs* args);
ND_API int nd_retrieval_metrics(const NdRetrievalMetricsArgs* args, void* workspace, void* stream);
#ifdef __cplusplus
}
#endif
