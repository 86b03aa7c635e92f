"""How CUDA kernels are launched, for any size and without a GPU: csrc/launch.h, by `_host`."""

from __future__ import annotations

import itertools
import random

import pytest

from flexmore_kernels import native

host = native.host()
pytestmark = pytest.mark.skipif(host is None, reason="_host was not built for this Python")

LARGEST = 2**31 - 1  # slots: rows are numbered in 32 bits
SHARED_BYTES = 48 * 1024  # of a block, on every GPU, without asking for more
MAX_KEYS, MAX_SET_EXPERTS = 1024, 8
MAX_COUNTS = 32768  # all blocks read all of them, from the L2 cache
BLOCKS = (1, 20, 108, 132, 1000)  # that run at a time: a small GPU, two large ones, none yet
KEYS = [(e, False) for e in (1, 2, 7, 8, 9, 64, 255, 256, 257, 511, 512, 1000, MAX_KEYS)]
KEYS += [(e, True) for e in range(1, MAX_SET_EXPERTS + 1)]


def some_tokens(top_k: int) -> list[int]:
    """The edges of one block and of a chunk, the largest, and numbers of every magnitude."""
    most = LARGEST // top_k
    draw = random.Random(top_k)
    edges = [size // top_k + by for size in (512, 4096, 128 * 512) for by in (-1, 0, 1)]
    drawn = [int(2 ** draw.uniform(0, 31)) // top_k for _ in range(200)]
    return sorted({n for n in (0, 1, *edges, most - 1, most, *drawn) if 0 <= n <= most})


@pytest.mark.parametrize("top_k", (1, 2, 5, 8, 100, 511, 512, 513, 1024, 5000))
def test_plan_blocks_cover_all_tokens_and_fit(top_k):
    for num_experts, by_set in KEYS:
        sets = 2**num_experts if by_set else 0
        keys = max(num_experts, sets)
        padded, quads = keys + -keys % 4, (keys + 3) // 4
        for tokens, blocks in itertools.product(some_tokens(top_k), BLOCKS):
            given = (tokens, top_k, num_experts, by_set, blocks)
            launch = host.plan_launch(*given)
            chunk, chunks = launch["chunk_tokens"], launch["num_chunks"]
            # Each token is in one chunk, no chunk is empty, and all run at a time.
            assert 1 <= chunks <= min(128, blocks), given
            assert (chunks - 1) * chunk < max(tokens, 1) and tokens <= chunks * chunk, given
            assert launch["one_block"] == (tokens * top_k <= 4096 or blocks == 1), given
            assert not launch["one_block"] or chunks == 1, given
            threads = 32 * launch["warps"]
            assert 32 <= threads <= 1024, given
            # counts[warp][key] of experts and of sets, starts[key + 1], and what a block sums of
            # other chunks: of each key two sums, by each of the threads that share four keys.
            sums = 0 if launch["one_block"] else 2 * max(1, threads // quads) * padded
            words = launch["warps"] * (num_experts + sets) + keys + 1 + sums
            assert launch["shared_bytes"] == 4 * words <= SHARED_BYTES, given
            counted = sum(n + -n % 4 for n in (num_experts, sets))
            counts = 0 if launch["one_block"] else chunks * counted
            assert launch["counts"] == counts <= MAX_COUNTS, given


def test_plan_uses_many_blocks_where_there_is_work():
    """At the largest size measured; a block with less than 512 slots is not worth its launch."""
    assert host.plan_launch(16384, 5, 7, True, 132)["num_chunks"] == 128
    assert host.plan_launch(1000, 5, 7, True, 132)["num_chunks"] == 10


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ((1, 0, 4, False, 1), "top_k"),
        ((-1, 2, 4, False, 1), "tokens"),
        ((LARGEST, 2, 4, False, 1), "tokens"),
        ((1, 2, 0, False, 1), "num_experts"),
        ((1, 2, MAX_KEYS + 1, False, 1), "num_experts"),
        ((1, 2, MAX_SET_EXPERTS + 1, True, 1), "num_experts"),
        ((1, 2, 4, False, 0), "max_blocks"),
    ],
)
def test_sizes_that_make_plan_refuses(given, name):
    with pytest.raises(ValueError, match=f"{name}: got .*; accepted: "):
        host.plan_launch(*given)


# Shared memory and L2 of compute capability 9.0, 8.0 and 8.9; bytes of a tile, of an expert's
# factors in two slabs and of G and U that run ahead, at rank 16 and 64.
GPUS = ((132, 232192, 52428800), (108, 166656, 41943040), (24, 101120, 25165824))
TILES = ((8, 2128, 12320, 65536), (4, 8272, 49184, 32768), (8, 592, 4128, 0))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tile", TILES)
def test_sweeps_cover_all_tiles_and_fit(gpu, tile):
    (blocks, shared, l2), (formers, *sizes) = gpu, tile
    for tokens, top_k, experts, width in itertools.product(
        (1, 7, 64, 500, 4096, 16384, 70000), (1, 8), (9, 64, 512, 1024), (8, 520, 5504)
    ):
        given = [tokens, top_k, experts, width, blocks, formers, shared, l2, *sizes]
        launch = host.sweep_launch(given)
        groups, passes = launch["groups"], launch["passes"]
        assert 1 <= groups <= min(blocks, -(-width // 64)), given
        assert launch["steps"] * groups * 64 >= width and 1 <= launch["slots"] <= 3, given
        assert launch["shared_bytes"] <= shared, given
        rows = -(-tokens // passes) * top_k
        busy = min(rows, experts)
        warps = blocks // groups * formers
        assert launch["tiles_per_warp"] * warps >= busy + (rows - busy) // 16, given
        assert launch["slots"] == launch["steps"] or launch["slots"] == 3, given


@pytest.mark.parametrize("per_thread", (1, 2))
def test_row_blocks_cover_the_row_and_fit(per_thread):
    for words in (*range(1, 2100), 4096, 5504, 11008, 2**20 + 1, 2**31, 2**40):
        launch = host.row_launch(words, per_thread)
        threads, columns = launch["threads"], launch["columns"]
        assert threads % 32 == 0 and 32 <= threads <= 256, words
        assert (columns - 1) * threads * per_thread < words <= columns * threads * per_thread, words
        assert threads == 256 or columns == 1, words
        assert threads == 32 or (threads - 32) * per_thread < words, "a warp has nothing to do"


@pytest.mark.parametrize("given", [(0, 1), (1, 0), (-1, 1)])
def test_rows_of_nothing_are_refused(given):
    with pytest.raises(ValueError, match="(words|per_thread): got"):
        host.row_launch(*given)


def test_the_build_facts_agree():
    facts = native.facts()
    assert host.build_info() == {name: facts[name] for name in host.build_info()}
    assert set(host.build_info()) > {"compiler", "nvcc", "commit"}
