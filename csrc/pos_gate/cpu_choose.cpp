// Which instruction set's kernels run on this processor.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu.h"

namespace posmlp::cpu {

std::vector<const Kernels*> kernels_of_this_processor() {
  std::vector<const Kernels*> kernels;
#ifdef POSMLP_X86_KERNELS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma");
#ifdef POSMLP_X86_BF16_KERNELS
  if (avx512 && __builtin_cpu_supports("avx512bf16")) kernels.push_back(&kAvx512Bf16);
#endif
  if (avx512) kernels.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(&kAvx2);
#endif
  kernels.push_back(&kPortable);
  return kernels;
}

namespace {

const Kernels& find_kernels() {
  const auto kernels = kernels_of_this_processor();
  const char* name = std::getenv("POSMLP_CPU_KERNELS");
  if (name == nullptr || *name == '\0') return *kernels.front();
  std::string known;
  for (const Kernels* k : kernels) {
    if (std::string(name) == k->name) return *k;
    known += std::string(known.empty() ? "" : ", ") + k->name;
  }
  throw std::runtime_error("POSMLP_CPU_KERNELS must be one of " + known + " on this processor, got " + name);
}

}  // namespace

const Kernels& choose_kernels() {
  static const Kernels& chosen = find_kernels();
  return chosen;
}

}  // namespace posmlp::cpu
