// The Python module `_C`. It has no operators itself: each file in cpu/ and cuda/ registers its
// operators with the dispatcher when this library is loaded; Python declares their schemas.

// No torch API is used here, and torch's copy of pybind11, which is the fallback, must not be
// included with a target version defined.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// CPU features at run time, of those that the kernels use.
py::list cpu_features() {
  py::list names;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
#define UNIMOE_ADD_FEATURE(name) \
  if (__builtin_cpu_supports(name)) names.append(name)
  UNIMOE_ADD_FEATURE("avx2");
  UNIMOE_ADD_FEATURE("fma");
  UNIMOE_ADD_FEATURE("avx512f");
  UNIMOE_ADD_FEATURE("avx512bw");
  UNIMOE_ADD_FEATURE("avx512vl");
  UNIMOE_ADD_FEATURE("avx512vnni");
  UNIMOE_ADD_FEATURE("avx512bf16");
#undef UNIMOE_ADD_FEATURE
#endif
  if (unimoe::cpu_has_tiles()) {
    names.append("amx-tile");
    names.append("amx-bf16");
  }
  return names;
}

// Instruction sets for which CPU kernels are compiled and which this CPU supports.
py::list cpu_isas() {
  py::list names;
  for (const char* name : {"portable", "avx2", "avx512", "avx512_bf16", "amx"}) {
    if (unimoe::find_kernels(name) != nullptr) names.append(name);
  }
  return names;
}

py::object text_or_none(const std::string& text) {
  if (text.empty()) return py::none();
  return py::str(text);
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = text_or_none(UNIMOE_BUILD_CUDA);
  info["cuda_archs"] = text_or_none(UNIMOE_BUILD_ARCHS);
  info["compiler"] = kCompiler;
  info["flags"] = UNIMOE_BUILD_FLAGS;
  info["cpu_features"] = cpu_features();
  info["cpu_isas"] = cpu_isas();
  info["cpu_isa"] = unimoe::kernels().name;
  info["unpacked_rows"] = unimoe::kFewLines;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of unimoe_kernels.";
  m.def("build_info", &build_info,
        "Returns versions and flags of the build, and the CPU features found at run time.");
}
