// Tasks and limits of the kernel `spectrum`, shared by the operators (csrc/torch) and the Python module
// (python_bindings).
#pragma once
#include <algorithm>
#include <cstdint>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/memory.hpp"

namespace nd::cpu {

inline int64_t short_side(const SpectrumArgs& args) { return std::min(args.m, args.n); }
inline int64_t long_side(const SpectrumArgs& args) { return std::max(args.m, args.n); }

// Whether LAPACK is faster, as measured (benchmarks/bench_spectrum.py): decided by shape and dtype alone.
inline bool spectrum_left_to_lapack(const SpectrumArgs& args) {
  constexpr int64_t kLongestValues = 256;       // short side of values by lanes
  constexpr int64_t kLongestFloat64 = 128;      // the same of float64
  constexpr int64_t kFullLanes = 4;             // smaller batches leave most lanes empty,
  constexpr int64_t kShortWithEmptyLanes = 64;  // which matters beyond this short side,
  constexpr int64_t kShortOfOne = 32;           // and beyond this one for a single matrix
  const int64_t k = short_side(args);
  const bool few = args.batch < kFullLanes;
  if (args.hermitian) return false;
  if (args.dtype == Dtype::kFloat64) return few || k > kLongestFloat64 || long_side(args) > 2 * k;
  if (args.rank) return false;
  return k > (args.batch == 1 ? kShortOfOne : few ? kShortWithEmptyLanes : kLongestValues);
}

// Runs the kernel over the batch; parallel(count, grain, f) must call f(begin, end) over [0, count) in pieces of at
// least `grain`, on up to `threads` threads.
template <class Parallel>
void run_spectrum(const SpectrumArgs& args, int64_t threads, const Parallel& parallel) {
  constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds that are not worth a second thread
  const Kernels& table = kernels();
  const SpectrumPlan plan = table.spectrum_plan(args);
  const int64_t k = short_side(args);
  // Half a group costs more a matrix, with the same result: only for threads that would wait otherwise.
  const int64_t group = plan.group > 1 && args.batch < threads * plan.group ? plan.group / 2 : plan.group;
  const int64_t tasks = (args.batch + group - 1) / group;
  const int64_t work = group * k * k * (long_side(args) + k);
  const int64_t grain = std::max<int64_t>(1, kSerialWork / std::max<int64_t>(work, 1));
  parallel(tasks, grain, [&](int64_t begin, int64_t end) {
    const Memory workspace = allocate(plan.workspace_bytes);
    table.spectrum(args, begin * group, std::min(end * group, args.batch), workspace.get());
  });
}

}  // namespace nd::cpu
