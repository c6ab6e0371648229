// Runs the CUDA kernels of nearest neighbours on 84 random rows, for the sanitizers; copies, workspace and results of
// exactly the size asked for. "plain": among themselves; "equal": three rows among all, most of which are equal, so
// that lists overflow; "dense": among themselves in float64, three parts, longer lists and all distances of 9 queries.
// 1 if a neighbour is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace {

constexpr int kRows = 84, kPaddedRows = 88, kDim = 21, kPadded = 24, kNearest = 5, kQueries = 9, kQueryNearest = 11,
              kSearched = 3;
constexpr int kTileRows = 40, kTileColumns = 24;

float value_of(uint16_t half) {
  const float subnormal = static_cast<float>(half & 0x3ff) * 0x1p-24f;
  const int exponent = half >> 10 & 31;
  const float size = exponent == 0 ? subnormal : std::ldexp(static_cast<float>(0x400 | (half & 0x3ff)), exponent - 25);
  return half & 0x8000 ? -size : size;
}

template <class T>
int drive(bool equal, bool dense) {
  std::vector<T> x(kRows * kDim);
  unsigned state = 1;
  for (int i = 0; i < kRows * kDim; i++) {
    state = state * 1664525u + 1013904223u;
    x[i] = equal && i / kDim > 4 ? T(1) : static_cast<T>((state >> 20) / 4096.0);
  }
  NdNeighborsArgs args = {};
  args.x = args.y = x.data();
  args.dtype = sizeof(T) == 8;
  args.joined = !equal;
  args.n = dense ? kQueries : equal ? kSearched : kRows;
  args.m = equal ? kRows : kRows - args.n;
  if (!equal) args.y = x.data() + args.n * kDim;
  args.dim = args.x_stride = args.y_stride = kDim;
  args.k = kNearest;
  args.num_queries = dense ? kQueries : 0;
  args.query_k = dense ? kQueryNearest : 0;
  args.wants_largest = 1;
  args.split = args.fine = dense;
  const int width = (dense ? 3 : 1) * kPadded;
  const int searched = equal ? kSearched : kRows;
  std::vector<uint16_t> left((equal ? 8 : kPaddedRows) * width), right(dense || equal ? kPaddedRows * width : 0);
  args.left = left.data();
  args.right = right.empty() ? left.data() : right.data();
  const size_t bytes = nd_neighbors_workspace(&args);
  void* workspace = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  int failures = nd_neighbors_prepare(&args, workspace, nullptr) != 0;

  const auto multiply = [&](int row, int rows, int column, int columns) {
    std::vector<float> product(rows * columns);
    const auto* other = static_cast<const uint16_t*>(args.right);
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < columns; j++)
        for (int k = 0; k < width; k++)
          product[i * columns + j] += value_of(left[(row + i) * width + k]) * value_of(other[(column + j) * width + k]);
    return product;
  };
  for (int row = 0; row < searched; row += kTileRows)
    for (int column = equal ? 0 : row; column < kRows; column += kTileColumns) {
      const int rows = row + kTileRows < searched ? kTileRows : searched - row;
      const int columns = column + kTileColumns < kRows ? kTileColumns : kRows - column;
      const std::vector<float> product = multiply(row, rows, column, columns);
      failures +=
          nd_neighbors_offer(&args, product.data(), columns, row, rows, column, columns, workspace, nullptr) != 0;
    }
  if (dense) {
    const std::vector<float> product = multiply(0, kQueries, kQueries, kRows - kQueries);
    std::vector<float> all(kQueries * (kRows - kQueries));
    failures +=
        nd_neighbors_dense(&args, product.data(), kRows - kQueries, 0, kQueries, all.data(), workspace, nullptr) != 0;
  }
  std::vector<double> key(searched * kNearest), largest(searched), query_key(args.num_queries * args.query_k);
  std::vector<int64_t> index(searched * kNearest), query_index(args.num_queries * args.query_k);
  failures += nd_neighbors_finish(&args, key.data(), index.data(), largest.data(), query_key.data(), query_index.data(),
                                  workspace, nullptr) != 0;
  std::free(workspace);

  for (int i = 0; i < searched; i++) {
    std::vector<char> taken(kRows);
    for (int a = 0; a < kNearest; a++) {  // by search for the next one
      int best = -1;
      double least = INFINITY;
      for (int j = 0; j < kRows; j++) {
        double d = 0;
        for (int k = 0; k < kDim; k++) d += std::pow(static_cast<double>(x[i * kDim + k]) - x[j * kDim + k], 2);
        if (!taken[j] && d < least) least = d, best = j;
      }
      taken[best] = 1;
      failures += index[i * kNearest + a] != best || std::fabs(key[i * kNearest + a] - least) > 1e-12;
    }
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}

}  // namespace

int main(int, char** argv) {
  const bool equal = std::strcmp(argv[1], "equal") == 0, dense = std::strcmp(argv[1], "dense") == 0;
  return dense ? drive<double>(false, true) : drive<float>(equal, false);
}
