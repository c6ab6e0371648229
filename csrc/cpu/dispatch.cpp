// Chooses the instruction-set level of the CPU kernels, once a process. Compiled once, for the oldest machine.
#include <array>
#include <cstdlib>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

#include "neuraldeps/cpu_api.h"

namespace nd::cpu {

namespace baseline {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool available;  // this machine runs it
};

// Every compiled level, slowest first.
std::span<const Level> levels() {
#if defined(__x86_64__)
  static const std::array<Level, 3> all = [] {
    __builtin_cpu_init();
    const bool v2 =
        __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return std::array<Level, 3>{{{&baseline::table, v2}, {&avx2::table, v3}, {&avx512::table, v4}}};
  }();
#else
  static const std::array<Level, 1> all{{{&baseline::table, true}}};
#endif
  return all;
}

std::string names(bool only_available) {
  std::string text;
  for (const Level& level : levels()) {
    if (only_available && !level.available) continue;
    if (!text.empty()) text += ' ';
    text += level.kernels->level;
  }
  return text;
}

const Kernels* choose() {
  const char* value = std::getenv("NEURALDEPS_CPU_LEVEL");
  const std::string_view wanted = value ? value : "";
  const Kernels* best = nullptr;
  for (const Level& level : levels()) {
    if (level.available && (wanted.empty() || wanted == level.kernels->level)) best = level.kernels;
  }
  if (best) return best;
  if (wanted.empty())
    throw std::invalid_argument("neuraldeps_kernels needs an x86-64-v2 processor (SSE4.2, POPCNT) or newer");
  throw std::invalid_argument("NEURALDEPS_CPU_LEVEL='" + std::string(wanted) +
                              "': expected a level that this processor runs (" + available_levels() +
                              "); compiled are " + compiled_levels());
}

}  // namespace

std::string compiled_levels() { return names(false); }

std::string available_levels() { return names(true); }

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace nd::cpu
