// The kernel table of one instruction-set level. A new kernel is one line of ND_KERNELS, in the order of `struct
// Kernels`; its source file defines a function of that name in nd::cpu::ND_CPU_LEVEL.
#include <type_traits>

#include "neuraldeps/cpu_api.h"

#define ND_KERNELS(X)          \
  X(covlasso_f32)              \
  X(covlasso_f64)              \
  X(covlasso_top_k_f64)        \
  X(covlasso_pack_f32)         \
  X(covlasso_pack_f64)         \
  X(lambda_max_f32)            \
  X(lambda_max_f64)            \
  X(moments_plan)              \
  X(moments_start)             \
  X(moments_pack)              \
  X(moments_multiply)          \
  X(moments_finish)            \
  X(spectrum_plan)             \
  X(spectrum)                  \
  X(fourier_filter_plan)       \
  X(fourier_filter_start)      \
  X(fourier_filter_prepare)    \
  X(fourier_filter_apply)      \
  X(fourier_filter_gradients)  \
  X(fourier_filter_finish)     \
  X(fourier_blocks_plan)       \
  X(fourier_blocks_spectra)    \
  X(fourier_blocks_synthesis)  \
  X(fourier_blocks_room)       \
  X(fourier_blocks_products)   \
  X(neighbors_plan)            \
  X(neighbors_scan)            \
  X(neighbors_settle)          \
  X(neighbors_pack)            \
  X(neighbors_search)          \
  X(neighbors_finish)          \
  X(neighbors_exact)           \
  X(retrieval_metrics_room)    \
  X(retrieval_metrics)         \
  X(norm_blocks)               \
  X(norm_moments)              \
  X(norm_affine)               \
  X(norm_sums)                 \
  X(norm_input_grad)           \
  X(domain_norm_forward)       \
  X(domain_norm_backward)      \
  X(distillation_kl)           \
  X(queue_contrast_plan)       \
  X(queue_contrast_accumulate) \
  X(queue_contrast_merge)      \
  X(region_mixup_room)         \
  X(region_mixup)              \
  X(region_mixup_backward)     \
  X(pose_pool_room)            \
  X(pose_pool)                 \
  X(pose_pool_backward)        \
  X(pose_pool_maps_grad)       \
  X(discriminator_minimum)     \
  X(discriminator_tilt)        \
  X(discriminator_sums)        \
  X(discriminator_finish)      \
  X(projected_step_room)       \
  X(projected_step)

#define ND_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
#define ND_ENTRY(name) .name = name,
#define ND_TEXT_OF(x) #x
#define ND_TEXT(x) ND_TEXT_OF(x)

namespace nd::cpu::ND_CPU_LEVEL {

ND_KERNELS(ND_DECLARE)
extern const Kernels table;
const Kernels table = {.level = ND_TEXT(ND_CPU_LEVEL), ND_KERNELS(ND_ENTRY)};

}  // namespace nd::cpu::ND_CPU_LEVEL
