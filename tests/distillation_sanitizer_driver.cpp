// Runs the kernels of distillation_kl and queue_contrast on edge shapes in a program of its own, to be built with
// sanitizers together with them: arrays of exactly the sizes that cpu_api.h asks for, results full of NaN before. Every
// kernel runs once over all tasks and once task by task from the last to the first; results have to agree to the bit
// and to be finite. Ends with status 1 and a message if they do not.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace nd::cpu::ND_CPU_LEVEL {
void distillation_kl(const DistillationArgs& args, int64_t begin, int64_t end);
QueueContrastPlan queue_contrast_plan(const QueueContrastArgs& args);
void queue_contrast_accumulate(const QueueContrastArgs& args, int64_t begin, int64_t end, void* workspace);
void queue_contrast_merge(const QueueContrastArgs& args, int64_t begin, int64_t end);
}  // namespace nd::cpu::ND_CPU_LEVEL

namespace {

namespace level = nd::cpu::ND_CPU_LEVEL;
using nd::cpu::DistillationArgs;
using nd::cpu::Dtype;
using nd::cpu::QueueContrastArgs;

int failures = 0;

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Memory of exactly `bytes`, all ones: NaN of every type.
struct Memory {
  explicit Memory(int64_t bytes, bool aligned = false)
      : bytes(static_cast<size_t>(bytes)),
        data(aligned ? std::aligned_alloc(64, (this->bytes + 63) / 64 * 64 + 64) : std::malloc(this->bytes + !bytes)) {
    std::memset(data, 0xff, this->bytes);
  }
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;

  size_t bytes;
  void* data;
};

// `count` values of a dtype: -1, 0.5, 1 or 2.
void fill(const Memory& memory, Dtype dtype, int64_t count) {
  static unsigned state = 1;
  constexpr double kValues[] = {-1, 0.5, 1, 2};
  constexpr uint16_t kBfloat16[] = {0xbf80, 0x3f00, 0x3f80, 0x4000}, kFloat16[] = {0xbc00, 0x3800, 0x3c00, 0x4000};
  for (int64_t i = 0; i < count; i++) {
    const unsigned which = (state = state * 1664525u + 1013904223u) >> 30;
    if (dtype == Dtype::kFloat64) static_cast<double*>(memory.data)[i] = kValues[which];
    if (dtype == Dtype::kFloat32) static_cast<float*>(memory.data)[i] = static_cast<float>(kValues[which]);
    if (dtype == Dtype::kBfloat16) static_cast<uint16_t*>(memory.data)[i] = kBfloat16[which];
    if (dtype == Dtype::kFloat16) static_cast<uint16_t*>(memory.data)[i] = kFloat16[which];
  }
}

void expect(bool fine, const char* what, Dtype dtype, int64_t a, int64_t b, int64_t c) {
  if (fine) return;
  std::printf("%s, dtype %d, %ld x %ld x %ld\n", what, static_cast<int>(dtype), a, b, c);
  failures++;
}

bool finite(const std::vector<double>& values) {
  for (const double value : values)
    if (!std::isfinite(value)) return false;
  return true;
}

void distil(Dtype dtype, int64_t N, int64_t C) {
  const int64_t bytes = N * C * size_of(dtype);
  const Memory student(bytes), teacher(bytes), once(bytes), twice(bytes);
  fill(student, dtype, N * C);
  fill(teacher, dtype, N * C);
  std::vector<double> divergence(static_cast<size_t>(N), NAN), statistics(static_cast<size_t>(4 * N), NAN);
  DistillationArgs args = {};
  args.student = student.data;
  args.teacher = teacher.data;
  args.dtype = dtype;
  args.C = args.student_stride = args.teacher_stride = C;
  args.temperature = 2;
  args.divergence = divergence.data();
  args.statistics = statistics.data();
  level::distillation_kl(args, 0, N);
  expect(finite(divergence) && finite(statistics), "forward not finite", dtype, N, C, 0);
  args.factor = 0.5;
  args.dstudent = once.data;
  level::distillation_kl(args, 0, N);
  args.dstudent = twice.data;
  for (int64_t row = N; row-- > 0;) level::distillation_kl(args, row, row + 1);
  expect(!std::memcmp(once.data, twice.data, once.bytes), "gradients differ", dtype, N, C, 0);
}

// Results of all tasks at once, or from the last to the first.
std::vector<double> contrasted(QueueContrastArgs args, bool reversed) {
  const auto plan = level::queue_contrast_plan(args);
  const Memory partial(plan.partial_bytes, true), workspace(plan.workspace_bytes, true);
  const size_t N = static_cast<size_t>(args.N), values = N * static_cast<size_t>(args.d);
  const bool wide = args.dtype == Dtype::kFloat64;
  const Memory mean_q(static_cast<int64_t>(values) * (wide ? 8 : 4)),
      mean_o(static_cast<int64_t>(values) * (wide ? 8 : 4));
  std::vector<double> found(3 * N, NAN);
  args.partial = partial.data;
  args.lse_q = found.data();
  args.lse_o = found.data() + N;
  args.difference = found.data() + 2 * N;
  args.mean_q = mean_q.data;
  args.mean_o = mean_o.data;
  if (reversed) {
    for (int64_t task = plan.tasks; task-- > 0;) level::queue_contrast_accumulate(args, task, task + 1, workspace.data);
    for (int64_t row = args.N; row-- > 0;) level::queue_contrast_merge(args, row, row + 1);
  } else {
    level::queue_contrast_accumulate(args, 0, plan.tasks, workspace.data);
    level::queue_contrast_merge(args, 0, args.N);
  }
  if (!args.original) found.resize(N);
  for (size_t i = 0; args.gradient && i < values; i++)
    for (const Memory* mean : {&mean_q, &mean_o})
      if (mean == &mean_q || args.original)
        found.push_back(wide ? static_cast<double*>(mean->data)[i] : static_cast<float*>(mean->data)[i]);
  return found;
}

void contrast(Dtype dtype, int64_t N, int64_t K, int64_t d) {
  const Dtype rows = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  const Memory q(N * d * size_of(rows)), o(N * d * size_of(rows)), queue(K * d * size_of(dtype));
  fill(q, rows, N * d);
  fill(o, rows, N * d);
  fill(queue, dtype, K * d);
  QueueContrastArgs args = {};
  args.q = q.data;
  args.queue = queue.data;
  args.dtype = dtype;
  args.N = N;
  args.K = K;
  args.d = args.queue_stride = d;
  args.temperature = args.target_temperature = 0.5;
  for (const void* original : {static_cast<const void*>(nullptr), static_cast<const void*>(o.data)}) {
    for (const bool gradient : {false, true}) {
      args.original = original;
      args.gradient = gradient;
      const std::vector<double> once = contrasted(args, false), twice = contrasted(args, true);
      expect(finite(once), "contrast not finite", dtype, N, K, d);
      expect(once == twice, "contrasts differ", dtype, N, K, d);
    }
  }
}

}  // namespace

int main() {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}) {
    for (const int64_t C : {1, 15, 16, 17, 1023, 1025}) distil(dtype, 3, C);
    contrast(dtype, 1, 1, 1);
    contrast(dtype, 13, 33, 5);
    contrast(dtype, 15, 193, 33);
    contrast(dtype, 30, 2500, 3);
    contrast(dtype, 340, 200, 17);
  }
  return failures > 0;
}
