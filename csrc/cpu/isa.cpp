#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pydeq {
namespace {

#define PYDEQ_ISA_VALUE(isa, ...) Isa::isa,
const Isa all[] = {PYDEQ_FOR_EACH_ISA(PYDEQ_ISA_VALUE, )};
#undef PYDEQ_ISA_VALUE

Isa best_isa() {
  Isa best = all[0];
  for (Isa isa : all) {
    if (cpu_supports(isa)) best = isa;
  }
  return best;
}

Isa active = best_isa();

}  // namespace

bool cpu_supports(Isa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks that the operating system saves the wide registers. Not every compiler knows
  // "f16c", so this bit is read from the CPU.
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == all[0];  // NEON is part of every 64-bit ARM CPU
#endif
}

Isa active_isa() { return active; }

void select_isa(Isa isa) { active = isa; }

}  // namespace pydeq
