// Which instruction set's kernels run on this processor, and what they ask about it.
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu.h"

#if defined(POSMLP_X86_BF16_KERNELS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace posmlp::cpu {

namespace {

#ifdef POSMLP_X86_BF16_KERNELS
// Whether there are tile registers for bfloat16, and this process may use them: Linux wants to be asked for them.
bool has_amx() {
#if defined(POSMLP_AMX_EMULATED)
  return true;
#elif defined(__linux__)
  constexpr unsigned kBf16AndTiles = 1u << 22 | 1u << 24, kSavesTiles = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16AndTiles) != kBf16AndTiles) return false;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));  // which is there where AVX-512 is
  return (a & kSavesTiles) == kSavesTiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

int64_t first_level_bytes() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t bytes = std::max<int64_t>(0, sysconf(_SC_LEVEL1_DCACHE_SIZE));
  return bytes;
#else
  return 0;
#endif
}

std::vector<const Kernels*> kernels_of_this_processor() {
  std::vector<const Kernels*> kernels;
#ifdef POSMLP_X86_KERNELS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma");
#ifdef POSMLP_X86_BF16_KERNELS
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && has_amx()) kernels.push_back(&kAvx512Amx);
  // On Intel's they are slower than single numbers (docs/cpu.md says how to see it): pairs have to be made as well.
  const bool pairs_pay = !__builtin_cpu_is("intel");
  if (bf16 && pairs_pay) kernels.push_back(&kAvx512Bf16);
  if (avx512) kernels.push_back(&kAvx512);
  if (bf16 && !pairs_pay) kernels.push_back(&kAvx512Bf16);
#else
  if (avx512) kernels.push_back(&kAvx512);
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(&kAvx2);
#endif
  kernels.push_back(&kPortable);
  return kernels;
}

namespace {

const Kernels& find_kernels() {
  const char* name = std::getenv("POSMLP_CPU_KERNELS");
  const auto kernels = kernels_of_this_processor();
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
