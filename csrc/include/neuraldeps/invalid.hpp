// How wrong values end a call: operators and bindings turn std::invalid_argument into Python's ValueError.
#pragma once
#include <stdexcept>
#include <string>

namespace nd {

[[noreturn]] inline void invalid(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace nd
