// CovLasso from a covariance matrix, exactly, one thread block a target:
//
//     min over w, w_i = 0:   w' S w / 2 - s' w + sum_j a_j |w_j|,     s = S[i], a_j = (lam / 2) penalty_j
//
// which is  Theta' S Theta + lam sum_j penalty_j |Theta_j|  with Theta_i = -1, halved. With g = S w - s, w is optimal iff
// g_j = -a_j sign(w_j) on the support and |g_j| <= a_j elsewhere. Violations are measured per unit of penalty.
//
// Method: block active set, that is semismooth Newton with a growth limit, as in csrc/cpu/covlasso.cpp.
//   1. w = inv(S_AA) (s_A - a_A sign_A) through a blocked Cholesky factor of S_AA;
//   2. one pass over the n columns of the k rows of S in A: g is never stored, violators go to a list;
//   3. at once: drop every coordinate whose sign flipped, add the worst max(8, k/3) violators (rounded up to a full
//      block); only blocks from the first changed one are factored again, survivors behind it ordered by falling |w|;
//   4. no flip and no violator: the pass is repeated in float64. It is the certificate, or finds what float32 hid. A
//      residual on A above tolerance is refined.
// After 60 steps single pivots up to the first sign change guard termination. No cap on the support.
//
// Floor per target: n k values of S out of L2 for the certifying pass, k^3 / 6 multiply-adds for the factor. n = 1000,
// k = 25, all 1000 targets in float32: 0.1 GB. What a solve does: about 5 passes over growing supports and the float64
// one, gathers of 32-byte sectors, 0.4 to 0.5 MB a target. A step is a chain of waits (5 + 3 blocks + blocks barriers,
// 16 pivots a block, ceil(k/4) loads of a row), so what counts is how many targets an SM holds.
//
// Threads: 4 warps a block, 8 blocks an SM in float32, 4 in float64; a block takes targets from a queue until it is
// empty. Streaming: 16 bytes a thread, two pieces of a row and four rows at a time. Factor: a warp owns 4 of the 16
// columns of a block, so that its triangular solve needs no block barrier; one warp inverts the diagonal block in
// registers.
// Memory: shared memory holds the violators of up to 2048 columns and a factor of 80 (float32) or 64 (float64)
// coordinates. A larger support moves, at most doubling, to a slice of the workspace: slices of one size form a pool
// under locks, which a block takes in rising order only, so that no two can wait for each other.
// Determinism: sums in fixed order, violators ranked by (violation, index); nothing depends on which block, slice or
// warp came first. Limits: n < 2^30.
#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

// Tests shrink these to reach the rare paths with small matrices.
#if !defined(ND_COVLASSO_SHARED_BLOCKS)
#define ND_COVLASSO_SHARED_BLOCKS (20 / static_cast<int>(sizeof(T)))  // 5 and 2
#endif
