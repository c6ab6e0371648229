// The CPU kernels for NumPy arrays and the CUDA kernels for objects with __cuda_array_interface__, without torch.
//
// The module depends on Python alone and may be loaded by itself; neuraldeps_kernels/arrays.py and cupy.py are its
// front ends. It takes arrays as the kernels read them and refuses others by name: what is to be converted, they
// convert. NumPy results are new arrays; CUDA results go to the caller's arrays, so that no CUDA runtime is needed
// here.
//
// Threads: torch lends the operators its own; without torch there are none to lend, so a call starts `threads` of them
// on equal static ranges and joins them before it returns. Results do not depend on their number. The lock of the
// interpreter is released while kernels run.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "neuraldeps/covlasso_problem.hpp"
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/cuda_api.h"
#include "neuraldeps/moments_problem.hpp"
#include "neuraldeps/spectrum_problem.hpp"

namespace py = pybind11;

namespace {

using nd::invalid;
using nd::leading_dimension;
using nd::cpu::CovlassoArgs;
using nd::cpu::CovlassoKernels;
using nd::cpu::kCovlassoInfoSize;

// ------------------------------------------------------------------------------------------------------------- threads

// Runs f(begin, end) over [0, count) on up to `number` threads, the calling one among them; the first exception of any
// thread is thrown when all are done.
class Threads {
 public:
  explicit Threads(int64_t number) : number_(number) {
    if (number < 1) invalid("threads must be at least 1, not " + std::to_string(number));
  }

  template <class F>
  void operator()(int64_t count, int64_t grain, const F& f) const {
    const int64_t parts = std::min(number_, (count + grain - 1) / grain);
    if (parts <= 1) {
      if (count > 0) f(int64_t{0}, count);
      return;
    }
    std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
    const auto run = [&](int64_t part) noexcept {
      try {
        f(part * count / parts, (part + 1) * count / parts);
      } catch (...) {
        errors[static_cast<size_t>(part)] = std::current_exception();
      }
    };
    {
      std::vector<std::jthread> others;  // joined at the end of the scope
      others.reserve(static_cast<size_t>(parts));
      for (int64_t part = 1; part < parts; part++) others.emplace_back(run, part);
      run(0);
    }
    for (const std::exception_ptr& error : errors)
      if (error) std::rethrow_exception(error);
  }

  template <class F>
  void operator()(int64_t count, const F& f) const {
    (*this)(count, 1, f);
  }

 private:
  int64_t number_;
};

// -------------------------------------------------------------------------------------------------------------- arrays

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t d = 0; d < shape.size(); d++) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

// An argument as the kernels see it: NumPy memory or device memory.
struct View {
  std::string name;  // of the argument
  std::string type;  // as in NumPy: "<f4"
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // bytes
  char* data;
  bool writable;

  int64_t dims() const { return static_cast<int64_t>(shape.size()); }
  int64_t size(int64_t d) const { return shape[static_cast<size_t>(d)]; }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t length : shape) product *= length;
    return product;
  }
  int64_t item_size() const { return std::stoll(type.substr(2)); }

  // Are the dimensions from `first` on laid out in C order without gaps?
  bool packed_behind(int64_t first) const {
    int64_t expected = item_size();
    for (int64_t d = dims() - 1; d >= first; d--) {
      if (size(d) > 1 && strides[static_cast<size_t>(d)] != expected) return false;
      expected *= size(d);
    }
    return true;
  }
};

constexpr char kNativeOrder = std::endian::native == std::endian::little ? '<' : '>';

template <class T>
std::string type_code() {
  const char kind = std::floating_point<T> ? 'f' : (std::signed_integral<T> ? 'i' : 'u');
  const char order = sizeof(T) == 1 ? '|' : kNativeOrder;
  return {order, kind, static_cast<char>('0' + sizeof(T))};
}

View view_of(const char* name, const py::array& array) {
  View view = {name,
               py::str(array.dtype().attr("str")),
               {array.shape(), array.shape() + array.ndim()},
               {array.strides(), array.strides() + array.ndim()},
               static_cast<char*>(const_cast<void*>(array.data())),
               array.writeable()};
  if (!py::bool_(array.attr("flags").attr("aligned"))) invalid(view.name + " must be aligned to its values");
  return view;
}

[[noreturn]] void wrong_type(const View& view, const std::string& expected) {
  throw py::type_error(view.name + " must be " + expected + " in native byte order, not '" + view.type + "'");
}

template <class T>
void expect_type(const View& view, const char* expected) {
  if (view.type != type_code<T>()) wrong_type(view, expected);
}

// `letters` are the shape in letters, as in the messages of the operators.
void expect_shape(const View& view, const std::vector<int64_t>& shape, const std::string& letters) {
  if (view.shape != shape)
    invalid(view.name + " must be " + letters + " = " + shape_text(shape) + ", not " + shape_text(view.shape));
}

void expect_contiguous(const View& view) {
  if (view.numel() && !view.packed_behind(0)) invalid(view.name + " must be contiguous in C order");
}

// Memory of the checked type and shape in C order, to read.
template <class T>
T* checked(const View& view, const char* type, const std::vector<int64_t>& shape, const char* letters) {
  expect_type<T>(view, type);
  expect_shape(view, shape, letters);
  expect_contiguous(view);
  return reinterpret_cast<T*>(view.data);
}

template <class T>
T* checked_output(const View& view, const char* type, const std::vector<int64_t>& shape, const char* letters) {
  T* data = checked<T>(view, type, shape, letters);
  if (!view.writable) invalid(view.name + " is read-only");
  return data;
}

// Rows in C order, any distance apart: [n, n] of at least one category.
void expect_covariance(const View& cov) {
  if (cov.type != type_code<float>() && cov.type != type_code<double>()) wrong_type(cov, "float32 or float64");
  if (cov.dims() != 2 || cov.size(0) != cov.size(1))
    invalid("cov must be a square matrix [n, n], not " + shape_text(cov.shape));
  const int64_t n = cov.size(0);
  if (n == 0) invalid("cov must have at least one category, not 0");
  if (n > INT32_MAX - 1024) invalid("cov has " + std::to_string(n) + " rows; at most 2^31 - 1025 are supported");
  const int64_t row = cov.strides[0], item = cov.item_size();
  if (!cov.packed_behind(1) || (n > 1 && (row < n * item || row % item != 0)))
    invalid("cov must have contiguous rows in increasing order");
}

const int64_t* checked_targets(const View& targets) {
  if (targets.dims() != 1) invalid("targets must be int64 [T], not " + shape_text(targets.shape));
  return checked<int64_t>(targets, "int64", targets.shape, "[T]");
}

// Penalty factors shared by all targets or one row of them per target.
template <class T>
struct Penalty {
  const T* data = nullptr;
  int64_t stride = 0;
};

template <class T>
Penalty<T> checked_penalty(const View& penalty, int64_t n, int64_t num_targets) {
  expect_type<T>(penalty, "of the dtype of cov,");
  const std::vector<int64_t> shared = {n}, each = {num_targets, n};
  if (penalty.shape != shared && penalty.shape != each)
    invalid("penalty must be [n] = " + shape_text(shared) + " or [T, n] = " + shape_text(each) + ", not " +
            shape_text(penalty.shape));
  expect_contiguous(penalty);
  return {reinterpret_cast<const T*>(penalty.data), penalty.dims() == 2 ? n : 0};
}

void check_solve_numbers(double tol, int64_t max_pivots) {
  if (!(tol > 0)) invalid("tol must be positive, not " + std::to_string(tol));
  if (max_pivots < 1) invalid("max_pivots must be at least 1, not " + std::to_string(max_pivots));
}

// ------------------------------------------------------------------------------------------------------- CPU: covlasso

// What covlasso and lambda_max read.
template <class T>
struct Problem {
  const T* cov;
  int64_t n, stride;
  const int64_t* targets;
  int64_t num_targets;
  Penalty<T> penalty;
};

template <class T>
Problem<T> checked_problem(const View& cov, const py::array& targets, const std::optional<py::array>& penalty) {
  const View target_view = view_of("targets", targets);
  const int64_t n = cov.size(0);
  Problem<T> problem = {reinterpret_cast<const T*>(cov.data),
                        n,
                        cov.strides[0] / cov.item_size(),
                        checked_targets(target_view),
                        target_view.size(0),
                        {}};
  nd::cpu::check_targets(problem.targets, problem.num_targets, n);
  if (!penalty) return problem;
  const View penalty_view = view_of("penalty", *penalty);
  problem.penalty = checked_penalty<T>(penalty_view, n, problem.num_targets);
  for (int64_t i = 0; i < penalty_view.numel(); i++) {
    if (!(problem.penalty.data[i] > 0))
      invalid("penalty holds " + std::to_string(problem.penalty.data[i]) +
              "; expected positive numbers, or infinity where a category may not enter");
  }
  return problem;
}

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

template <class T>
std::unique_ptr<T[], FreeAligned> aligned_memory(int64_t count) {
  void* memory = ::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64});
  return std::unique_ptr<T[], FreeAligned>(static_cast<T*>(memory));
}

// A vector's memory as a NumPy array, without a copy.
template <class T>
py::array_t<T> as_array(std::vector<T> values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  std::vector<T>* const vector = owned.release();
  const py::capsule owner(vector, [](void* memory) { delete static_cast<std::vector<T>*>(memory); });
  return py::array_t<T>(static_cast<py::ssize_t>(vector->size()), vector->data(), owner);
}

template <class T>
struct CsrRows {
  std::vector<int64_t> indptr = {0};
  std::vector<int32_t> indices;
  std::vector<T> data;
};

constexpr int64_t kPaddedValues = int64_t{1} << 20;  // of the targets that are solved before their results are moved

template <class T>
CsrRows<T> solve(const Problem<T>& problem, const double* lam, double tol, int64_t max_pivots, double* info,
                 const Threads& parallel) {
  const int64_t n = problem.n, capacity = std::max<int64_t>(n - 1, 1);
  const int64_t chunk = std::min(problem.num_targets, std::max<int64_t>(64, kPaddedValues / n));
  const auto packed = aligned_memory<T>(n * leading_dimension(n, sizeof(T)));
  const auto [scale, variance_bound] =
      nd::cpu::pack_covariances<T>({problem.cov, 1, n, 0, problem.stride}, 0, packed.get(), parallel);
  const auto index = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(chunk * capacity));
  const auto value = std::make_unique_for_overwrite<T[]>(static_cast<size_t>(chunk * capacity));
  const auto count = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(chunk));
  std::vector<double> variance(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; i++) variance[static_cast<size_t>(i)] = problem.cov[i * (problem.stride + 1)];
  CsrRows<T> rows;
  for (int64_t first = 0; first < problem.num_targets; first += chunk) {
    const int64_t size = std::min(chunk, problem.num_targets - first);
    const Penalty<T>& penalty = problem.penalty;
    CovlassoArgs<T> args = {};
    args.cov = packed.get();
    args.n = n;
    args.ld = leading_dimension(n, sizeof(T));
    args.variance = variance.data();
    args.variance_bound = variance_bound;
    args.targets = problem.targets + first;
    args.lam = lam + first;
    args.num_lams = 1;
    args.penalty = penalty.data ? penalty.data + first * penalty.stride : nullptr;
    args.penalty_stride = penalty.stride;
    args.tol = tol;
    args.max_pivots = max_pivots;
    args.index = index.get();
    args.value = value.get();
    args.capacity = capacity;
    args.count = count.get();
    args.info = info + first * kCovlassoInfoSize;
    nd::cpu::solve_scaled(args, size, n, scale, [&](const CovlassoArgs<T>& scaled) {
      parallel(size, 1, [&](int64_t begin, int64_t end) { CovlassoKernels<T>::solve()(scaled, begin, end); });
    });
    for (int64_t t = 0; t < size; t++) {
      const int64_t start = t * capacity, end = start + count[static_cast<size_t>(t)];
      rows.indices.insert(rows.indices.end(), index.get() + start, index.get() + end);
      rows.data.insert(rows.data.end(), value.get() + start, value.get() + end);
      rows.indptr.push_back(static_cast<int64_t>(rows.data.size()));
    }
  }
  return rows;
}

template <class T>
py::tuple covlasso_of(const View& cov, const py::array& targets, const py::array& lam,
                      const std::optional<py::array>& penalty, double tol, int64_t max_pivots,
                      const Threads& parallel) {
  const Problem<T> problem = checked_problem<T>(cov, targets, penalty);
  const double* lams = checked<double>(view_of("lam", lam), "float64", {problem.num_targets}, "[T]");
  py::array_t<double> info({problem.num_targets, int64_t{kCovlassoInfoSize}});
  double* const facts = info.mutable_data();
  CsrRows<T> rows;
  {
    const py::gil_scoped_release unlocked;
    rows = solve(problem, lams, tol, max_pivots, facts, parallel);
  }
  return py::make_tuple(as_array(std::move(rows.indptr)), as_array(std::move(rows.indices)),
                        as_array(std::move(rows.data)), info);
}

py::tuple covlasso(const py::array& cov, const py::array& targets, const py::array& lam,
                   const std::optional<py::array>& penalty, double tol, int64_t max_pivots, int64_t threads) {
  const View view = view_of("cov", cov);
  expect_covariance(view);
  check_solve_numbers(tol, max_pivots);
  const auto run = view.item_size() == 4 ? covlasso_of<float> : covlasso_of<double>;
  return run(view, targets, lam, penalty, tol, max_pivots, Threads(threads));
}

template <class T>
py::array_t<double> lambda_max_of(const View& cov, const py::array& targets, const std::optional<py::array>& penalty,
                                  const Threads& parallel) {
  const Problem<T> problem = checked_problem<T>(cov, targets, penalty);
  py::array_t<double> result(problem.num_targets);
  double* const out = result.mutable_data();
  CovlassoArgs<T> args = {};
  args.cov = problem.cov;
  args.n = problem.n;
  args.ld = problem.stride;
  args.targets = problem.targets;
  args.penalty = problem.penalty.data;
  args.penalty_stride = problem.penalty.stride;
  {
    const py::gil_scoped_release unlocked;
    parallel(problem.num_targets, 64,
             [&](int64_t begin, int64_t end) { CovlassoKernels<T>::lambda_max()(args, out, begin, end); });
  }
  return result;
}

py::array_t<double> lambda_max(const py::array& cov, const py::array& targets, const std::optional<py::array>& penalty,
                               int64_t threads) {
  const View view = view_of("cov", cov);
  expect_covariance(view);
  const auto run = view.item_size() == 4 ? lambda_max_of<float> : lambda_max_of<double>;
  return run(view, targets, penalty, Threads(threads));
}

// ----------------------------------------------------------------------------------------------------- CPU: covariance

nd::cpu::Dtype float_type(const View& x) {
  if (x.type == type_code<float>()) return nd::cpu::Dtype::kFloat32;
  if (x.type == type_code<double>()) return nd::cpu::Dtype::kFloat64;
  if (x.type == std::string{kNativeOrder, 'f', '2'}) return nd::cpu::Dtype::kFloat16;
  wrong_type(x, "float32, float64 or float16");
}

py::tuple centered_moments(const py::array& x, const std::optional<py::array>& weights, int64_t threads) {
  const View view = view_of("x", x);
  const Threads parallel(threads);
  const nd::cpu::Dtype dtype = float_type(view);
  if (view.dims() != 3 || view.size(2) == 0) invalid("x must be [B, N, n] with n >= 1, not " + shape_text(view.shape));
  const int64_t batch = view.size(0), rows = view.size(1), n = view.size(2), item = view.item_size();
  const int64_t stride = rows > 1 ? view.strides[1] : n * item;
  if (view.numel() && (!view.packed_behind(2) || stride < n * item || stride % item != 0))
    invalid("x must have contiguous rows in increasing order");
  const double* weight = nullptr;
  if (weights) {
    weight = checked<double>(view_of("weights", *weights), "float64", {batch, rows}, "[B, N]");
    nd::cpu::check_weights(weight, batch * rows);
  }
  py::array_t<double> weight_sum(batch), mean({batch, n}), moment({batch, n, n});
  double *const sums = weight_sum.mutable_data(), *const means = mean.mutable_data(),
                *const moments = moment.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    const nd::cpu::Kernels& kernels = nd::cpu::kernels();
    for (int64_t b = 0; b < batch; b++) {
      nd::cpu::MomentsArgs args = {view.data + b * view.strides[0],
                                   dtype,
                                   rows,
                                   n,
                                   stride / item,
                                   weight ? weight + b * rows : nullptr,
                                   sums + b,
                                   means + b * n,
                                   moments + b * n * n,
                                   nullptr};
      const auto workspace = aligned_memory<char>(kernels.moments_plan(args).workspace_bytes);
      args.workspace = workspace.get();
      nd::cpu::compute_moments(kernels, args, parallel);
      nd::cpu::check_finite_moment(args.moment, n);
    }
  }
  return py::make_tuple(weight_sum, mean, moment);
}

// ------------------------------------------------------------------------------------------------------- CPU: spectrum

// Matrices a [B, m, n] whose rows are contiguous.
nd::cpu::SpectrumArgs spectrum_problem(const View& a) {
  nd::cpu::SpectrumArgs args = {};
  args.dtype = float_type(a);
  if (a.dims() != 3) invalid("a must be [B, m, n], not " + shape_text(a.shape));
  args.a = a.data;
  args.batch = a.size(0);
  args.m = a.size(1);
  args.n = a.size(2);
  const int64_t item = a.item_size(), row = args.m > 1 ? a.strides[1] : args.n * item;
  const int64_t matrix = args.batch > 1 ? a.strides[0] : args.m * args.n * item;
  if (a.numel() && (!a.packed_behind(2) || row % item != 0 || matrix % item != 0))
    invalid("a must have contiguous rows");
  args.row_stride = row / item;
  args.batch_stride = matrix / item;
  return args;
}

// Runs the kernel unless there is nothing to do.
void run_spectrum(const nd::cpu::SpectrumArgs& args, const Threads& parallel, int64_t threads) {
  if (args.batch == 0 || nd::cpu::short_side(args) == 0) return;
  const py::gil_scoped_release unlocked;
  nd::cpu::run_spectrum(args, threads, parallel);
}

py::object svdvals(const py::array& a, int64_t threads) {
  const Threads parallel(threads);
  nd::cpu::SpectrumArgs args = spectrum_problem(view_of("a", a));
  const int64_t k = nd::cpu::short_side(args);
  if (nd::cpu::spectrum_left_to_lapack(args)) return py::none();
  const bool is_double = args.dtype == nd::cpu::Dtype::kFloat64;
  py::array values(is_double ? py::dtype::of<double>() : py::dtype::of<float>(), {args.batch, k});
  args.values = values.mutable_data();
  run_spectrum(args, parallel, threads);
  return std::move(values);
}

py::object matrix_rank(const py::array& a, const py::array& rtol, double atol, bool hermitian, int64_t threads) {
  const Threads parallel(threads);
  const View tolerances = view_of("rtol", rtol);
  nd::cpu::SpectrumArgs args = spectrum_problem(view_of("a", a));
  args.hermitian = hermitian;
  if (hermitian && args.m != args.n) invalid("a must be square if hermitian");
  args.num_rtol = tolerances.dims() == 1 ? tolerances.size(0) : 0;
  args.rtol = checked<double>(tolerances, "float64", {args.num_rtol}, "[R]");
  args.atol = atol;
  if (!(atol >= 0)) invalid("atol must not be negative or NaN, not " + std::to_string(atol));
  for (int64_t r = 0; r < args.num_rtol; r++) {
    if (!(args.rtol[r] >= 0)) invalid("rtol must not be negative or NaN, not " + std::to_string(args.rtol[r]));
  }
  py::array_t<int64_t> rank({args.batch, args.num_rtol});
  args.rank = rank.mutable_data();
  if (nd::cpu::spectrum_left_to_lapack(args)) return py::none();
  std::fill_n(args.rank, rank.size(), int64_t{0});
  run_spectrum(args, parallel, threads);
  return std::move(rank);
}

py::tuple singular_basis(const py::array& a, int64_t threads) {
  const Threads parallel(threads);
  const View view = view_of("a", a);
  nd::cpu::SpectrumArgs args = spectrum_problem(view);
  if (args.dtype == nd::cpu::Dtype::kFloat64) wrong_type(view, "float32 or float16");
  const int64_t k = nd::cpu::short_side(args);
  py::array_t<double> values({args.batch, k}), basis({args.batch, k, k});
  args.values = values.mutable_data();
  args.basis = basis.mutable_data();
  run_spectrum(args, parallel, threads);
  return py::make_tuple(values, basis);
}

// ---------------------------------------------------------------------------------------------------------------- CUDA

// An object with __cuda_array_interface__, version 2 or 3. Its pending work, if it names a stream, must be on `stream`:
// without a CUDA runtime no other can be waited for. 0 and 1 are both the legacy default stream.
View device_view(const char* name, const py::object& object, uintptr_t stream) {
  if (!py::hasattr(object, "__cuda_array_interface__"))
    throw py::type_error(std::string(name) + " must have __cuda_array_interface__, not be " +
                         std::string(py::str(py::type::of(object).attr("__name__"))));
  const auto facts = object.attr("__cuda_array_interface__").cast<py::dict>();
  const auto data = facts["data"].cast<std::pair<uintptr_t, bool>>();
  View view = {name, facts["typestr"].cast<std::string>(), facts["shape"].cast<std::vector<int64_t>>(),
               {},   reinterpret_cast<char*>(data.first),  !data.second};
  if (facts.contains("strides") && !facts["strides"].is_none()) {
    view.strides = facts["strides"].cast<std::vector<int64_t>>();
    if (view.strides.size() != view.shape.size())
      invalid(view.name + ": __cuda_array_interface__ has " + std::to_string(view.strides.size()) + " strides for " +
              std::to_string(view.dims()) + " dimensions");
  } else {
    view.strides.resize(view.shape.size());
    int64_t stride = view.item_size();
    for (int64_t d = view.dims() - 1; d >= 0; d--) {
      view.strides[static_cast<size_t>(d)] = stride;
      stride *= view.size(d);
    }
  }
  if (facts.contains("mask") && !facts["mask"].is_none()) invalid(view.name + " must have no mask");
  if (facts.contains("stream") && !facts["stream"].is_none()) {
    const auto pending = facts["stream"].cast<uintptr_t>();
    if (pending == 0) invalid(view.name + ": stream 0 is not allowed in __cuda_array_interface__");
    if (std::max<uintptr_t>(pending, 1) != std::max<uintptr_t>(stream, 1))
      invalid(view.name + " has pending work on stream " + std::to_string(pending) + ", not on stream " +
              std::to_string(stream) + " of this call; synchronize, or call on that stream");
  }
  if (view.numel() && !view.data) invalid(view.name + " has no memory");
  return view;
}

// The entry points of one type of values.
template <class T>
struct CudaCovlasso;
template <>
struct CudaCovlasso<float> {
  using Workspace = decltype(&nd_covlasso_workspace_f32);
  using Solve = decltype(&nd_covlasso_f32);
  static constexpr const char *kWorkspace = "nd_covlasso_workspace_f32", *kSolve = "nd_covlasso_f32";
};
template <>
struct CudaCovlasso<double> {
  using Workspace = decltype(&nd_covlasso_workspace_f64);
  using Solve = decltype(&nd_covlasso_f64);
  static constexpr const char *kWorkspace = "nd_covlasso_workspace_f64", *kSolve = "nd_covlasso_f64";
};

// Arguments of CudaLibrary::covlasso as Python gives them.
struct DeviceArrays {
  py::object cov, targets, lam, penalty, value, index, count, info, workspace;
};

// libneuraldeps_cuda.so, or a library with the same interface.
class CudaLibrary {
 public:
  explicit CudaLibrary(std::string path)
      : path_(std::move(path)), handle_(dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle_) throw py::import_error(std::string("the CUDA kernels do not load: ") + dlerror());
    if (function<decltype(&nd_cuda_api_version)>("nd_cuda_api_version")() != ND_CUDA_API_VERSION)
      throw py::import_error(path_ + " is of another version of neuraldeps_kernels; reinstall the package");
  }

  int64_t covlasso_workspace(int64_t n, int64_t num_targets, const std::string& dtype) const {
    if (dtype == "float32") return workspace_bytes<float>(n, num_targets);
    if (dtype == "float64") return workspace_bytes<double>(n, num_targets);
    throw py::type_error("dtype must be 'float32' or 'float64', not '" + dtype + "'");
  }

  void covlasso(const py::object& cov, int64_t n, const py::object& targets, const py::object& lam,
                const py::object& penalty, double tol, int64_t max_pivots, const py::object& value,
                const py::object& index, const py::object& count, const py::object& info, const py::object& workspace,
                uintptr_t stream) const {
    check_solve_numbers(tol, max_pivots);
    const DeviceArrays arrays = {cov, targets, lam, penalty, value, index, count, info, workspace};
    const View view = device_view("cov", cov, stream);
    if (view.type == type_code<float>())
      launch<float>(arrays, n, tol, max_pivots, stream);
    else if (view.type == type_code<double>())
      launch<double>(arrays, n, tol, max_pivots, stream);
    else
      wrong_type(view, "float32 or float64");
  }

 private:
  template <class Function>
  Function function(const char* name) const {
    void* symbol = dlsym(handle_, name);
    if (!symbol) throw py::import_error(path_ + " lacks " + name);
    return reinterpret_cast<Function>(symbol);
  }

  template <class T>
  int64_t workspace_bytes(int64_t n, int64_t num_targets) const {
    if (n < 1 || n > INT32_MAX - 1024) invalid("n must be 1 to 2^31 - 1025, not " + std::to_string(n));
    if (num_targets < 0) invalid("num_targets must not be negative, not " + std::to_string(num_targets));
    NdCovlassoArgs args = {};
    args.n = n;
    args.num_targets = num_targets;
    args.num_lams = 1;
    args.capacity = std::max<int64_t>(n - 1, 1);
    using Entry = CudaCovlasso<T>;
    return static_cast<int64_t>(function<typename Entry::Workspace>(Entry::kWorkspace)(&args));
  }

  template <class T>
  void launch(const DeviceArrays& arrays, int64_t n, double tol, int64_t max_pivots, uintptr_t stream) const {
    const auto view = [&](const char* name, const py::object& object) { return device_view(name, object, stream); };
    const View targets = view("targets", arrays.targets), value = view("value", arrays.value),
               workspace = view("workspace", arrays.workspace);
    const int64_t* target = checked_targets(targets);
    const int64_t num_targets = targets.size(0), bytes = workspace_bytes<T>(n, num_targets);
    if (value.dims() != 2) invalid("value must be [T, capacity], not " + shape_text(value.shape));
    const int64_t capacity = value.size(1), ld = leading_dimension(n, sizeof(T));
    NdCovlassoArgs args = {};
    args.cov = checked<T>(view("cov", arrays.cov), "float32 or float64", {n, ld}, "[n, leading_dimension(n)]");
    args.n = n;
    args.ld = ld;
    args.targets = target;
    args.num_targets = num_targets;
    args.lam = checked<double>(view("lam", arrays.lam), "float64", {num_targets}, "[T]");
    args.num_lams = 1;
    if (!arrays.penalty.is_none()) {
      const Penalty<T> penalty = checked_penalty<T>(view("penalty", arrays.penalty), n, num_targets);
      args.penalty = penalty.data;
      args.penalty_stride = penalty.stride;
    }
    args.tol = tol;
    args.max_pivots = max_pivots;
    args.value = checked_output<T>(value, "of the dtype of cov,", {num_targets, capacity}, "[T, capacity]");
    args.index =
        checked_output<int32_t>(view("index", arrays.index), "int32", {num_targets, capacity}, "[T, capacity]");
    args.capacity = capacity;
    args.count = checked_output<int32_t>(view("count", arrays.count), "int32", {num_targets}, "[T]");
    args.info =
        checked_output<double>(view("info", arrays.info), "float64", {num_targets, kCovlassoInfoSize}, "[T, 6]");
    uint8_t* const scratch = checked_output<uint8_t>(workspace, "uint8", workspace.shape, "[bytes]");
    if (workspace.numel() < bytes)
      invalid("workspace must hold " + std::to_string(bytes) + " bytes, not " + std::to_string(workspace.numel()));
    if (reinterpret_cast<uintptr_t>(args.cov) % 64) invalid("cov must be aligned to 64 bytes");
    if (reinterpret_cast<uintptr_t>(scratch) % 64) invalid("workspace must be aligned to 64 bytes");
    const auto solve = function<typename CudaCovlasso<T>::Solve>(CudaCovlasso<T>::kSolve);
    int code = 0;
    {
      const py::gil_scoped_release unlocked;
      code = solve(&args, scratch, reinterpret_cast<void*>(stream));
    }
    if (code != 0)
      throw std::runtime_error(std::string("covlasso: CUDA error: ") +
                               function<decltype(&nd_cuda_error_string)>("nd_cuda_error_string")(code));
  }

  std::string path_;
  void* handle_;  // never closed: kernels may still run when this object goes
};

// ---------------------------------------------------------------------------------------------------------------
// Python

std::tuple<std::string, std::string, std::string> cpu_levels() {
  return {nd::cpu::compiled_levels(), nd::cpu::available_levels(), nd::cpu::kernels().level};
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  using py::arg;
  m.doc() = "CPU kernels for NumPy arrays and CUDA kernels for arrays with __cuda_array_interface__, without torch.";
  m.def("cpu_levels", &cpu_levels, "Instruction-set levels: compiled, runnable on this machine, in use.");
  m.def("leading_dimension", &leading_dimension, arg("n"), arg("bytes_per_value"),
        "Values per row of the zero-padded [n, ld] covariance that CudaLibrary.covlasso takes.");
  m.def("covlasso", &covlasso, arg("cov"), arg("targets"), arg("lam"), arg("penalty") = py::none(), arg("tol") = 1e-6,
        arg("max_pivots") = 100'000, arg("threads") = 1, R"(Solves CovLasso for T targets from one covariance.

Args:
    cov: [n, n] float32 or float64, rows contiguous.
    targets: [T] int64.
    lam: [T] float64.
    penalty: [n] or [T, n] of the dtype of cov, infinite where a category may not enter; None: ones.
    tol: KKT violation allowed, relative to lambda_max / 2.
    max_pivots: coordinates that may enter or leave before a target is given up as capped.
    threads: number of threads; the result does not depend on it.

Returns:
    The coefficients [T, n] as CSR: indptr int64, indices int32, data of the dtype of cov; and info [T, 6] float64:
    err2, duality_gap, kkt_violation, n_pivots, status (0 converged, 1 capped, 2 collinear, 3 not_psd), lambda_max.

Raises:
    TypeError, ValueError: an argument, which is named, has a wrong dtype, shape, layout or value.)");
  m.def("lambda_max", &lambda_max, arg("cov"), arg("targets"), arg("penalty") = py::none(), arg("threads") = 1,
        "2 max over j != i of |S_ij| / penalty_j for each target i: [T] float64. Arguments and errors as covlasso.");
  m.def("centered_moments", &centered_moments, arg("x"), arg("weights") = py::none(), arg("threads") = 1,
        R"(Weighted sum, mean and centred second moment of each batch entry.

Args:
    x: [B, N, n] float32, float64 or float16, rows contiguous.
    weights: [B, N] float64, not negative; None: ones.
    threads: number of threads; the result does not depend on it.

Returns:
    W = sum_r w_r [B], m = sum_r w_r x_r / W [B, n], sum_r w_r (x_r - m) (x_r - m)' [B, n, n], float64.

Raises:
    TypeError, ValueError: an argument, which is named, has a wrong dtype, shape, layout or value.)");
  m.def("svdvals", &svdvals, arg("a"), arg("threads") = 1, R"(Singular values of each matrix, descending.

Args:
    a: [B, m, n] float32, float64 or float16, rows contiguous.
    threads: number of threads; the result does not depend on it.

Returns:
    [B, min(m, n)], float64 for float64, else float32; NaN where a matrix is not finite. None where LAPACK is faster.

Raises:
    TypeError, ValueError: an argument, which is named, has a wrong dtype, shape, layout or value.)");
  m.def("matrix_rank", &matrix_rank, arg("a"), arg("rtol"), arg("atol") = 0.0, arg("hermitian") = false,
        arg("threads") = 1, R"(Number of singular values above max(atol, rtol sigma_1) for each rtol.

Args:
    a, threads: as svdvals.
    rtol: [R] float64, not negative.
    atol: not negative.
    hermitian: a is symmetric, its lower triangle is read and its absolute eigenvalues are counted.

Returns:
    [B, R] int64; -1 where a matrix is not finite, -2 where singular values in float64 must decide. None where LAPACK is
    faster. Raises as svdvals.)");
  m.def("singular_basis", &singular_basis, arg("a"), arg("threads") = 1,
        "Singular values [B, k] and vectors of the shorter side, one a row, [B, k, k], in float64, of a as in svdvals "
        "but "
        "not in float64; NaN where a matrix is not finite.");
  py::class_<CudaLibrary>(m, "CudaLibrary", "The CUDA kernels of libneuraldeps_cuda.so, whose path is given.")
      .def(py::init<std::string>(), arg("path"))
      .def("covlasso_workspace", &CudaLibrary::covlasso_workspace, arg("n"), arg("num_targets"), arg("dtype"),
           "Bytes of workspace that covlasso needs for a dtype, 'float32' or 'float64'.")
      .def("covlasso", &CudaLibrary::covlasso, arg("cov"), arg("n"), arg("targets"), arg("lam"), arg("penalty"),
           arg("tol"), arg("max_pivots"), arg("value"), arg("index"), arg("count"), arg("info"), arg("workspace"),
           arg("stream"), R"(Queues the solution of T targets on `stream` and returns; all arrays are device arrays.

Args:
    cov: [n, leading_dimension(n)] float32 or float64, zero behind column n, aligned to 64 bytes.
    targets, lam, penalty, tol, max_pivots: as the function covlasso; values on the device are not checked.
    value, index: [T, capacity], results: coefficients and their int32 columns; capacity n - 1 holds every support.
    count: [T] int32, result: coefficients of each target.
    info: [T, 6] float64, result.
    workspace: [covlasso_workspace(n, T)] uint8, aligned to 64 bytes.
    stream: cudaStream_t as a number. Arrays that name a stream of their own must name this one.

Raises:
    TypeError, ValueError: an argument, which is named, has a wrong dtype, shape or layout, or is read-only.
    RuntimeError: CUDA refused the launch.)");
}
