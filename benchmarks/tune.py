"""Sweep tiles of the Triton kernels on this GPU and write flexmore_kernels/tuned/sm_*.json.

python -m benchmarks.tune                       # all cases, about a minute on 16 cores
python -m benchmarks.tune --kernel expand shrink
python -m benchmarks.tune --out /tmp/sm_90.json

Candidates are compiled and run by a process for each core, which also holds each one's result to
the safe tile's; those that pass are timed side by side (flexmore_kernels.timing: cold, interleaved,
medians). A case not swept keeps the entry that it has. Run the tests on the GPU before committing
the file: they then run with these tiles. benchmarks/README.md has the fields.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import records
from flexmore_kernels import ops, tuning
from flexmore_kernels._triton import grouped_gemm, lowrank, tiles, token_major
from flexmore_kernels.ragged import packed_size
from flexmore_kernels.timing import compare
from flexmore_kernels.tuning import Tile

DEVICE, DTYPE = "cuda", torch.bfloat16
SHARED_BYTES = 227 * 1024
GAIN = 0.98
"""A tile replaces the safe one where it takes at most this part of its time."""


class Case(NamedTuple):
    """A class of shapes, by one of it."""

    kernel: str
    ranks: tuple[int, ...]
    top_k: int
    tokens: int
    hidden: int
    width: int

    @property
    def text(self) -> str:
        ranks = [f"{len(list(same))} x {rank}" for rank, same in itertools.groupby(self.ranks)]
        return (
            f"T={self.tokens}, D={self.hidden}, F={self.width}, top-{self.top_k} of "
            f"{len(self.ranks)}, ranks {', '.join(ranks)}"
        )


SMALL, USUAL, LARGE = (0, *[16] * 6), (0, *[64] * 6), (0, 64, 64, 256, 512, 2048, 16)
WIDE = (4096, 11008)
CASES = (
    Case("expand", (0, *[16] * 511), 8, 16384, 2048, 5504),
    Case("expand", LARGE, 5, 8192, *WIDE),
    Case("shrink", (0, *[16] * 511), 8, 16384, 2048, 5504),
    Case("shrink", USUAL, 5, 16384, *WIDE),
    Case("shrink", LARGE, 5, 8192, *WIDE),
    Case("grouped_gemm", (0,) * 7, 5, 4096, *WIDE),
    Case("grouped_gemm_dweight", (0,) * 7, 5, 4096, *WIDE),
    Case("token_mix", SMALL, 5, 16384, *WIDE),
    Case("token_mix", USUAL, 5, 16384, *WIDE),
    Case("add_expanded", USUAL, 5, 16384, *WIDE),
)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).div_(shape[-1] ** 0.5).to(DTYPE)


def problem(case: Case) -> Callable[[], Tensor | list[Tensor]]:
    """The call that launches the case's kernel."""
    torch.manual_seed(0)
    E, T, K, (D, F) = len(case.ranks), case.tokens, case.top_k, (case.hidden, case.width)
    R, size = sum(case.ranks), packed_size(case.ranks, T, K)
    routing = ops.topk_route(torch.randn(T, E, device=DEVICE), top_k=K)
    plan = ops.make_plan(routing.indices, E)
    if case.kernel == "expand":
        z, b, base = normal(1, size).view(-1), normal(F, R), normal(T, F)
        args = (z, b, plan.row_offsets, case.ranks, plan.num_rows, base, plan.row_to_slot, K, True)
        return functools.partial(lowrank.expand, *args)
    if case.kernel == "shrink":
        x, a = normal(T * K, F), normal(R, F)
        args = (x, a, plan.row_offsets, case.ranks, plan.row_to_slot, K, size)
        return functools.partial(lowrank.shrink, *args)
    if case.kernel == "grouped_gemm":
        x, out = normal(T * K, D), torch.zeros(T * K, F, device=DEVICE, dtype=DTYPE)
        weights = [normal(F, D) for _ in case.ranks]

        def run() -> Tensor:
            grouped_gemm.grouped_gemm(x, weights, plan.row_offsets, False, out)
            return out

        return run
    if case.kernel == "grouped_gemm_dweight":
        args = normal(T * K, F), normal(T * K, D), plan.row_offsets, [1, 2]
        return functools.partial(grouped_gemm.grouped_gemm_dweight, *args)
    if case.kernel == "add_expanded":
        args = normal(T, D).float(), normal(T, R), normal(D, R)
        return functools.partial(token_major.add_expanded, *args)
    factors = normal(F, R), case.ranks, normal(F, R), case.ranks
    writes = tuple(int(rank > 0) for rank in case.ranks)
    rows = torch.empty(plan.num_rows, F, device=DEVICE, dtype=DTYPE)
    args = (normal(T, F), normal(T, F), routing.weights, plan, normal(T, 2 * R), *factors)
    return functools.partial(token_major.mix, *args, writes, rows)


def candidates(kernel: str, safe: Tile) -> Iterator[Tile]:
    """Tiles worth a try: accumulators that fit in registers, stages that fit in shared memory."""
    rows, columns, depths, warps, stages = {
        "expand": ((64, 128), (64, 128, 256), (safe.depth,), (4, 8), (2, 3)),
        "shrink": ((64, 128), (safe.columns,), (64, 128), (4, 8), (3, 4)),
        "grouped_gemm": ((64, 128), (128, 256), (64,), (8,), (3, 4)),
        "grouped_gemm_dweight": ((64, 128), (128, 256), (64,), (8,), (3, 4)),
        "token_mix": ((64,), (64, 128), (safe.depth,), (4, 8), (1, 2, 3)),
        "add_expanded": ((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3)),
    }[kernel]
    if kernel == "expand" and safe.depth == 16:  # one step: nothing to pipeline
        stages = (1, 2)
    sides = 4 if kernel == "token_mix" else 2  # token_mix keeps G and U beside the sum
    for r, c, d, w, s in itertools.product(rows, columns, depths, warps, stages):
        numbers, room = r * c / (32 * w) * sides / 2, (r + c) * d * s * DTYPE.itemsize * sides / 2
        enough = r * c >= min(safe.rows * safe.columns, 8192)
        if enough and 16 <= numbers <= 128 and room <= SHARED_BYTES:
            yield Tile(r, c, d, w, s, safe.group)


@contextlib.contextmanager
def using(kernel: str, tile: Tile | None) -> Iterator[list[Tile]]:
    """Within, the kernel runs with this tile, None for the safe one; yields the safe ones asked."""
    asked, before = [], tiles.tile

    def choose(name: str, x: Tensor, safe: Tile, usual: bool = True) -> Tile:
        asked.extend([safe] if name == kernel else [])
        return tile if tile is not None and name == kernel else safe

    tiles.tile = choose
    try:
        yield asked
    finally:
        tiles.tile = before


@functools.lru_cache(maxsize=1)
def _with_safe(case: Case) -> tuple[Callable, list[Tensor], Tile]:
    torch.cuda.empty_cache()  # of the case before
    call = problem(case)
    with using(case.kernel, None) as asked:
        right = call()
    right = [right] if isinstance(right, Tensor) else list(right)
    return call, [part.clone() for part in right], asked[0]


def _parts(tensors: list[Tensor]) -> list[Tensor]:
    return [part for tensor in tensors for part in tensor.flatten().split(2**24)]


@torch.no_grad()
def check(case: Case, tile: Tile) -> str:
    """ "" if the tile compiles and computes what the safe one does, else why not."""
    call, right, _ = _with_safe(case)
    try:
        with using(case.kernel, tile):
            found = call()
        found = [found] if isinstance(found, Tensor) else found
        for out, safe in zip(_parts(found), _parts(right), strict=True):
            # Both round sums of the same numbers once, in another order.
            most = float((out.float() - safe.float()).abs().max())
            if not most <= torch.finfo(out.dtype).eps * float(safe.float().abs().max()):
                return f"differs by {most:.3g}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


@torch.no_grad()
def times(case: Case, some: list[Tile]) -> dict[Tile, float]:
    """Medians in microseconds, of the safe tile too."""
    call, _, safe = _with_safe(case)

    def run(tile: Tile) -> None:
        with using(case.kernel, tile):
            call()

    calls = {str(tile): functools.partial(run, tile) for tile in dict.fromkeys([safe, *some])}
    found = compare(calls, DEVICE, rounds=15, budget_s=2.0)
    return {tile: found[str(tile)].ms * 1e3 for tile in dict.fromkeys([safe, *some])}


def sweep(cases: list[Case], seconds: float) -> Iterator[dict]:
    """An entry for each case; what is not compiled after so many seconds is not timed."""
    end = time.monotonic() + seconds
    tried = {}
    for case in cases:
        safe = _with_safe(case)[2]
        tried[case] = [tile for tile in candidates(case.kernel, safe) if tile != safe]
    # Case by case within a process, which keeps one problem; the cases side by side.
    jobs = [(case, tile) for case, some in tried.items() for tile in some]
    print(f"{len(jobs)} candidates of {len(cases)} cases", flush=True)
    passed: dict[Case, list[Tile]] = {case: [] for case in cases}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(10, os.cpu_count() or 1), spawn) as pool:
        running = {pool.submit(check, *job): job for job in jobs}
        try:
            left = max(1.0, end - time.monotonic())
            for done in concurrent.futures.as_completed(running, timeout=left):
                case, tile = running[done]
                if not done.result():
                    passed[case].append(tile)
                elif not done.result().startswith("OutOfResources"):
                    print(f"{case.kernel} {tuple(tile)}: {done.result()}", flush=True)
        except TimeoutError:
            print(f"out of time: {sum(not f.done() for f in running)} not tried", flush=True)
        pool.shutdown(cancel_futures=True)
    for case in cases:
        yield _entry(case, _with_safe(case)[2], times(case, passed[case]))


def _entry(case: Case, safe: Tile, found: dict[Tile, float]) -> dict:
    best = min(found, key=found.__getitem__)
    if found[best] > GAIN * found[safe]:
        best = safe
    for tile, us in sorted(found.items(), key=lambda item: item[1])[:4]:
        print(f"{case.kernel} {tuple(tile)}: {us:.1f} us (safe {found[safe]:.1f})", flush=True)
    return {
        "kernel": case.kernel, "bytes": DTYPE.itemsize, "safe": safe.shape,
        "tile": best._asdict(), "case": case.text, "us": records.short(found[best]),
        "safe_us": records.short(found[safe]), "timed": len(found),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", nargs="+", default=sorted({case.kernel for case in CASES}))
    parser.add_argument("--seconds", type=float, default=120, help="for compiling; default 120")
    parser.add_argument("--commit", help="where the sources came without their history")
    parser.add_argument("--out", type=Path, help="default: the file of this architecture")
    given = parser.parse_args()
    capability = torch.cuda.get_device_capability()
    before = tuning.read(capability)["entries"]
    where = records.environment(DEVICE, given.commit)
    entries = list(sweep([case for case in CASES if case.kernel in given.kernel], given.seconds))
    for entry in entries:
        entry |= {name: where[name] for name in ("device", "commit", "time", "torch", "triton")}
    kept = {(e["kernel"], e["bytes"], tuple(e["safe"])): e for e in [*before, *entries]}
    write(given.out, capability, entries=[kept[key] for key in sorted(kept)])
    return 0


def write(out: Path | None, capability: tuple[int, int], **parts: Any) -> None:
    """The architecture's file with these parts anew, by a rename; an entry a line."""
    path = out or tuning.path(capability)
    data = tuning.read(capability) | {"schema": tuning.SCHEMA} | parts
    lines = ",\n  ".join(json.dumps(entry) for entry in data.pop("entries"))
    heads = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in data.items())
    fresh = path.with_suffix(".new")
    fresh.write_text(f'{{\n{heads} "entries": [\n  {lines}\n ]\n}}\n')
    fresh.replace(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
