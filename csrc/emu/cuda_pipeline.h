// Stands in for the header of the CUDA toolkit: asynchronous copies from global to shared memory. A copy happens when
// its thread waits for it, at the latest possible moment, so that data used too early are wrong. A thread that returns
// with copies on their way is reported.
#pragma once
#include "nd_emu_device.hpp"

namespace nd_emu {

// Copies and fills `zero_fill` of the `bytes` with zeros.
inline void copy_now(void* shared, const void* global, size_t bytes, size_t zero_fill) {
  char* to = static_cast<char*>(shared);
  const char* from = static_cast<const char*>(global);
  for (size_t i = 0; i < bytes; ++i) to[i] = i < bytes - zero_fill ? from[i] : 0;
}

}  // namespace nd_emu

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zero_fill = 0,
                                    ND_EMU_CALLER) {
  const nd_emu::Place place{"__pipeline_memcpy_async", location};
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (bytes != 4 && bytes != 8 && bytes != 16) nd_emu::fail("an asynchronous copy is of 4, 8 or 16 bytes", place);
  if (addresses & (bytes - 1)) nd_emu::fail("an asynchronous copy is not aligned to its size", place);
  if (zero_fill > bytes) nd_emu::fail("an asynchronous copy fills more than its size", place);
  nd_emu::add_copy({shared, global, bytes, zero_fill});
}

inline void __pipeline_commit() { nd_emu::commit_copies(); }

// Waits for all groups committed but the last `groups`.
inline void __pipeline_wait_prior(size_t groups) {
  nd_emu::Copy copy;
  while (nd_emu::take_copy(groups, &copy)) nd_emu::copy_now(copy.shared, copy.global, copy.bytes, copy.zero_fill);
}
