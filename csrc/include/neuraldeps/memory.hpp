// Memory of a call: workspaces and tables, shared by the operators (csrc/torch) and the Python module
// (python_bindings).
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace nd {

constexpr int64_t kHugePage = int64_t{2} << 20;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// Uninitialised, aligned to 64 bytes; from the size of a huge page on, to and of huge pages, which fault less often.
inline Memory allocate(int64_t bytes) {
  const int64_t unit = bytes >= kHugePage ? kHugePage : 64;
  const size_t size = static_cast<size_t>((std::max<int64_t>(bytes, 1) + unit - 1) / unit * unit);
  Memory memory(std::aligned_alloc(static_cast<size_t>(unit), size));
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  if (unit == kHugePage) madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace nd
