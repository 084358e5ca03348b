// The CPU back end's seam: what the op hands to the kernels, and the kernels of each instruction set.
#pragma once

#include "cpu_deal.h"
#include "shape.h"

namespace posmlp::cpu {

enum class Storage { float32, float64, bfloat16, float16 };

// Whether each thread has room to keep P of all groups during a forward, even without any structure.
inline bool keeps_groups(const Shape& shape) {
  constexpr int64_t kMostNumbers = 2 << 20;
  return shape.window_tokens() <= kMostNumbers / shape.groups / shape.window_tokens();
}

// One forward or backward call. Pointers to x, z, dz, dx hold the storage type; everything else is in the accumulation
// type: double for float64, float for the others. Absent parts are null.
struct Call {
  Shape shape;
  Storage storage;
  bool softmax;
  Activation activation;

  const void *x, *table, *matrix, *bias, *norm_weight, *norm_bias;
  bool matrix_per_group;
  double eps;
  View x_view;
  void *norm_mean, *norm_rstd;  // [B * map], written by `statistics`

  void* z;  // contiguous, like dx

  const void* dz;
  View dz_view;
  void* dx;
  void* dx_normed;                                       // [B * map, C], the gradient of the normed X1
  void *dtable_parts, *dmatrix_parts, *dbias_parts;      // [splits x groups, ...], null if not wanted
  void *dnorm_weight_parts, *dnorm_bias_parts;           // [norm_blocks, C]
  int64_t splits;                                        // shares of a group's columns
  int64_t blocks;                                        // of groups
  bool streams;                                          // whether a forward asks for them as a whole
  int64_t norm_blocks;
  Deal* deals;  // of the units: for each class of windows in a forward, of all in a backward

  // Work is cut into units, a group and a share of its columns: block by block, and of a block the groups of one share
  // after the other. Where sums cross units all of that is fixed by the shape and never by the number of threads, so that
  // sums come out the same for any number of threads, and all groups are one block.
  int64_t units() const { return shape.groups * splits; }
  int64_t block_groups() const { return shape.groups / blocks; }
  int64_t share_of(int64_t unit) const { return unit / block_groups() % splits; }
  int64_t group_of(int64_t unit) const {
    return unit / (splits * block_groups()) * block_groups() + unit % block_groups();
  }
};

struct Kernels {
  const char* name;
  void (*statistics)(const Call&, int64_t first_token, int64_t last_token);
  void (*forward)(const Call&, int64_t thread);  // what is dealt to it
  void (*backward)(const Call&, int64_t thread);
  void (*norm_backward)(const Call&, int64_t first_block, int64_t last_block);
};

extern const Kernels kPortable;
#if defined(__x86_64__) && defined(__GNUC__)
#define POSMLP_X86_KERNELS 1
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#if defined(__clang__) || __GNUC__ >= 12
#define POSMLP_X86_BF16_KERNELS 1
extern const Kernels kAvx512Bf16;
extern const Kernels kAvx512Amx;
#endif
#endif

// Bytes of a core's first-level data cache, 0 where the system does not say.
int64_t first_level_bytes();

// Those that this processor runs, the best first.
std::vector<const Kernels*> kernels_of_this_processor();

// The best of them, or the one that the environment variable POSMLP_CPU_KERNELS names.
const Kernels& choose_kernels();

}  // namespace posmlp::cpu
