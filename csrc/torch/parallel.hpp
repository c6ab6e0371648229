// Tasks of unequal work on torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "neuraldeps/memory.hpp"

namespace nd {

// Calls f(task, workspace) for every task, each thread taking the next one when it is free.
template <class F>
void hand_out(int64_t tasks, int64_t workspace_bytes, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Memory workspace = allocate(workspace_bytes);
    for (; begin < end; begin++)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task, workspace.get());
  });
}

// f(begin, end, workspace) over ranges of `grain` of [0, count).
template <class F>
void hand_out_ranges(int64_t count, int64_t grain, int64_t workspace_bytes, const F& f) {
  hand_out((count + grain - 1) / grain, workspace_bytes,
           [&](int64_t task, void* workspace) { f(task * grain, std::min(count, (task + 1) * grain), workspace); });
}

}  // namespace nd
