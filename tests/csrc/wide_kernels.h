// The kernels with the vectors and tiles of AVX-512, in whatever registers the compiler may use: so that their tiles, and
// halves of vectors, are tested on every processor.
#pragma once

#include "cpu.h"
#include "cpu_includes.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // of functions that take such vectors: they are called from here alone
#endif

namespace posmlp::cpu {
namespace wide {
namespace {
constexpr int kVectorBytes = 64, kTileRows = 7, kLeastRows = 4, kTileVectors = 3;
}
#include "cpu_kernels.h"
}  // namespace wide

const Kernels kWide = {"wide", wide::statistics, wide::forward, wide::backward, wide::norm_backward};
}  // namespace posmlp::cpu
