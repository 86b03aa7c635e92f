"""Bugs in the Triton kernels that Triton's interpreter shows, or a compilation without a GPU."""

from __future__ import annotations

from .bug import Bug

LOWRANK = "flexmore_kernels/_triton/lowrank.py"
MIX = "flexmore_kernels/_triton/gated_mix.py"
TOKEN_MAJOR = "flexmore_kernels/_triton/token_major.py"
TILES = "flexmore_kernels/_triton/tiles.py"
EXPERTS = "flexmore_kernels/_triton/experts.py"
ROUTED = "flexmore_kernels/_triton/routed.py"
BACKWARD = "flexmore_kernels/_triton/experts_backward.py"

BUGS = (
    # Masks and tails
    Bug(
        "factor gradient takes one row of the next expert",
        "`<=` where an end is exclusive: right but for the last block of an expert's rows.",
        LOWRANK,
        "        live = row < end\n",
        "        live = row <= end\n",
        "tests/test_lowrank.py",
        "interpreter",
    ),
    Bug(
        "shrink drops the last columns of x",
        "The mask in the loop looks superfluous when every width is a multiple of the block.",
        LOWRANK,
        "tl.minimum(width, (split + 1) * split_width), BLOCK_K):",
        "tl.minimum(width // BLOCK_K * BLOCK_K, (split + 1) * split_width), BLOCK_K):",
        "tests/test_lowrank.py",
        "interpreter",
    ),
    Bug(
        "a split sum drops its tail",
        "Parts of a split sum rounded down: only a width that the parts do not divide shows it.",
        LOWRANK,
        "triton.cdiv(triton.cdiv(width, splits), k) * k, *a.stride(),",
        "triton.cdiv(width, k) // splits * k, *a.stride(),",
        "tests/test_lowrank.py",
        "interpreter",
    ),
    Bug(
        "expand reads the next expert's factors past the rank",
        "The rank is masked by the tile, as if every rank were a multiple of it.",
        LOWRANK,
        "mask=m_live & (r < rank)[None, :], other=0.0)\n"
        "        b_columns = r.to(tl.int64)[:, None] * stride_br\n"
        "        b = tl.load(b_rows + b_columns, mask=(r < rank)[:, None] & o_live, other=0.0)",
        "mask=m_live, other=0.0)\n"
        "        b_columns = r.to(tl.int64)[:, None] * stride_br\n"
        "        b = tl.load(b_rows + b_columns, mask=o_live, other=0.0)",
        "tests/test_lowrank.py",
        "interpreter",
    ),
    Bug(
        "a starved expert's gradient is never written",
        "Nothing to add up, so return early: but the memory is not zero.",
        LOWRANK,
        "    r_begin = tl.load(rank_offsets_ptr + expert) + z_column\n",
        "    r_begin = tl.load(rank_offsets_ptr + expert) + z_column\n"
        "    if end <= start:\n        return\n",
        "tests/test_lowrank.py",
        "interpreter",
    ),
    Bug(
        "partial sums past z's used length are added up",
        "They were never written; in fresh memory they are often zero.",
        TILES,
        "acc += tl.load(planes_ptr + at, mask=at < used, other=0.0)",
        "acc += tl.load(planes_ptr + at, mask=at < size, other=0.0)",
        "tests/test_lowrank.py",
        "interpreter",
    ),
    Bug(
        "a grid sized for one piece",
        "ceil(N / block) tiles hold N rows, but not when each of E experts rounds up by itself.",
        TILES,
        "    return busy + (total - busy) // block\n",
        "    return -(-total // block)\n",
        "tests/test_grouped_gemm.py",
        "interpreter",
    ),
    Bug(
        "one tile too many for an expert",
        "n // BLOCK + 1 is the ceiling of n / BLOCK but for multiples, zero among them; then the "
        "last tiles are past the grid.",
        TILES,
        "    tiles = count // BLOCK + (count % BLOCK != 0).to(tl.int32)\n",
        "    tiles = count // BLOCK + 1\n",
        "tests/test_grouped_gemm.py",
        "interpreter",
    ),
    Bug(
        "unmasked loads allowed by the wrong width",
        "The sum runs over width_in; forward and backward swap the two.",
        "flexmore_kernels/_triton/grouped_gemm.py",
        'WHOLE_K=width_in % config["BLOCK_K"] == 0,',
        'WHOLE_K=width_out % config["BLOCK_K"] == 0,',
        "tests/test_grouped_gemm.py",
        "interpreter",
    ),
    Bug(
        "tail rows keep what was in memory",
        "Rows of no slot are nobody's rows, so nobody writes their zeros.",
        "flexmore_kernels/_triton/permutation.py",
        "        tl.store(tail_at, zeros, mask=inside & ~routed[:, None])\n",
        "",
        "tests/test_permutation.py",
        "interpreter",
    ),
    Bug(
        "row 0 taken for an empty slot",
        "Empty is -1; a slip makes it 0, which is the first row of the first expert.",
        MIX,
        "        if row >= 0:\n",
        "        if row > 0:\n",
        "tests/test_gated_mix.py",
        "interpreter",
    ),
    # Ranks, experts and maps swapped
    Bug(
        "up's factors advanced by gate's rank",
        "Copied from the line above; right for every layer of equal ranks.",
        MIX,
        "        b_up_ptr += rank_u.to(tl.int64) * stride_bu_r\n",
        "        b_up_ptr += rank_g.to(tl.int64) * stride_bu_r\n",
        "tests/test_gated_mix.py",
        "interpreter",
    ),
    Bug(
        "the path of equal ranks taken by unequal ones",
        "The condition of a fast path lost when another is added to it.",
        MIX,
        "TOGETHER=ranks_gate == ranks_up and tiles.",
        "TOGETHER=tiles.",
        "tests/test_gated_mix.py",
        "interpreter",
    ),
    Bug(
        "experts without a delta are skipped",
        "No rank, no work: but the public expert's share of the sum is lost.",
        MIX,
        "        if (present >> expert) & 1:\n",
        "        if ((present >> expert) & 1) & (rank_g + rank_u > 0):\n",
        "tests/test_gated_mix.py",
        "interpreter",
    ),
    Bug(
        "up reads gate's shrunk rows",
        "Both lie in one matrix, up's behind gate's; the offset of the second half is forgotten.",
        TOKEN_MAJOR,
        "tl.load(s_tile + (s_up + at_u), ",
        "tl.load(s_tile + at_u, ",
        "tests/test_experts.py::test_experts_float64",
        "interpreter",
    ),
    Bug(
        "maps read by place instead of token",
        "A tile's tokens come in the order of their expert sets, not 0, 1, 2.",
        TOKEN_MAJOR,
        "    chosen = expert_to_row_ptr + token[:, None] * E + e[None, :]\n",
        "    chosen = expert_to_row_ptr + place[:, None] * E + e[None, :]\n",
        "tests/test_experts.py::test_experts_float64",
        "interpreter",
    ),
    Bug(
        "weights' gradients in the order of rows",
        "Rows are sorted by expert, weights are by slot.",
        "flexmore_kernels/_triton/permutation.py",
        "    tl.store(dweights_ptr + slot, tl.sum(products, 1), mask=slot >= 0)\n",
        "    tl.store(dweights_ptr + row, tl.sum(products, 1), mask=slot >= 0)\n",
        "tests/test_permutation.py",
        "interpreter",
    ),
    Bug(
        "weights at unequal distances in one storage",
        "Experts' weights in one buffer are taken for a stack, whatever lies between them.",
        "flexmore_kernels/_triton/grouped_gemm.py",
        "            if not same or (count > 1 and distance != step):\n",
        "            if not same:\n",
        "tests/test_grouped_gemm.py",
        "interpreter",
    ),
    Bug(
        "offsets called aligned by the largest rank",
        "Offsets are sums of ranks: what divides them divides every rank, not the largest.",
        TILES,
        "    divisor = math.gcd(*(rank for ranks in rank_lists for rank in ranks)) or 16\n",
        "    divisor = max(rank for ranks in rank_lists for rank in ranks) or 16\n",
        "tests/test_lowrank.py",
        "interpreter",
    ),
    Bug(
        "wanted experts counted among those with factors",
        "The n-th pair of factors belongs to the n-th expert that has some, not to expert n.",
        ROUTED,
        "wanted = tuple(e for e, need in zip(experts, needs, strict=True) if need)",
        "wanted = tuple(e for e, need in enumerate(needs) if need)",
        "tests/test_experts.py::test_experts_needs_of_each_tensor",
        "interpreter",
    ),
    Bug(
        "a full-size expert's rows in the base's gradient",
        "The base's gradient sums over all rows but those of experts with a matrix of their own.",
        BACKWARD,
        "dbase = layer.unpermute(drows[index], layer.base_weights(side, None)) if wanted else None",
        "dbase = layer.unpermute(drows[index]) if wanted else None",
        "tests/test_experts.py::test_experts_float64",
        "interpreter",
    ),
    # Weights and sums
    Bug(
        "the routing weight applied twice",
        "h is stored unweighted because the down projection's shrink weights it later.",
        TOKEN_MAJOR,
        "        tl.store(out, h.to(rows_ptr.dtype.element_ty), mask=wanted)\n",
        "        tl.store(out, (weight[:, None] * h).to(rows_ptr.dtype.element_ty), mask=wanted)\n",
        "tests/test_experts.py::test_experts_float64",
        "interpreter",
    ),
    Bug(
        "an infinite expert spoils its tile",
        "Weight 0 times its h is 0, unless h is Inf or NaN.",
        TOKEN_MAJOR,
        "        mixed += tl.where(row_live, weight[:, None] * h, 0.0)\n",
        "        mixed += weight[:, None] * h\n",
        "tests/test_experts.py -k 'poison or infinite'",
        "interpreter",
    ),
    Bug(
        "hidden rows unwritten for ranks of one tile",
        "Every delta of down reads its expert's rows, however thin it is.",
        "flexmore_kernels/_triton/routed.py",
        "writes = tuple(int(rank > 0) for rank in low_down.ranks)",
        "writes = tuple(int(rank > 16) for rank in low_down.ranks)",
        "tests/test_token_major.py::test_hidden",
        "interpreter",
    ),
    Bug(
        "slots summed in another order",
        "The sum is as good, but its bits differ from every other kernel's and from the contract.",
        "flexmore_kernels/_triton/permutation.py",
        "        row = tl.load(slot_to_row_ptr + token * K + k, mask=token < T, other=-1)"
        ".to(tl.int64)\n        used",
        "        k = K - 1 - k\n"
        "        row = tl.load(slot_to_row_ptr + token * K + k, mask=token < T, other=-1)"
        ".to(tl.int64)\n        used",
        "tests/test_permutation.py",
        "interpreter",
    ),
    Bug(
        "SwiGLU's slope without the factor g",
        "d silu(g) = s + g s (1 - s); s (1 - s) alone is the sigmoid's.",
        MIX,
        "(dh * u * (s + silu * (1.0 - s)))",
        "(dh * u * (s + s * (1.0 - s)))",
        "tests/test_gated_mix.py",
        "interpreter",
    ),
    # Routing and the plan
    Bug(
        "an unstable counting sort",
        "Ranks counted from the other end: sorted, but rows of an expert run backwards.",
        "flexmore_kernels/_triton/counting_sort.py",
        "(equal & (j[None, :] < i[:, None]))",
        "(equal & (j[None, :] > i[:, None]))",
        "tests/test_routing_plan.py",
        "interpreter",
    ),
    Bug(
        "the mask's strides swapped",
        "A mask (E,) comes with strides (0, 1): only a mask for each token shows it.",
        "flexmore_kernels/_triton/routing.py",
        "        at = mask_ptr + token[:, None] * mask_t + e[None, :] * mask_e\n",
        "        at = mask_ptr + token[:, None] * mask_e + e[None, :] * mask_t\n",
        "tests/test_routing.py",
        "interpreter",
    ),
    # What the hardware does
    Bug(
        "a row number times a width in 32 bits",
        "Row numbers fit in 32 bits, where they point does not, beyond 2^31 numbers.",
        "flexmore_kernels/_triton/permutation.py",
        "        row = tl.load(slot_to_row_ptr + token * K + k, mask=token < T, other=-1)"
        ".to(tl.int64)\n        used",
        "        row = tl.load(slot_to_row_ptr + token * K + k, mask=token < T, other=-1)\n"
        "        used",
        "tests/test_large_sizes.py",
        "interpreter",
    ),
)
