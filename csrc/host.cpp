// flexmore_kernels._host: facts about the build, as a dict. Without torch; the package works
// without this module, which (unlike _C) fits one Python version.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_host, m) {
    m.doc() = "How the compiled library was built.";
    m.def(
        "build_info",
        [] {
            pybind11::dict info;
            info["compiler"] = FM_COMPILER;
            info["flags"] = FM_FLAGS;
            info["nvcc"] = FM_NVCC;
            info["vector_widths"] = FM_WIDTHS;
            info["torch"] = FM_TORCH;
            info["commit"] = FM_COMMIT;
            return info;
        },
        "compiler, flags, nvcc, vector_widths, torch (built against), commit: all strings.");
}
