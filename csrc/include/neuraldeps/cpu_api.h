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
};
constexpr int64_t kSpectrumGroup = 16;  // small matrices that a task of its best speed holds, or multiples of it
constexpr int64_t kRankUndecided = -2;  // rounding may change the count: the caller takes singular values in float64

struct SpectrumPlan {
  int64_t group;            // matrices a task had best hold; any other number gives the same results
  int64_t workspace_bytes;  // of a task, aligned to 64
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
