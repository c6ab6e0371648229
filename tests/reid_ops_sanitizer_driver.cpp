// Runs the kernels of region_mixup and pose_weighted_pool on edge shapes in a program of its own, to be built with
// sanitizers together with them: arrays of exactly the sizes that cpu_api.h asks for, results full of NaN before. Every
// kernel runs once over all tasks and once task by task from the last to the first; results have to agree to the bit
// and to be finite. Ends with status 1 and a message if they do not.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace nd::cpu::ND_CPU_LEVEL {
int64_t region_mixup_room(const RegionMixupArgs& args);
void region_mixup(const RegionMixupArgs& args, int64_t begin, int64_t end, void* workspace);
void region_mixup_backward(const RegionMixupArgs& args, int64_t begin, int64_t end, void* workspace);
int64_t pose_pool_room(const PosePoolArgs& args);
void pose_pool(const PosePoolArgs& args, int64_t begin, int64_t end, void* workspace);
void pose_pool_backward(const PosePoolArgs& args, int64_t begin, int64_t end, void* workspace);
void pose_pool_maps_grad(const PosePoolArgs& args, int64_t begin, int64_t end);
}  // namespace nd::cpu::ND_CPU_LEVEL

namespace {

namespace level = nd::cpu::ND_CPU_LEVEL;
using nd::cpu::Dtype;
using nd::cpu::PosePoolArgs;
using nd::cpu::RegionMixupArgs;

int failures = 0;

Dtype wide(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

// Values of a dtype in memory of exactly their size, all ones: NaN of every type.
struct Values {
  Dtype dtype;
  size_t bytes;
  void* data;

  Values(Dtype dtype, int64_t count)
      : dtype(dtype),
        bytes(static_cast<size_t>(count) * (dtype == Dtype::kFloat64   ? 8
                                            : dtype == Dtype::kFloat32 ? 4
                                                                       : 2)),
        data(std::malloc(bytes + !bytes)) {
    spoil();
  }
  ~Values() { std::free(data); }
  Values(const Values&) = delete;

  void spoil() { std::memset(data, 0xff, bytes); }

  // 0, 0.25, 0.5 or 1.
  Values& fill() {
    static unsigned state = 1;
    constexpr float kFloat[] = {0, 0.25f, 0.5f, 1};
    constexpr uint16_t kBfloat16[] = {0, 0x3e80, 0x3f00, 0x3f80}, kFloat16[] = {0, 0x3400, 0x3800, 0x3c00};
    const size_t size = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
    for (size_t i = 0; i < bytes / size; i++) {
      const unsigned which = (state = state * 1664525u + 1013904223u) >> 30;
      if (dtype == Dtype::kFloat64) static_cast<double*>(data)[i] = static_cast<double>(kFloat[which]);
      if (dtype == Dtype::kFloat32) static_cast<float*>(data)[i] = kFloat[which];
      if (dtype == Dtype::kBfloat16) static_cast<uint16_t*>(data)[i] = kBfloat16[which];
      if (dtype == Dtype::kFloat16) static_cast<uint16_t*>(data)[i] = kFloat16[which];
    }
    return *this;
  }

  bool finite() const {
    const bool two = dtype == Dtype::kBfloat16 || dtype == Dtype::kFloat16;
    const size_t size = two ? 2 : dtype == Dtype::kFloat32 ? 4 : 8;
    for (size_t i = 0; i < bytes / size; i++) {
      uint64_t bits = 0;
      std::memcpy(&bits, static_cast<char*>(data) + i * size, size);
      const uint64_t exponent = dtype == Dtype::kFloat64    ? uint64_t{0x7ff} << 52
                                : dtype == Dtype::kFloat32  ? 0x7f800000u
                                : dtype == Dtype::kBfloat16 ? 0x7f80u
                                                            : 0x7c00u;
      if ((bits & exponent) == exponent) return false;
    }
    return true;
  }
};

// run(begin, end) over all tasks at once, then from the last to the first: results agree and are finite.
template <class Run>
void check(const char* what, int64_t tasks, const std::vector<Values*>& results, const Run& run) {
  std::vector<std::vector<char>> once;
  run(0, tasks);
  for (Values* result : results) {
    if (!result->finite()) std::printf("%s: not finite\n", what), failures++;
    const char* bytes = static_cast<char*>(result->data);
    once.emplace_back(bytes, bytes + result->bytes);
    result->spoil();
  }
  for (int64_t task = tasks - 1; task >= 0; task--) run(task, task + 1);
  for (size_t i = 0; i < results.size(); i++)
    if (std::memcmp(once[i].data(), results[i]->data, results[i]->bytes) != 0)
      std::printf("%s: other bits task by task\n", what), failures++;
}

// What the operator tells the kernel of borders.
struct Regions {
  std::vector<int64_t> region;
  std::vector<double> step;

  Regions(int64_t pixels, int64_t regions, bool soft) {
    for (int64_t p = 0; p < pixels; p++) {
      region.push_back(p * regions / pixels);
      step.push_back(soft && region.back() + 1 < regions ? 0.25 : 0);
    }
  }
};

void mix(Dtype dtype, bool last, int64_t N, int64_t C, int64_t H, int64_t W, int64_t Rh, int64_t Rw, bool soft) {
  const int64_t count = N * C * H * W;
  Values x_v(dtype, count), x_i(dtype, count), grad(dtype, count), mixed(dtype, count);
  Values ratio(wide(dtype), N * Rh * Rw), ratio_grad(wide(dtype), N * Rh * Rw), dv(dtype, count), di(dtype, count);
  const Regions rows(H, Rh, soft), columns(W, Rw, soft);
  RegionMixupArgs args = {};
  args.dtype = dtype;
  args.channels_last = last;
  args.N = N, args.C = C, args.H = H, args.W = W, args.rows = Rh, args.columns = Rw;
  args.x_v = x_v.fill().data;
  args.x_i = x_i.fill().data;
  args.ratio = ratio.fill().data;
  args.region_of_row = rows.region.data();
  args.region_of_column = columns.region.data();
  args.step_of_row = rows.step.data();
  args.step_of_column = columns.step.data();
  args.mixed = mixed.data;
  args.grad = grad.fill().data;
  Values room(Dtype::kFloat32, (level::region_mixup_room(args) + 3) / 4);
  check("region_mixup", N * H, {&mixed},
        [&](int64_t begin, int64_t end) { level::region_mixup(args, begin, end, room.data); });
  for (int asked = 1; asked < 4; asked++) {
    args.x_v_grad = asked & 1 ? dv.data : nullptr;
    args.x_i_grad = asked & 1 ? di.data : nullptr;
    args.ratio_grad = asked & 2 ? ratio_grad.data : nullptr;
    std::vector<Values*> results;
    if (asked & 1) results = {&dv, &di};
    if (asked & 2) results.push_back(&ratio_grad);
    check("region_mixup_backward", N, results,
          [&](int64_t begin, int64_t end) { level::region_mixup_backward(args, begin, end, room.data); });
  }
}

void pool(Dtype dtype, bool last, bool groups, int64_t N, int64_t C, int64_t S, int64_t K) {
  const int64_t pooled_count = N * C * (groups ? 1 : K);
  Values features(dtype, N * C * S), maps(wide(dtype), N * K * S), pooled(dtype, pooled_count);
  Values grad(dtype, pooled_count), dF(dtype, N * C * S), dH(wide(dtype), N * K * S);
  PosePoolArgs args = {};
  args.dtype = dtype;
  args.channels_last = last;
  args.groups = groups;
  args.N = N, args.C = C, args.S = S, args.K = K;
  args.eps = 0.5;
  args.features = features.fill().data;
  args.maps = maps.fill().data;
  args.pooled = pooled.data;
  args.grad = grad.fill().data;
  const int64_t blocks = nd::cpu::pose_pool_blocks(args);
  Values partial(wide(dtype), N * blocks * (groups ? 1 : K) * S);
  Values room(Dtype::kFloat32, (level::pose_pool_room(args) + 3) / 4);
  check("pose_pool", N * blocks, {&pooled},
        [&](int64_t begin, int64_t end) { level::pose_pool(args, begin, end, room.data); });
  for (int asked = 1; asked < 4; asked++) {
    args.features_grad = asked & 1 ? dF.data : nullptr;
    args.partial = asked & 2 ? partial.data : nullptr;
    std::vector<Values*> results;
    if (asked & 1) results = {&dF};
    if (asked & 2) results.push_back(&partial);
    check("pose_pool_backward", N * blocks, results,
          [&](int64_t begin, int64_t end) { level::pose_pool_backward(args, begin, end, room.data); });
  }
  args.maps_grad = dH.data;
  check("pose_pool_maps_grad", N, {&dH},
        [&](int64_t begin, int64_t end) { level::pose_pool_maps_grad(args, begin, end); });
}

}  // namespace

int main() {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}) {
    for (const bool last : {false, true}) {
      mix(dtype, last, 1, 1, 1, 1, 1, 1, false);
      for (const bool soft : {false, true}) {
        mix(dtype, last, 2, 3, 24, 19, 6, 1, soft);
        mix(dtype, last, 3, 2, 7, 37, 3, 4, soft);
        mix(dtype, last, 1, 70, 5, 16, 5, 16, soft);
      }
      for (const bool groups : {false, true}) {
        pool(dtype, last, groups, 1, 1, 1, 1);
        pool(dtype, last, groups, 2, 37, 35, 3);
        pool(dtype, last, groups, 1, 300, 16, 5);
        pool(dtype, last, groups, 2, 19, 33, 17);
      }
    }
  }
  return failures > 0;
}
