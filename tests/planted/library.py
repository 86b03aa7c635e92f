"""Bugs in the compiled library's CPU kernels: csrc/ is compiled again for each."""

from __future__ import annotations

from .bug import Bug

BUGS = (
    Bug(
        "ties in any order",
        "A partial sort by value alone is not stable: the smaller index must win.",
        "csrc/cpu/routing.cpp",
        "                return v[a] > v[b] || (v[a] == v[b] && a < b);\n",
        "                return v[a] > v[b];\n",
        "tests/test_routing.py",
    ),
    Bug(
        "a positive expert bias counts",
        "min(b, 0) is easily read as b: biases start at zero and are mostly negative.",
        "csrc/cpu/routing.cpp",
        "out[e] = std::min<Acc>(to_acc(b[e - 1]), Acc(0));",
        "out[e] = to_acc(b[e - 1]);",
        "tests/test_routing.py",
    ),
    Bug(
        "bfloat16 by cutting bits off",
        "The upper half of a float is a bfloat16, rounded towards zero.",
        "csrc/cpu/simd.h",
        "    const vu32 rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;\n",
        "    const vu32 rounded = w >> 16;\n",
        "tests/test_native_kernels.py",
    ),
    Bug(
        "columns past the last whole vector",
        "The loop over whole vectors, and nothing after it.",
        "csrc/cpu/rows.cpp",
        "    if (i < width) body(i, Part{int(width - i)});\n",
        "    static_cast<void>(i);\n",
        "tests/test_native_kernels.py",
    ),
    Bug(
        "rows of the tail left as they were",
        "Memory from the system is zero at first, so a small program never shows it.",
        "csrc/cpu/gated_mix.cpp",
        "        std::memset(static_cast<void*>(h + routed * F), 0, "
        "sizeof(Elem) * (N - routed) * F);\n",
        "",
        "tests/test_gated_mix.py",
    ),
    Bug(
        "more chunks than a plan may have",
        "T / 128 rounds down; 16384 tokens, and every power of two, are cut right.",
        "csrc/launch.h",
        "std::max(ceil_div(tokens, max_chunks), ceil_div(kChunkSlots, top_k))",
        "std::max(tokens / max_chunks, ceil_div(kChunkSlots, top_k))",
        "tests/test_launch.py",
    ),
)
