// The choice of the instruction set. Every kernel is compiled once per instruction set, into a namespace of that name;
// the build lists the names in pydeq_isa_list.h, from the most basic to the best.
#pragma once

#include "pydeq_isa_list.h"

namespace pydeq {

#define PYDEQ_ISA_ENUMERATOR(isa, ...) isa,
enum class Isa { PYDEQ_FOR_EACH_ISA(PYDEQ_ISA_ENUMERATOR, ) };
#undef PYDEQ_ISA_ENUMERATOR

// The instruction set of every kernel call: the best this CPU has, unless select_isa chose another.
Isa active_isa();

// Chooses an instruction set that this CPU has. Do not call it while an operation runs.
void select_isa(Isa isa);

bool cpu_supports(Isa isa);

}  // namespace pydeq

// Declares `void op(const Args&)` for every instruction set. Use it outside of any namespace; Args is looked up in
// pydeq.
#define PYDEQ_DECLARE_KERNEL(op, Args) PYDEQ_FOR_EACH_ISA(PYDEQ_DECLARE_KERNEL_, op, Args)
#define PYDEQ_DECLARE_KERNEL_(isa, op, Args) \
  namespace pydeq::isa {                     \
  void op(const Args&);                      \
  }

// Calls the kernel declared above for the active instruction set.
#define PYDEQ_CALL_KERNEL(op, ...)                                                             \
  do {                                                                                         \
    switch (::pydeq::active_isa()) { PYDEQ_FOR_EACH_ISA(PYDEQ_CALL_KERNEL_, op, __VA_ARGS__) } \
  } while (0)
#define PYDEQ_CALL_KERNEL_(isa, op, ...) \
  case ::pydeq::Isa::isa:                \
    ::pydeq::isa::op(__VA_ARGS__);       \
    break;
