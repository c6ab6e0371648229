/* C interface of libneuraldeps_cuda: no framework types, sizes in elements, work queued on `stream`.
   Every function returns a cudaError_t (0 is success) and never synchronises. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define ND_CUDA_API_VERSION 1
#define ND_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif
ND_API int nd_cuda_api_version(void);
ND_API const char* nd_cuda_error_string(int code);
ND_API int nd_cuda_device_count(int* count);

/* Arguments as in nd::cpu::CovlassoArgs (cpu_api.h), all pointers on the device; `workspace` holds at least
   nd_covlasso_workspace_*(n, num_targets) bytes. */
ND_API size_t nd_covlasso_workspace_f32(int64_t n, int64_t num_targets);
ND_API size_t nd_covlasso_workspace_f64(int64_t n, int64_t num_targets);
ND_API int nd_covlasso_f32(const float* cov, int64_t n, int64_t ld, const int64_t* targets, const double* lam,
                           int64_t num_targets, const float* penalty, int64_t penalty_stride, double tol,
                           int64_t max_pivots, int32_t* index, float* value, int64_t capacity, int32_t* count,
                           double* info, void* workspace, void* stream);
ND_API int nd_covlasso_f64(const double* cov, int64_t n, int64_t ld, const int64_t* targets, const double* lam,
                           int64_t num_targets, const double* penalty, int64_t penalty_stride, double tol,
                           int64_t max_pivots, int32_t* index, double* value, int64_t capacity, int32_t* count,
                           double* info, void* workspace, void* stream);
#ifdef __cplusplus
}
#endif
