// Barriers, warp collectives and the reductions of device.hpp, each against plain C++ on the host.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cases.hpp"

namespace {

constexpr unsigned kFull = nd::kFullWarp;

template <class T>
__host__ __device__ T lane_value(int lane) {
  return static_cast<T>(lane * 7 % 32 + 1000000007ll * (sizeof(T) == 8));
}

// ---- shuffles ----

enum Kind { kIndex, kUp, kDown, kXor };

template <class T>
__global__ void shuffles(T* out, int kind, int argument, int width) {
  const int lane = threadIdx.x;
  const T v = lane_value<T>(lane);
  if (kind == kIndex) out[lane] = __shfl_sync(kFull, v, argument, width);
  if (kind == kUp) out[lane] = __shfl_up_sync(kFull, v, argument, width);
  if (kind == kDown) out[lane] = __shfl_down_sync(kFull, v, argument, width);
  if (kind == kXor) out[lane] = __shfl_xor_sync(kFull, v, argument, width);
}

// The lane that `lane` reads: the programming guide's words on segments of `width` lanes.
int source_lane(int kind, int lane, int argument, int width) {
  const int first = lane / width * width;
  if (kind == kIndex) return first + argument % width;
  if (kind == kUp) return lane - argument >= first ? lane - argument : lane;
  if (kind == kDown) return lane + argument < first + width ? lane + argument : lane;
  const int source = lane ^ argument;
  return source < first + width ? source : lane;  // earlier segments may be read, later ones not
}

template <class T>
void check_shuffles(const char* what, const std::vector<int>& widths) {
  for (int kind : {kIndex, kUp, kDown, kXor}) {
    for (int width : widths) {
      for (int argument = 0; argument < 32; ++argument) {
        test::DeviceArray<T> out(32, T(0));
        ND_LAUNCH(shuffles<T>, 1, 32, 0, nullptr, out.data(), kind, argument, width);
        std::vector<T> expected(32);
        for (int lane = 0; lane < 32; ++lane) expected[lane] = lane_value<T>(source_lane(kind, lane, argument, width));
        test::expect(what, out.values(), expected);
      }
    }
  }
}

ND_CASE(shuffle_segments) { check_shuffles<int>("int", {1, 2, 4, 8, 16, 32}); }

ND_CASE(shuffle_types) {
  check_shuffles<unsigned>("unsigned", {32});
  check_shuffles<float>("float", {32});
  check_shuffles<double>("double", {32});
  check_shuffles<long long>("long long", {32});
  check_shuffles<unsigned long long>("unsigned long long", {32});
}

// Lanes 0..15 meet three times among themselves while lanes 16..31 already wait for all; then all meet.
__global__ void groups(int* out) {
  const int lane = threadIdx.x;
  int v = lane;
  if (lane < 16) {
    for (int i = 0; i < 3; ++i) v = __shfl_xor_sync(0x0000ffffu, v, 1) + 1;
  }
  out[lane] = __shfl_xor_sync(kFull, v, 16);
}

ND_CASE(groups_of_lanes) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(groups, 1, 32, 0, nullptr, out.data());
  std::vector<int> expected(32);
  for (int lane = 0; lane < 32; ++lane) {
    const int source = lane ^ 16;
    expected[lane] = source < 16 ? (source ^ 1) + 3 : source;
  }
  test::expect("groups", out.values(), expected);
}

// Each warp reverses its values in shared memory, then each half of it; only lanes that exchange values meet.
__global__ void reverse_in_warps(int* out) {
  __shared__ int s[64];
  const int t = threadIdx.x, lane = t % 32, first = t - lane, half = lane & 16;
  s[t] = t;
  __syncwarp();
  const int v = s[first + 31 - lane];
  __syncwarp();
  s[t] = v;
  __syncwarp(half ? 0xffff0000u : 0x0000ffffu);
  out[t] = s[first + half + 15 - lane % 16];
}

ND_CASE(syncwarp_orders_lanes) {
  const test::DeviceArray<int> out(64, 0);
  ND_LAUNCH(reverse_in_warps, 1, 64, 0, nullptr, out.data());
  std::vector<int> expected(64);
  for (int t = 0; t < 64; ++t) expected[t] = t ^ 16;
  test::expect("reversed", out.values(), expected);
}

// ---- votes, matches, reductions of integers ----

__host__ __device__ int predicate(int lane, int pattern) {
  return pattern == 0 ? 0 : pattern == 1 ? 4 : pattern == 2 ? lane % 3 == 0 : lane == 17;
}

__global__ void votes(unsigned* out, unsigned mask, int pattern) {
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const int p = predicate(lane, pattern);
  out[3 * lane] = __ballot_sync(mask, p);
  out[3 * lane + 1] = __any_sync(mask, p) != 0;
  out[3 * lane + 2] = __all_sync(mask, p) != 0;
}

ND_CASE(votes_of_lanes) {
  for (unsigned mask : {kFull, 0x0000ffffu, 0x80020001u}) {
    for (int pattern = 0; pattern < 4; ++pattern) {
      test::DeviceArray<unsigned> out(96, 0u);
      ND_LAUNCH(votes, 1, 32, 0, nullptr, out.data(), mask, pattern);
      unsigned ballot = 0;
      for (int lane = 0; lane < 32; ++lane) ballot |= (predicate(lane, pattern) ? mask & 1u << lane : 0u);
      std::vector<unsigned> expected(96, 0u);
      for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        expected[3 * lane] = ballot;
        expected[3 * lane + 1] = ballot != 0;
        expected[3 * lane + 2] = ballot == mask;
      }
      test::expect("votes", out.values(), expected);
    }
  }
}

template <class T>
__global__ void matches(unsigned* out, T a, T b) {
  const int lane = threadIdx.x;
  int same = -1;
  out[4 * lane] = __match_any_sync(kFull, lane % 5 == 0 ? a : b);
  out[4 * lane + 1] = __match_all_sync(kFull, a, &same);
  out[4 * lane + 2] = same != 0;
  out[4 * lane + 3] = __match_all_sync(kFull, lane % 5 == 0 ? a : b, &same) | (same != 0);
}

template <class T>
void check_matches(const char* what, T a, T b) {
  test::DeviceArray<unsigned> out(128, 0u);
  ND_LAUNCH(matches<T>, 1, 32, 0, nullptr, out.data(), a, b);
  unsigned of_a = 0;
  for (int lane = 0; lane < 32; lane += 5) of_a |= 1u << lane;
  std::vector<unsigned> expected(128, 0u);
  for (int lane = 0; lane < 32; ++lane) {
    expected[4 * lane] = lane % 5 == 0 ? of_a : ~of_a;
    expected[4 * lane + 1] = kFull;
    expected[4 * lane + 2] = 1;
  }
  test::expect(what, out.values(), expected);
}

ND_CASE(matches_of_lanes) {
  check_matches<unsigned>("unsigned", 3u, 4u);
  check_matches<float>("float", 0.5f, -0.5f);
  check_matches<unsigned long long>("unsigned long long", 1ull << 40, 1ull << 41);
}

__global__ void integer_reductions(int* out, unsigned* out_unsigned, const int* in, unsigned mask) {
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const int v = in[lane];
  const unsigned u = static_cast<unsigned>(v);
  out[3 * lane] = __reduce_add_sync(mask, v);
  out[3 * lane + 1] = __reduce_min_sync(mask, v);
  out[3 * lane + 2] = __reduce_max_sync(mask, v);
  out_unsigned[6 * lane] = __reduce_add_sync(mask, u);
  out_unsigned[6 * lane + 1] = __reduce_min_sync(mask, u);
  out_unsigned[6 * lane + 2] = __reduce_max_sync(mask, u);
  out_unsigned[6 * lane + 3] = __reduce_and_sync(mask, u);
  out_unsigned[6 * lane + 4] = __reduce_or_sync(mask, u);
  out_unsigned[6 * lane + 5] = __reduce_xor_sync(mask, u);
}

ND_CASE(integer_reductions_of_lanes) {
  std::vector<int> in(32);
  for (int lane = 0; lane < 32; ++lane) in[lane] = static_cast<int>(0x9E3779B9u * (lane + 1)) | 64;  // sums wrap around
  const test::DeviceArray<int> values(in);
  for (unsigned mask : {kFull, 0x00ff0100u}) {
    test::DeviceArray<int> out(96, 0);
    test::DeviceArray<unsigned> out_unsigned(192, 0u);
    ND_LAUNCH(integer_reductions, 1, 32, 0, nullptr, out.data(), out_unsigned.data(), values.data(), mask);
    std::vector<unsigned> chosen;
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) chosen.push_back(static_cast<unsigned>(in[lane]));
    }
    unsigned sum = 0, all = ~0u, any = 0, odd = 0;
    int low = std::numeric_limits<int>::max(), high = std::numeric_limits<int>::min();
    for (unsigned v : chosen) {
      sum += v, all &= v, any |= v, odd ^= v;
      low = std::min(low, static_cast<int>(v));
      high = std::max(high, static_cast<int>(v));
    }
    const unsigned first = *std::min_element(chosen.begin(), chosen.end());
    const unsigned last = *std::max_element(chosen.begin(), chosen.end());
    std::vector<int> expected(96, 0);
    std::vector<unsigned> expected_unsigned(192, 0u);
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const int row[] = {static_cast<int>(sum), low, high};
      const unsigned row_unsigned[] = {sum, first, last, all, any, odd};
      std::copy(std::begin(row), std::end(row), &expected[3 * lane]);
      std::copy(std::begin(row_unsigned), std::end(row_unsigned), &expected_unsigned[6 * lane]);
    }
    test::expect("int", out.values(), expected);
    test::expect("unsigned", out_unsigned.values(), expected_unsigned);
  }
}

// ---- barriers ----

// Thread 0 of each warp returns before the votes; the others vote (t & 1), then all pass a value around the block.
__global__ void block_votes(int* out) {
  __shared__ int s[96];
  const int t = threadIdx.x;
  if (t % 32 == 0) return;
  const int odd = __syncthreads_count(t & 1), any = __syncthreads_or(t == 70), none = __syncthreads_or(t == 64);
  const int all = __syncthreads_and(t > 0), some = __syncthreads_and(t > 50);
  s[t] = t;
  __syncthreads();
  out[t] =
      1000000 * (any != 0) + 100000 * (none != 0) + 10000 * (all != 0) + 1000 * (some != 0) + odd + s[95 - t + t / 95];
}

ND_CASE(block_votes_after_returns) {
  test::DeviceArray<int> out(96, -1);
  ND_LAUNCH(block_votes, 1, 96, 0, nullptr, out.data());
  std::vector<int> expected(96, -1);
  for (int t = 0; t < 96; ++t) {
    if (t % 32 != 0) expected[t] = 1000000 + 10000 + 48 + 95 - t + t / 95;
  }
  std::vector<int> actual = out.values();
  for (int t : {31, 63}) actual[t] = expected[t] = 0;  // they read what threads 64 and 32, which returned, never wrote
  test::expect("votes", actual, expected);
}

// Prefix sums by doubling steps in shared memory: two barriers a step.
__global__ void prefix_sums(int* x, int n) {
  ND_DYNAMIC_SHARED(int, s);
  const int t = threadIdx.x;
  s[t] = x[blockIdx.x * n + t];
  for (int step = 1; step < n; step *= 2) {
    __syncthreads();
    const int add = t >= step ? s[t - step] : 0;
    __syncthreads();
    s[t] += add;
  }
  x[blockIdx.x * n + t] = s[t];
}

ND_CASE(prefix_sums_of_blocks) {
  for (int n : {1, 31, 33, 1024}) {  // less than a warp, a warp and one thread, the largest block
    std::vector<int> x(3 * n), expected(3 * n);
    for (int i = 0; i < 3 * n; ++i) {
      x[i] = i * 37 % 101;
      expected[i] = x[i] + (i % n ? expected[i - 1] : 0);
    }
    const test::DeviceArray<int> values(x);
    ND_LAUNCH(prefix_sums, 3, n, n * sizeof(int), nullptr, values.data(), n);
    test::expect("prefix sums", values.values(), expected);
  }
}

// ---- reductions of device.hpp ----

template <class T, int kWarps>
__global__ void reductions(const T* in, T* sum, T* max, T* arg_value, int* arg_index) {
  __shared__ T scratch[2][kWarps];
  __shared__ nd::ArgMax<T> arg_scratch[kWarps];
  const int t = threadIdx.x;
  sum[t] = nd::block_sum<kWarps>(in[t], scratch[0]);
  max[t] = nd::block_max<kWarps>(in[t], scratch[1]);
  const nd::ArgMax<T> best = nd::block_argmax<kWarps>(nd::ArgMax<T>{in[t], t}, arg_scratch);
  arg_value[t] = best.value;
  arg_index[t] = best.index;
}

// The butterfly of a warp, then warp after warp.
template <class T>
T sum_in_order(std::vector<T> v) {
  for (size_t first = 0; first < v.size(); first += 32) {
    for (int distance = 16; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) v[first + lane] += v[first + lane + distance];
    }
    if (first > 0) v[0] += v[first];
  }
  return v[0];
}

template <class T, int kWarps>
void check_reductions(const char* what, const std::vector<T>& in) {
  const size_t n = 32 * kWarps;
  const test::DeviceArray<T> values(in);
  const test::DeviceArray<T> sum(n, T(0)), max(n, T(0)), arg_value(n, T(0));
  const test::DeviceArray<int> arg_index(n, -1);
  ND_LAUNCH((reductions<T, kWarps>), 1, n, 0, nullptr, values.data(), sum.data(), max.data(), arg_value.data(),
            arg_index.data());
  size_t best = 0;  // the first NaN, else the first of the largest
  for (size_t i = 1; i < n; ++i) {
    if (in[best] == in[best] && (in[i] != in[i] || in[i] > in[best])) best = i;
  }
  const T total = sum_in_order(in);
  if (total == total) test::expect(what, sum.values(), std::vector<T>(n, total));
  test::expect(what, max.values(), std::vector<T>(n, in[best]));
  test::expect(what, arg_value.values(), std::vector<T>(n, in[best]));
  test::expect(what, arg_index.values(), std::vector<int>(n, static_cast<int>(best)));
}

template <class T, int kWarps>
void check_reductions_of(const char* what) {
  std::vector<T> in(32 * kWarps);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<T>(std::sin(i + 1.0) * 1000);
  check_reductions<T, kWarps>(what, in);
  in[5] = in[17] = in[in.size() - 1] = static_cast<T>(2000);  // ties
  check_reductions<T, kWarps>(what, in);
  if (!std::numeric_limits<T>::has_quiet_NaN) return;
  in[9] = in[in.size() - 2] = std::numeric_limits<T>::quiet_NaN();
  check_reductions<T, kWarps>(what, in);
}

template <class T>
void check_reductions_of_sizes(const char* what) {
  check_reductions_of<T, 1>(what);
  check_reductions_of<T, 4>(what);
  check_reductions_of<T, 5>(what);
  check_reductions_of<T, 32>(what);
}

ND_CASE(block_reductions) {
  check_reductions_of_sizes<float>("float");
  check_reductions_of_sizes<double>("double");
  check_reductions_of_sizes<int>("int");
}

// Two scratch arrays in turn, without a barrier between the calls.
__global__ void sums_in_turn(float* x, int rounds) {
  __shared__ float scratch[2][4];
  float v = x[threadIdx.x];
  for (int i = 0; i < rounds; ++i) v = nd::block_sum<4>(v, scratch[i % 2]) / 128 + threadIdx.x;
  x[threadIdx.x] = v;
}

ND_CASE(reductions_in_turn) {
  const test::DeviceArray<float> x(128, 1.0f);
  ND_LAUNCH(sums_in_turn, 1, 128, 0, nullptr, x.data(), 7);
  std::vector<float> v(128, 1.0f);
  for (int i = 0; i < 7; ++i) {
    const float mean = sum_in_order(v) / 128;
    for (int t = 0; t < 128; ++t) v[t] = mean + t;
  }
  test::expect("sums", x.values(), v);
}

}  // namespace
