// Interface of the CPU kernels. Every source file of csrc/cpu is compiled once per instruction-set level into its own
// namespace (nd::cpu::baseline, ::avx2, ::avx512); `kernels()` hands out the table of the level chosen at load:
// the best the machine has, or what NEURALDEPS_CPU_LEVEL names.
//
// Kernels take pointers, sizes and a half-open range of independent problems; they never start threads and never
// allocate through torch. The caller picks the threading.
#pragma once
#include <cstdint>
#include <string>

namespace nd::cpu {

// What one CovLasso solve reports per target, in this order, as float64.
enum CovlassoInfo : int { kErr2, kDualityGap, kKktViolation, kPivots, kStatus, kLambdaMax, kCovlassoInfoSize };
enum CovlassoStatus : int { kConverged = 0, kCapped = 1, kCollinear = 2, kNotPsd = 3, kTooFew = 4 };

// For target number t, with c and v its covariances with the categories and its variance,
//
//   min over theta   theta' S theta - 2 c' theta + v + ridge |theta|^2 + lam sum_j penalty_j |theta_j|
//
// for every lam of its path, in the order given; active set, signs and factor are carried on.
template <class T>
struct CovlassoArgs {
  const T* cov;                // [n, ld] symmetric, zero in columns n..ld-1, rows aligned to 64 bytes, ridge on its
                               // diagonal
  int64_t n, ld;               // ld: whole 64-byte lines, at least n rounded up to 16
  int64_t cov_stride;          // from the matrix of one target to that of the next; 0: one for all
  const T* cross;              // rows c [*, ld] as those of cov; null: rows of cov, without the target itself
  const double* variance;      // [*] v, one a row of cross, or of cov (its diagonal without the ridge)
  double variance_bound = 2;   // above every diagonal entry of cov
  const int64_t* targets;      // [num_targets] row of cross and variance, or of cov
  const double* lam;           // [num_targets, num_lams], > 0
  int64_t num_lams;            // >= 1
  const T* penalty;            // [n] or [num_targets, n]; +inf: may not enter; null: all ones
  int64_t penalty_stride;      // 0 for one row shared by all targets, else the distance of rows
  const int32_t* start_index;  // [num_targets, start_capacity] support to start from, or null. Only the signs of
  const T* start_value;        // start_value matter; what may not be in a support is skipped
  const int32_t* start_count;  // [num_targets]
  int64_t start_capacity;
  bool nonnegative;  // theta >= 0
  double ridge;
  double tol;          // KKT violation allowed, relative to lambda_max / 2 of the target
  int64_t max_pivots;  // coordinates added or dropped before a problem is given up as capped
  int32_t* index;      // [num_targets, num_lams, capacity] support in increasing order, then zeros
  T* value;            // [num_targets, num_lams, capacity] coefficients, then zeros
  int64_t capacity;    // >= n holds every support; a larger support is cut and reported as capped
  int32_t* count;      // [num_targets, num_lams]
  double* info;        // [num_targets, num_lams, kCovlassoInfoSize]
};

// Exactly k nonzeros: on the first segment (low, high) of the path, from lambda_max down, that has them, at
// lam = high - position (high - low). Reads all of CovlassoArgs but lam, num_lams (1) and start_*.
struct CovlassoTopK {
  int64_t k;
  double position;  // in (0, 1)
  double* lam;      // [num_targets], written
};

// A covariance made ready for the solver: [n, ld] rows of whole 64-byte lines, padded with zeros, S symmetrised,
// multiplied by `scale` (a power of four), `ridge` added to the diagonal. Work is counted in groups of kCovlassoTile
// rows.
constexpr int64_t kCovlassoTile = 16;
struct CovlassoPackFacts {
  bool finite;
  double asymmetry;  // max |S_ij - S_ji| * scale
};
template <class T>
struct CovlassoPackArgs {
  const T* cov;  // [n, n], rows `stride` apart
  int64_t n, stride, ld;
  double scale, ridge;
  T* packed;                 // [n, ld], or null: only the facts are wanted, up to the first asymmetry
  CovlassoPackFacts* facts;  // one per group of rows
};

enum class Dtype : int { kFloat32, kFloat64, kBfloat16, kFloat16 };

// Weighted mean and centred second moment of the rows x_r of one matrix:
//   W = sum_r w_r,   mean = sum_r w_r x_r / W,   moment = sum_r w_r (x_r - mean) (x_r - mean)'.
// W = 0 gives mean = 0 and moment = 0. A row of weight 0 is never read.
struct MomentsArgs {
  const void* x;          // [rows, n] of dtype; row r starts r * row_stride elements in
  Dtype dtype;            // float64 is computed in float64, the others in float32 flushed into float64
  int64_t rows, n;        // rows >= 0, n >= 1
  int64_t row_stride;     // >= n
  const double* weights;  // [rows] >= 0; null: all ones
  double* weight_sum;     // [1] W
  double* mean;           // [n]
  double* moment;         // [n, n] symmetric
  void* workspace;        // MomentsPlan::workspace_bytes, aligned to 64
  int64_t threads = 1;    // that will share the tasks: more of them get larger chunks, with the same result
};

// How moments are cut: the sizes of the task ranges below.
struct MomentsPlan {
  int64_t chunks;          // rounds of pack and multiply, one after the other
  int64_t pack_tasks;      // per chunk
  int64_t multiply_tasks;  // per chunk
  int64_t finish_tasks;
  int64_t workspace_bytes;
};

// Singular values sigma_1 >= .. >= sigma_k, k = min(m, n), of `batch` matrices, or for each of several tolerances their
// rank #{ i : sigma_i > max(atol, rtol sigma_1) }. Exactly one of values and rank is given; basis needs values.
struct SpectrumArgs {
  const void* a;  // [batch, m, n] of dtype
  Dtype dtype;
  int64_t batch, m, n;               // m, n >= 1
  int64_t batch_stride, row_stride;  // in elements
  void* values;                      // [batch, k], float64 for float64 input, else float32; NaN where a is not finite
  int64_t* rank;                     // [batch, num_rtol]; -1 where a is not finite, or kRankUndecided
  const double* rtol;                // [num_rtol] >= 0
  int64_t num_rtol;
  double atol;     // >= 0
  bool hermitian;  // ranks: m = n, a is symmetric, of which the lower triangle is read; sigma are its absolute
                   // eigenvalues
  double* basis;   // [batch, k, k] singular vectors of the shorter side, one a row, or null; then values are float64
  // Or, alone: the gradient sum_i g_i u_i v_i' [batch, m, n] of values whose gradients are g [batch, k]; a matrix is
  // unresolved [batch] if some g_i is not 0 whose sigma_i is too small for the method (below 1e-6 sigma_1).
  const float* value_gradient;
  float* gradient;
  bool* unresolved;
  // Or null. What the gradient needs of the computation of the values, spectrum_forms(batch, k) numbers aligned to 64
  // bytes: written with values not in float64, read with a gradient; tasks then begin at multiples of 8 matrices.
  double* forms;
};
inline int64_t spectrum_forms(int64_t batch, int64_t k) { return (batch + 7) / 8 * 8 * k * (k + 4); }
constexpr int64_t kSpectrumGroup = 16;  // small matrices that a task of its best speed holds, or multiples of it
constexpr int64_t kRankUndecided = -2;  // rounding may change the count: the caller takes singular values in float64

struct SpectrumPlan {
  int64_t group;            // matrices a task had best hold; any other number gives the same results
  int64_t workspace_bytes;  // of a task, aligned to 64
};

// Fourier filter of images of H x W pixels and C channels, Wf = W / 2 + 1:
//   y = irfft2(rfft2(x) K), or with grad g = dL/dy:  y = dx = irfft2(rfft2(g) conj K),  dweight = dL/dK.
// Elements, in them, from one image, row, pixel or channel to the next. Either channel = 1, or pixel = 1 and row = W.
struct ImageStrides {
  int64_t batch, row, pixel, channel;
};
struct FourierFilterArgs {
  const void* x;     // images of dtype
  const void* grad;  // those of g, or null
  void* y;
  ImageStrides x_strides, grad_strides, y_strides;
  Dtype dtype;
  int64_t batch, height, width, channels;  // batch >= 0, the others >= 1
  const void* weight;                      // [H, Wf, C, 2], float64 for float64 images, else float32
  void* dweight;                           // the same, with grad
  int64_t splits;                          // of FourierFilterPlan
  // Of the bytes that FourierFilterPlan names, aligned to 64:
  void* table;
  void* filter;
  void* sums;  // with grad
};

// Order: start; prepare of all blocks; then apply of all blocks times batch tasks, or, with grad, gradients of all
// blocks times splits tasks and finish of all blocks.
struct FourierFilterPlan {
  int64_t blocks;  // of channels
  int64_t splits;  // of the batch, in the gradient
  int64_t table_bytes, filter_bytes, sums_bytes;
  int64_t workspace_bytes;  // of a task of apply or gradients, aligned to 64
};

// The same with block-diagonal filters, channels of one of G blocks mixed by K [D, D] from input to output channel,
// D = C / G; a batch of images after the other, through their spectra.
struct FourierBlocksArgs {
  FourierFilterArgs filter;  // weight and dweight [H, Wf, G, D, D, 2]; splits, filter and sums are not used
  int64_t groups;            // G
  int64_t first, images;     // of this batch
  // Of FourierBlocksPlan: numbers from one frequency, or image, to the next, and bytes aligned to 64
  int64_t mode_stride, image_stride;
  void *x_spectra, *grad_spectra;  // [images, H, Wf, C rounded up, 2]; grad_spectra with grad
};

// Order: fourier_filter_start; then for each batch of images in order spectra of all blocks times images tasks, twice
// as many with grad; products of all H Wf frequencies; synthesis of all blocks times images tasks.
struct FourierBlocksPlan {
  int64_t blocks;  // of channels
  int64_t images;  // of a batch, all but the last
  int64_t mode_stride, image_stride;
  int64_t spectra_bytes;    // of each of the two
  int64_t workspace_bytes;  // of a task, aligned to 64
};

// Exact nearest neighbours: for every row x the k rows y with the smallest (key, index), where
//
//   key = |x - y|^2    or    1 - <x, y> / (|x| |y|)    or    -<x, y>       in float64, of the values given.
//
// Candidates come from products in float32 or bfloat16 whose error is bounded row by row, then float64 decides.
enum class Metric : int { kSquaredEuclidean, kCosine, kInnerProduct };
struct NeighborsArgs {
  const void* x;  // [n, dim] rows of dtype, x_stride apart
  const void* y;  // [m, dim] rows of dtype, y_stride apart
  bool joined;    // rows of x, then of y, are one set of N = n + m searched within itself, at half the work. Else x is
                  // searched in y: N = n
  Dtype dtype;    // float32 or float64
  int64_t n, m, dim, x_stride, y_stride;  // n + m, dim >= 1, below 2^31 rows to search in
  Metric metric;
  int64_t k;        // 1 .. rows to search in
  bool reduced;     // candidates in bfloat16, where the machine multiplies it
  double* key;      // [N, k] ascending, ties by index
  int64_t* index;   // [N, k]
  double* largest;  // [N] the largest key of every row, or null
  bool* undecided;  // [N] rows with more candidates than there is room for: neighbors_exact is left to do
  // Of one set, the first num_queries rows may be asked for more:
  int64_t num_queries;
  int64_t query_k;       // k or more neighbours, all of them
  double* query_key;     // [num_queries, query_k], or null: no more than k
  int64_t* query_index;  // [num_queries, query_k]
  float* dense;          // [num_queries, N - num_queries] keys with all rows that are no queries, or null; not for
                         // inner products
  void* state;           // NeighborsPlan::state_bytes, aligned to 64
};

// In order: scan all rows; settle once; pack all strips; search all tasks; finish all N rows. The tasks of one range
// may run at once and in any order, with the same result.
struct NeighborsPlan {
  int64_t rows;          // of scan: those of x, then of y
  int64_t strips;        // of pack
  int64_t search_tasks;  // unequal: had best be handed out one by one
  int64_t state_bytes;
  int64_t workspace_bytes;  // of a search, finish or exact task
};

// Average precision, inverse negative penalty and first rank of every query, from distances to the gallery. Items of
// the query's identity are positives, unless they are junk: of the query's camera, or excluded. Junk counts nowhere.
enum class Precision : int { kStandard, kTrapezoid, kTied };  // m / r; mean with (m-1) / (r-1); ties share one value
struct RetrievalMetricsArgs {
  const void* distance;  // [nq, ng] of dtype, rows `stride` apart
  Dtype dtype;           // float32 or float64
  int64_t nq, ng, stride;
  const int64_t* order;         // [ng] gallery items, those of one identity side by side
  const int64_t *begin, *end;   // [nq] those of the query's identity: order[begin] .. order[end - 1]
  int64_t most_alike;           // largest end - begin
  const int64_t* query_camera;  // [nq], or null: no item is junk by its camera
  const int64_t* gallery_camera;
  const bool* excluded;                           // [groups, ng], or null
  const int64_t* group;                           // [nq] row of `excluded`
  const int64_t *excluded_list, *excluded_start;  // the same as lists: [groups + 1] into the list
  const int32_t* identity;                        // [ng] 0 .. identities - 1: first ranks count identities; or null
  int64_t identities;
  Precision precision;
  // Or null. Distances, then float32, are approximate: off by at most slack [nq] from the key, which is
  // |u_q x_q - v_j y_j|^2 or -<u_q x_q, v_j y_j> in float64 and decides.
  const void *query, *gallery;  // [nq, dim], [ng, dim] of dtype_of_features, rows a stride apart
  Dtype dtype_of_features;      // float32 or float64
  int64_t dim, query_stride, gallery_stride;
  bool inner_product;
  const double *query_unit, *gallery_unit, *slack;  // u, v
  double *ap, *inp;                                 // [nq], NaN without a positive
  int64_t* first_rank;                              // [nq], 0 without a positive, -1 if a distance is NaN
};

// Values of N samples, C channels and S positions: x [N, C, S], or [N, S, C] if channels_last. All arrays of values
// have that layout and dtype. Tables [N, C] are float32, float64 for float64 values ("wide").
struct NormArgs {
  Dtype dtype;
  bool channels_last;
  int64_t N, C, S;  // S >= 1
  const void* x;
  const void* grad;      // dy, or null
  const void* result;    // y of a ReLU, whose gradient dy' is dy where y > 0 and else 0; null: dy' = dy
  const void* residual;  // or null
  void* out;             // y or dx
  void* out_residual;    // dy', or null
  bool relu;
  const void *mean, *scale, *shift, *slope;  // [N, C]
  void *sum, *centred_sum;                   // [N, C] results
};

// Batch normalisation of groups of samples, the domains. A task is one group or sample and one block of channels.
struct DomainNormArgs {
  NormArgs values;  // its tables are not used
  int64_t groups;
  const int64_t* group;               // [N] of each sample
  const int64_t* order;               // [N] samples, group by group
  const int64_t* first;               // [groups + 1] into order
  double *partial, *centred_partial;  // [N, C] scratch of the stages
  double *mean, *variance;            // [groups, C], biased; written by the forward, read by the backward
  const void *weight, *bias;          // wide [groups, C], or [C] shared; null: 1, 0
  bool shared_affine;
  double eps;
  bool batch_statistics;                 // backward: mean and variance depend on x
  double *weight_grad, *bias_grad;       // backward: [groups, C], written
  void *centre, *scale, *shift, *slope;  // wide [groups, C] scratch of the stages
};

// Everything at once, a task a group; or, one after the other, kReduce by sample, kMerge by group, kApply by sample.
// kPrepare by group stands for kReduce and kMerge of a forward whose mean and variance are given.
enum class NormStage { kAll, kReduce, kMerge, kPrepare, kApply };

// T^2 / N sum of KL(softmax(b_n / T) || softmax(a_n / T)) over rows of student a and teacher b, and its gradient in a.
struct DistillationArgs {
  const void *student, *teacher;              // [N, C] of dtype, rows a stride apart, entries of a row side by side
  Dtype dtype;                                // of both
  int64_t C, student_stride, teacher_stride;  // C >= 1
  double temperature;                         // T
  double* divergence;                         // forward: [N] KL of each row
  double* statistics;  // [N, 4] m and log sum exp((x - m) / T) of the student, then the teacher; backward: read
  double factor;       // backward: of p_s - p_t
  void* dstudent;      // [N, C] contiguous; null: forward
};

// Queue contrast of rows q (and o) with a queue Q [K, d]: for S = q Q' / tau and R = o Q' / tau_t, softmaxes over K,
//   log sum exp S,   A = E_p_q[Q],   log sum exp R,   B = E_p_o[Q],   E_p_o[R - S].
struct QueueContrastArgs {
  const void *q, *original;  // [N, d] contiguous, float64 for a float64 queue, else float32; original null: none of R
  const void* queue;         // [K, d] of dtype, rows queue_stride apart, entries of a row side by side
  Dtype dtype;
  int64_t N, K, d, queue_stride;           // >= 1
  double temperature, target_temperature;  // tau, tau_t
  bool gradient;                           // A and B are wanted
  void* partial;                           // QueueContrastPlan::partial_bytes, aligned to 64
  double *lse_q, *lse_o, *difference;      // [N] results
  void *mean_q, *mean_o;                   // [N, d] A, B in the dtype of q, with gradient
};

// Order: accumulate all tasks, in any order; merge all N rows.
struct QueueContrastPlan {
  int64_t tasks;  // blocks of rows times slabs of the queue
  int64_t partial_bytes;
  int64_t workspace_bytes;  // of a task of accumulate, aligned to 64
};

// Images mixed region by region, x_m = lam x_v + (1 - lam) x_i, and with grad g = dL/dx_m the gradients lam g,
// (1 - lam) g and dL/dratio. Arrays of images are [N, C, H, W], or [N, H, W, C] if channels_last, of dtype. Pixels of
// row h have the ratios r of region a = region_of_row[h], on the way to those of a + 1: (1 - t) r_a + t r_{a+1} with t
// = step_of_row[h], and so have columns.
struct RegionMixupArgs {
  Dtype dtype;
  bool channels_last;
  int64_t N, C, H, W;
  const void *x_v, *x_i;                            // the backward reads them for ratio_grad alone
  const void* ratio;                                // [N, rows, columns], float64 for float64 images, else float32
  int64_t rows, columns;                            // regions
  const int64_t *region_of_row, *region_of_column;  // [H], [W], not decreasing; t = 0 at the last region
  const double *step_of_row, *step_of_column;       // [H], [W]
  void* mixed;                                      // x_m of the forward
  const void* grad;                                 // g
  void *x_v_grad, *x_i_grad;                        // both or null
  void* ratio_grad;                                 // as ratio, or null
};

// Features F [N, C, S] pooled by maps H [N, K, S]: pooled_kc = sum_s F_cs H_ks / D_k, D_k = sum_s H_ks + eps, and with
// grad G = dL/dpooled the gradients dF = sum_k (G_kc / D_k) H_k and dH_k = P_k - sum_s(H_ks P_ks) / D_k where
// P_k = sum_c (G_kc / D_k) F_c. With `groups` channel c has one map, that of its group: K groups of C / K channels (C
// is at least K), the last takes the rest.
struct PosePoolArgs {
  Dtype dtype;
  bool channels_last;  // F and dF are [N, S, C]
  bool groups;
  int64_t N, C, S, K;
  double eps;
  const void* features;  // F of dtype
  const void* maps;      // H, float64 for float64 features, else float32
  void* pooled;          // [N, K, C], or [N, C] with groups, of dtype
  const void* grad;      // the same
  void* features_grad;   // or null
  void* partial;         // [N, pose_pool_blocks, K, or 1 with groups, S] as maps: P of every block, or null
  void* maps_grad;       // [N, K, S] as maps
};
constexpr int64_t kPosePoolChannels = 256;  // of a block at most
static inline int64_t pose_pool_blocks(const PosePoolArgs& args) {
  const int64_t maps = args.groups ? args.K : 1;
  const int64_t largest = args.C - (maps - 1) * (args.C / maps);
  return maps * ((largest + kPosePoolChannels - 1) / kPosePoolChannels);
}

// Samples of the closed-form discriminator, see csrc/cpu/closed_form_discriminator.cpp; work is counted in blocks.
constexpr int64_t kDiscriminatorBlock = 16384;
struct DiscriminatorArgs {
  Dtype dtype;          // float32 or float64
  const void* penalty;  // [N] l
  int64_t N;
  double eta;
  bool jensen_shannon;           // else KL
  void* tilt;                    // [N] scratch, v
  double* partial;               // [blocks, 2]
  void *discriminator, *weight;  // [N] D, w, written
};

// Latent codes z [B, L, d] on their way along the bases [L, R, d], see csrc/cpu/projected_step.cpp.
struct ProjectedStepArgs {
  Dtype dtype;  // float32 or float64, of all values
  int64_t B, L, R, d;
  const void *z, *gradient, *origin;  // [B, L, d]; origin null: rho is 0
  const void* basis;                  // [L, R, d]
  const void* step;                   // [B] a
  double rho;
  void *moved, *direction;  // [B, L, d] z', p, written
  void* squared_norm;       // [B, L] |p|^2, written
};

// One table per instruction-set level.
struct Kernels {
  const char* level;
  void (*covlasso_f32)(const CovlassoArgs<float>& args, int64_t begin, int64_t end);
  void (*covlasso_f64)(const CovlassoArgs<double>& args, int64_t begin, int64_t end);
  void (*covlasso_top_k_f64)(const CovlassoArgs<double>& args, const CovlassoTopK& wanted, int64_t begin, int64_t end);
  void (*covlasso_pack_f32)(const CovlassoPackArgs<float>& args, int64_t begin, int64_t end);
  void (*covlasso_pack_f64)(const CovlassoPackArgs<double>& args, int64_t begin, int64_t end);
  // lambda_max[t] = 2 max_j |c_j| / penalty_j, or of the positive part if nonnegative; reads cov or cross, targets,
  // penalty and nonnegative of args; cov or cross need neither padding nor alignment.
  void (*lambda_max_f32)(const CovlassoArgs<float>& args, double* lambda_max, int64_t begin, int64_t end);
  void (*lambda_max_f64)(const CovlassoArgs<double>& args, double* lambda_max, int64_t begin, int64_t end);
  // Moments in order: start; for each chunk all pack tasks, then all multiply tasks; all finish tasks. The tasks of one
  // range may run at once and in any order. compute_moments below is this order.
  MomentsPlan (*moments_plan)(const MomentsArgs& args);
  void (*moments_start)(const MomentsArgs& args);
  void (*moments_pack)(const MomentsArgs& args, int64_t chunk, int64_t begin, int64_t end);
  void (*moments_multiply)(const MomentsArgs& args, int64_t chunk, int64_t begin, int64_t end);
  void (*moments_finish)(const MomentsArgs& args, int64_t begin, int64_t end);
  // Matrices [begin, end) of the batch.
  SpectrumPlan (*spectrum_plan)(const SpectrumArgs& args);
  void (*spectrum)(const SpectrumArgs& args, int64_t begin, int64_t end, void* workspace);
  // Order: see FourierFilterPlan.
  FourierFilterPlan (*fourier_filter_plan)(const FourierFilterArgs& args);
  void (*fourier_filter_start)(const FourierFilterArgs& args);
  void (*fourier_filter_prepare)(const FourierFilterArgs& args, int64_t begin, int64_t end);
  void (*fourier_filter_apply)(const FourierFilterArgs& args, int64_t begin, int64_t end, void* workspace);
  void (*fourier_filter_gradients)(const FourierFilterArgs& args, int64_t begin, int64_t end, void* workspace);
  void (*fourier_filter_finish)(const FourierFilterArgs& args, int64_t begin, int64_t end);
  // Order: see FourierBlocksPlan.
  FourierBlocksPlan (*fourier_blocks_plan)(const FourierBlocksArgs& args);
  void (*fourier_blocks_spectra)(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* workspace);
  void (*fourier_blocks_synthesis)(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* workspace);
  int64_t (*fourier_blocks_room)(const FourierBlocksArgs& args);  // workspace_bytes of products
  void (*fourier_blocks_products)(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* workspace);
  NeighborsPlan (*neighbors_plan)(const NeighborsArgs& args);
  void (*neighbors_scan)(const NeighborsArgs& args, int64_t begin, int64_t end);
  int64_t (*neighbors_settle)(const NeighborsArgs& args);  // the first row without a key, or -1
  void (*neighbors_pack)(const NeighborsArgs& args, int64_t begin, int64_t end);
  void (*neighbors_search)(const NeighborsArgs& args, int64_t task, void* workspace);
  void (*neighbors_finish)(const NeighborsArgs& args, int64_t begin, int64_t end, void* workspace);
  void (*neighbors_exact)(const NeighborsArgs& args, int64_t row, void* workspace);  // against all of y in float64
  // Queries [begin, end), with so many bytes of a task, aligned to 64.
  int64_t (*retrieval_metrics_room)(const RetrievalMetricsArgs& args);
  void (*retrieval_metrics)(const RetrievalMetricsArgs& args, int64_t begin, int64_t end, void* workspace);
  // Blocks of channels that tasks are made of: task t of the norm_* kernels is sample t / blocks, block t % blocks.
  int64_t (*norm_blocks)(const NormArgs& args);
  void (*norm_moments)(const NormArgs& args, int64_t begin, int64_t end);  // x -> sum: mean, centred_sum: variance
  void (*norm_affine)(const NormArgs& args, int64_t begin, int64_t end);   // out = act(scale (x-mean)+shift+residual)
  void (*norm_sums)(const NormArgs& args, int64_t begin, int64_t end);     // sum of dy', of dy' (x - mean)
  void (*norm_input_grad)(const NormArgs& args, int64_t begin, int64_t end);  // scale dy' + shift + slope (x - mean)
  void (*domain_norm_forward)(const DomainNormArgs& args, NormStage stage, int64_t begin, int64_t end);
  void (*domain_norm_backward)(const DomainNormArgs& args, NormStage stage, int64_t begin, int64_t end);
  // Rows [begin, end).
  void (*distillation_kl)(const DistillationArgs& args, int64_t begin, int64_t end);
  // Order: see QueueContrastPlan.
  QueueContrastPlan (*queue_contrast_plan)(const QueueContrastArgs& args);
  void (*queue_contrast_accumulate)(const QueueContrastArgs& args, int64_t begin, int64_t end, void* workspace);
  void (*queue_contrast_merge)(const QueueContrastArgs& args, int64_t begin, int64_t end);
  // Rows h + H n of images forward, images backward; with so many bytes of a task, aligned to 64.
  int64_t (*region_mixup_room)(const RegionMixupArgs& args);
  void (*region_mixup)(const RegionMixupArgs& args, int64_t begin, int64_t end, void* workspace);
  void (*region_mixup_backward)(const RegionMixupArgs& args, int64_t begin, int64_t end, void* workspace);
  // Task b + blocks n is block b of channels of sample n; then, for maps_grad, one a sample.
  int64_t (*pose_pool_room)(const PosePoolArgs& args);
  void (*pose_pool)(const PosePoolArgs& args, int64_t begin, int64_t end, void* workspace);
  void (*pose_pool_backward)(const PosePoolArgs& args, int64_t begin, int64_t end, void* workspace);
  void (*pose_pool_maps_grad)(const PosePoolArgs& args, int64_t begin, int64_t end);
  // Blocks [begin, end): least penalty, or NaN -> partial[2 b]; tilt and the sum of y -> partial[2 b]; sums of
  // 1 / (r + e) and of its square -> partial[2 b], [2 b + 1]; D and w from r, the root (JS) or the mean of y (KL).
  void (*discriminator_minimum)(const DiscriminatorArgs& args, int64_t begin, int64_t end);
  void (*discriminator_tilt)(const DiscriminatorArgs& args, double lowest, int64_t begin, int64_t end);
  void (*discriminator_sums)(const DiscriminatorArgs& args, double r, int64_t begin, int64_t end);
  void (*discriminator_finish)(const DiscriminatorArgs& args, double r, int64_t begin, int64_t end);
  // Codes [begin, end) of B L, with so many bytes of a task, aligned to 64.
  int64_t (*projected_step_room)(const ProjectedStepArgs& args);
  void (*projected_step)(const ProjectedStepArgs& args, int64_t begin, int64_t end, void* workspace);
};

// Runs all stages; parallel(count, f) must call f(begin, end) over [0, count) and return when all are done.
template <class Parallel>
inline void compute_moments(const Kernels& kernels, const MomentsArgs& args, const Parallel& parallel) {
  const MomentsPlan plan = kernels.moments_plan(args);
  kernels.moments_start(args);
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    parallel(plan.pack_tasks, [&](int64_t begin, int64_t end) { kernels.moments_pack(args, chunk, begin, end); });
    parallel(plan.multiply_tasks,
             [&](int64_t begin, int64_t end) { kernels.moments_multiply(args, chunk, begin, end); });
  }
  parallel(plan.finish_tasks, [&](int64_t begin, int64_t end) { kernels.moments_finish(args, begin, end); });
}

// The table of the level in use; throws std::invalid_argument if NEURALDEPS_CPU_LEVEL names none that this machine
// runs.
const Kernels& kernels();

// Names of the levels in the binary, and of those this machine runs, slowest first, separated by spaces.
std::string compiled_levels();
std::string available_levels();

}  // namespace nd::cpu
