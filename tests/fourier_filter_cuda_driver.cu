// Runs the CUDA Fourier filter for the sanitizers: height, width, batch, channels, dtype (0 float32, 2 bfloat16, 3
// float16), 0 pixels or 1 planes. The filter is a shift of images by a row and a column, K[u, v] = exp(-2 pi i (u / H +
// v / W)), so that y, dx and dweight, which is taken at a gradient of y, have values that need no transform. 1 if any
// is wrong.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace {

// Images of small integers, which every dtype holds.
struct Images {
  int64_t batch, height, width, channels;
  bool planes;
  unsigned seed;

  int64_t size() const { return batch * height * width * channels; }
  int64_t at(int64_t b, int64_t h, int64_t w, int64_t c) const {
    h = (h + height) % height;
    w = (w + width) % width;
    return planes ? ((b * channels + c) * height + h) * width + w : ((b * height + h) * width + w) * channels + c;
  }
  double value(int64_t b, int64_t h, int64_t w, int64_t c) const {
    const uint64_t mixed = (static_cast<uint64_t>(at(b, h, w, c)) * 2654435761u + seed) * 0x9E3779B97F4A7C15u;
    return static_cast<double>(mixed >> 60) - 8;
  }
};

// Whether each of `found` is the value of `images` moved by (by, by), a few rounding errors of the dtype apart.
template <class T>
bool is_moved(const char* name, const std::vector<T>& found, const Images& images, int by, double tolerance) {
  for (int64_t b = 0; b < images.batch; b++)
    for (int64_t h = 0; h < images.height; h++)
      for (int64_t w = 0; w < images.width; w++)
        for (int64_t c = 0; c < images.channels; c++) {
          const double value = static_cast<double>(static_cast<float>(found[images.at(b, h, w, c)]));
          if (std::fabs(value - images.value(b, h + by, w + by, c)) <= tolerance) continue;
          std::printf("%s[%ld, %ld, %ld, %ld] is %g\n", name, long(b), long(h), long(w), long(c), value);
          return false;
        }
  return true;
}

template <class T>
bool run(NdFourierFilterArgs args, double tolerance) {
  const int64_t H = args.height, W = args.width, C = args.channels, half = W / 2 + 1;
  const Images x = {args.batch, H, W, C, args.planes != 0, 1}, grad = {args.batch, H, W, C, args.planes != 0, 2};
  std::vector<T> xs(x.size()), grads(x.size()), y(x.size()), dx(x.size());
  for (int64_t b = 0; b < args.batch; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t w = 0; w < W; w++)
        for (int64_t c = 0; c < C; c++) {
          xs[x.at(b, h, w, c)] = T(static_cast<float>(x.value(b, h, w, c)));
          grads[x.at(b, h, w, c)] = T(static_cast<float>(grad.value(b, h, w, c)));
        }
  std::vector<float> weight(2 * H * half * C), dweight(weight.size());
  for (int64_t u = 0; u < H; u++)
    for (int64_t v = 0; v < half; v++)
      for (int64_t c = 0; c < C; c++) {
        const double angle = 2 * M_PI * (static_cast<double>(u) / H + static_cast<double>(v) / W);
        weight[2 * ((u * half + v) * C + c)] = static_cast<float>(std::cos(angle));
        weight[2 * ((u * half + v) * C + c) + 1] = static_cast<float>(-std::sin(angle));
      }
  args.weight = weight.data();
  const size_t bytes = nd_fourier_filter_backward_workspace(&args);
  std::vector<double> workspace(bytes / sizeof(double));
  if (nd_fourier_filter(&args, xs.data(), y.data(), nullptr)) return false;
  if (nd_fourier_filter_backward(&args, grads.data(), xs.data(), dx.data(), dweight.data(), workspace.data(), nullptr))
    return false;
  // sum dweight K = sum grad y, as y is linear in K.
  for (int64_t c = 0; c < C; c++) {
    double from_weight = 0, from_images = 0;
    for (int64_t i = 0; i < 2 * H * half; i++) {
      const int64_t at = i / 2 * 2 * C + 2 * c + i % 2;
      from_weight += double{weight[at]} * double{dweight[at]};
    }
    for (int64_t b = 0; b < args.batch; b++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t w = 0; w < W; w++) from_images += grad.value(b, h, w, c) * x.value(b, h - 1, w - 1, c);
    if (std::fabs(from_weight - from_images) > 1e-3 * x.size()) {
      std::printf("dweight of channel %ld gives %g, not %g\n", long(c), from_weight, from_images);
      return false;
    }
  }
  return is_moved("y", y, x, -1, tolerance) && is_moved("dx", dx, grad, 1, tolerance);
}

}  // namespace

int main(int, char** argv) {
  NdFourierFilterArgs args = {};
  args.height = std::atoi(argv[1]);
  args.width = std::atoi(argv[2]);
  args.batch = std::atoi(argv[3]);
  args.channels = std::atoi(argv[4]);
  args.dtype = std::atoi(argv[5]);
  args.planes = std::atoi(argv[6]);
  if (!nd_fourier_filter_serves(&args)) return 1;
  const bool right = args.dtype == 0   ? run<float>(args, 1e-4)
                     : args.dtype == 2 ? run<__nv_bfloat16>(args, 0.04)
                                       : run<__half>(args, 0.01);
  return right ? 0 : 1;
}
