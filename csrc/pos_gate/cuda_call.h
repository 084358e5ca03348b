// One call of the CUDA back end, as its kernels get it: plain values and pointers, no torch.
//
// Everything that kernels hand to each other lies in one workspace; P and its gradient are indexed by the tokens that a
// class of windows (shape.h) has, row by query and column by key:
//
//     mixing    [classes, S, side, side]    P, in x's type; zeros beyond a class's tokens; for products that read it
//     row_max, row_rinv  [classes, S, N]    of the softmax: maximum of the logits, 1 / sum of their exponentials
//     dmixing   [classes, splits, S, N, N]  dL/dP, partial sums over a share of the windows each
//     dbias     [classes, splits, S, N]     partial sums of dz * x2 over channels, by query
//     dlogits   [S, N, N]                   whole window x whole window
//     mean, rstd [B map]                    of the LayerNorm, by token in the order of the map
//     dx_normed [B map, C]                  gradient of the normed X1
//     dnorm     [2, norm_blocks, C]         partial sums of the LayerNorm's dweight and dbias
//
// All partial sums are added up in a fixed order, so that the same input gives the same bits.
#pragma once

#include "cuda_platform.h"

namespace posmlp::cuda {

struct Chip {
  int multiprocessors;
  int64_t shared_bytes;  // that a block may have
  int architecture;      // 80, 90, ...
};

template <class T>
struct Call {
  using A = Accumulation<T>;

  Shape shape;
  int class_count;
  WindowClass classes[kMostClasses];
  bool softmax, matrix_per_group;
  Activation activation;
  A eps;

  const T *x, *dz;
  T *z, *dx;
  View x_view, z_view, dz_view, dx_view;
  const A *table, *matrix, *bias, *norm_weight, *norm_bias;  // null if absent
  A *dtable, *dmatrix, *dbias, *dnorm_weight, *dnorm_bias;   // outputs, null if not wanted

  // The workspace.
  int64_t side, splits, norm_blocks;
  T* mixing;
  A *row_max, *row_rinv, *dmixing, *dbias_parts, *dlogits, *mean, *rstd, *dx_normed, *dnorm_parts;

  POSMLP_BOTH const T* mixing_of(int window_class, int64_t group) const {
    return mixing + (window_class * shape.groups + group) * side * side;
  }
};

}  // namespace posmlp::cuda
