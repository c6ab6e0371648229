// NVTX ranges of the launches, in the domain `neuraldeps`:
//
//   ND_RANGE("covlasso");   names the time from here to the end of the scope
//
// Costs a few nanoseconds while no profiler listens, nothing where setup.py found no nvtx3 headers (ND_NVTX unset).
#pragma once

#if defined(ND_NVTX)
#include <nvtx3/nvtx3.hpp>

namespace nd {
struct NvtxDomain {
  static constexpr const char* name = "neuraldeps";
};
}  // namespace nd

#define ND_RANGE(text)                                                              \
  static const ::nvtx3::registered_string_in<::nd::NvtxDomain> nd_range_name{text}; \
  static const ::nvtx3::event_attributes nd_range_attributes{nd_range_name};        \
  const ::nvtx3::scoped_range_in<::nd::NvtxDomain> nd_range { nd_range_attributes }
#else
#define ND_RANGE(text) static_assert(true)
#endif
