// Selection of the kernels for this CPU.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "check.h"

namespace unimoe {
namespace {

bool cpu_runs(const Kernels* table) {
  if (table == nullptr) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (table == avx2_kernels()) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (table == avx512_kernels()) return avx512;
  if (table == avx512_bf16_kernels() || table == amx_kernels()) {
    return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return true;
}

const Kernels& choose() {
  const char* name = std::getenv("UNIMOE_CPU_ISA");
  if (name != nullptr && *name != '\0') {
    const Kernels* named = find_kernels(name);
    UNIMOE_CHECK(named != nullptr, "UNIMOE_CPU_ISA (", name,
                 ") must be portable, avx2, avx512, avx512_bf16 or amx, and supported by this CPU");
    return *named;
  }
  for (const Kernels* table :
       {amx_kernels(), avx512_bf16_kernels(), avx512_kernels(), avx2_kernels()}) {
    if (cpu_runs(table)) return *table;
  }
  return *portable_kernels();
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Kernels* table : {portable_kernels(), avx2_kernels(), avx512_kernels(),
                               avx512_bf16_kernels(), amx_kernels()}) {
    if (table != nullptr && std::strcmp(table->name, name) == 0 && cpu_runs(table)) return table;
  }
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace unimoe
