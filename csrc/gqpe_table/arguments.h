// The arguments of gqpe_table and its backward as every compiled back end reads them: contract checks and geometry.
#pragma once

#include "../tensors.h"
#include "table.h"

namespace posmlp::gqpe {

struct Arguments {
  Tensor center, factor;
  int rank;
  int64_t groups, entries = 1;
  Sizes table_sizes;
  Group group;  // its rank and window are every group's
  bool is_double;

  Arguments(const Tensor& c, const Tensor& m, const Sizes& window)
      : center(as_contiguous(c)), factor(as_contiguous(m)), rank(int(window.size())) {
    STD_TORCH_CHECK(rank >= 1 && rank <= kRank, "gqpe_table: window must have 1 to 3 sizes, got ", rank);
    STD_TORCH_CHECK(center.dim() == 2 && center.size(1) == rank, "gqpe_table: center must be [S, ", rank, "]");
    group.rank = rank;
    groups = center.size(0);
    STD_TORCH_CHECK(sizes_of(factor) == (Sizes{groups, rank, rank}), "gqpe_table: factor must be [S, d, d]");
    STD_TORCH_CHECK(center.device() == factor.device() && center.scalar_type() == factor.scalar_type(),
                    "gqpe_table: center and factor must share a dtype and a device");
    is_double = center.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(is_double || center.scalar_type() == ScalarType::Float,
                    "gqpe_table: center must be float32 or float64");
    table_sizes.push_back(groups);
    for (int d = 0; d < rank; ++d) {
      STD_TORCH_CHECK(window[d] >= 1, "gqpe_table: window must be at least 1 in every dimension, got ", window[d]);
      group.window[kRank - rank + d] = window[d];
      table_sizes.push_back(2 * window[d] - 1);
      entries *= table_sizes.back();
    }
  }

  // dtable as the kernels read it.
  Tensor gradient(const Tensor& dtable) const {
    STD_TORCH_CHECK(dtable.device() == center.device() && sizes_of(dtable) == table_sizes &&
                        dtable.scalar_type() == center.scalar_type(),
                    "gqpe_table_backward: dtable must have the table's shape, dtype and device");
    return as_contiguous(dtable);
  }
};

}  // namespace posmlp::gqpe
