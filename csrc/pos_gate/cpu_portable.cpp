// The gate's kernels for any processor: vectors of 16 bytes, which the compiler maps to what the target has.
#include "cpu.h"
#include "cpu_includes.h"

namespace posmlp::cpu {
namespace {
constexpr int kVectorBytes = 16, kTileRows = 4, kLeastRows = 2, kTileVectors = 3;
}
#include "cpu_kernels.h"

const Kernels kPortable = {"portable", statistics, forward, backward, norm_backward};
}  // namespace posmlp::cpu
