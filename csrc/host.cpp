// flexmore_kernels._host: the launch arithmetic of launch.h and the facts of the build, for tests
// and bug reports. Without torch. Nothing needs this module, which (unlike _C) fits one Python
// version; the wheels leave it out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "decode_plan.h"
#include "launch.h"

namespace py = pybind11;
using namespace flexmore::cuda;

namespace {

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    throw py::value_error(std::string(name) + ": got " + std::to_string(value) +
                          "; accepted: " + std::to_string(least) + " to " + std::to_string(most));
}

py::dict plan(int64_t tokens, int64_t top_k, int64_t num_experts, bool by_set, int64_t max_blocks) {
    check_range("top_k", top_k, 1, INT32_MAX);
    check_range("tokens", tokens, 0, INT32_MAX / top_k);
    check_range("num_experts", num_experts, 1, by_set ? kMaxSetExperts : kMaxKeys);
    check_range("max_blocks", max_blocks, 1, INT32_MAX);
    const PlanLaunch launch = plan_launch(tokens, top_k, static_cast<int>(num_experts), by_set,
                                          static_cast<int>(max_blocks));
    py::dict found;
    found["one_block"] = launch.one_block;
    found["chunk_tokens"] = launch.chunk_tokens;
    found["num_chunks"] = launch.num_chunks;
    found["warps"] = launch.warps;
    found["shared_bytes"] = launch.shared_bytes;
    found["counts"] = launch.counts;
    return found;
}

py::dict row(int64_t words, int64_t per_thread) {
    check_range("words", words, 1, int64_t(1) << 48);
    check_range("per_thread", per_thread, 1, 1 << 10);
    const RowLaunch launch = row_launch(words, per_thread);
    py::dict found;
    found["threads"] = launch.threads;
    found["columns"] = launch.columns;
    return found;
}

py::dict work(const decode::Work& work) {
    py::list groups;
    for (int g = 0; g < work.num_groups; ++g) {
        const decode::Group& group = work.groups[g];
        groups.append(py::make_tuple(group.rows, group.blocks, group.first_unit, group.expert));
    }
    py::dict found;
    found["chunks"] = work.chunks;
    found["tile_rows"] = work.tile_rows;
    found["parts"] = work.parts;
    found["groups"] = groups;
    found["start"] = std::vector<int>(work.start, work.start + work.grid + 1);
    return found;
}

py::dict decode_cut(bool down, int rows, int processors, int shared, int tokens) {
    decode::Cut cut{};
    decode::plan_cut(cut, down, rows, processors, shared, tokens);
    py::dict found;
    found["rows"] = cut.rows;
    found["blocks"] = cut.blocks;
    found["per_block"] = cut.per_block;
    found["tile_rows"] = cut.tile_rows;
    found["grid"] = cut.grid();
    found["most_rows"] = decode::expand_rows(down);
    found["slots"] = decode::expand_slots(tokens);
    found["bytes"] = cut.bytes(down, tokens);
    found["most_bytes"] = decode::expand_bytes(down, shared);
    return found;
}

py::dict decode_plan(int64_t hidden, int64_t width, const std::vector<int64_t>& ranks,
                     int64_t processors, int64_t shared, int64_t tokens) {
    check_range("hidden", hidden, 1, 1 << 16);
    check_range("width", width, 1, 1 << 17);
    check_range("processors", processors, 1, decode::kMaxBlocks);
    check_range("shared", shared, 1 << 16, 1 << 20);
    check_range("tokens", tokens, 8, 64);
    check_range("len(ranks)", int64_t(ranks.size()), 1, decode::kMaxExperts);
    std::vector<int> narrow;
    for (const int64_t rank : ranks) {
        check_range("rank", rank, 0, 1 << 16);
        narrow.push_back(int(rank));
    }
    const auto product = std::make_unique<decode::Work>();
    const int bytes = decode::product_bytes(int(shared)), T = int(tokens), P = int(processors);
    decode::plan_product(*product, int(hidden), int(width), narrow.data(), int(narrow.size()), P,
                         bytes);
    py::dict found;
    found["product"] = work(*product);
    found["cut_in"] = decode_cut(false, int(width), P, int(shared), T);
    found["cut_down"] = decode_cut(true, int(hidden), P, int(shared), T);
    found["product_bytes"] = bytes;
    return found;
}

py::dict sweep(const std::vector<int64_t>& size) {
    check_range("sizes", static_cast<int64_t>(size.size()), 11, 11);
    SweepSize s{size[0], size[1], size[2], size[3], size[4],  size[5],
                size[6], size[7], size[8], size[9], size[10], 0};
    s.groups = sweep_groups(s.tokens, s.top_k, s.num_experts, s.width, s.blocks);
    const SweepLaunch launch = sweep_launch(s);
    py::dict found;
    found["groups"] = s.groups;
    found["passes"] = launch.passes;
    found["steps"] = launch.steps;
    found["slots"] = launch.slots;
    found["tiles_per_warp"] = launch.tiles_per_warp;
    found["staged_experts"] = launch.staged_experts;
    found["shared_bytes"] = launch.shared_bytes;
    return found;
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = FM_COMPILER;
    info["flags"] = FM_FLAGS;
    info["nvcc"] = FM_NVCC;
    info["vector_widths"] = FM_WIDTHS;
    info["torch"] = FM_TORCH;
    info["commit"] = FM_COMMIT;
    return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "How CUDA kernels are launched, and how the library was built.";
    m.def("plan_launch", &plan, py::arg("tokens"), py::arg("top_k"), py::arg("num_experts"),
          py::arg("by_set"), py::arg("max_blocks"),
          "How make_plan is launched on CUDA, a dict: one_block, chunk_tokens, num_chunks, warps, "
          "shared_bytes (of a block), counts (int32 numbers of workspace). max_blocks: how many "
          "run at a time. ValueError for what make_plan refuses.");
    m.def("row_launch", &row, py::arg("words"), py::arg("per_thread"),
          "How permute and unpermute are launched on CUDA for rows of so many accesses, a dict: "
          "threads of a block, columns (blocks a row).");
    m.def("decode_plan", &decode_plan, py::arg("hidden"), py::arg("width"), py::arg("ranks"),
          py::arg("processors"), py::arg("shared"), py::arg("tokens"),
          "How the kernels for few tokens share their work on a device of so many multiprocessors "
          "with so many bytes of shared memory, a dict: product (chunks, tile_rows, parts, groups, "
          "start), cut_in, cut_down (rows, blocks, per_block, tile_rows, grid, most_rows, slots, "
          "bytes, most_bytes), product_bytes.");
    m.def("sweep_launch", &sweep, py::arg("sizes"),
          "How rows of many experts are swept on CUDA, a dict; sizes: tokens, top_k, num_experts, "
          "width, blocks, warps of a block that form rows, bytes of shared memory and of the L2 "
          "cache, and bytes of a tile, of an expert's factors and of what runs ahead.");
    m.def("build_info", &build_info,
          "compiler, flags, nvcc, vector_widths, torch (built against), commit: all strings.");
}
