"""Compile what a call launches for GPUs that are not here, and read what the compiler made of it.

A stand-in driver names the target; launches are replaced by compilations, so what is compiled is
what the launchers would launch: their configurations, specialised to their arguments. Every op and
the whole layer run this way, forward and backward, on tensors whose contents mean nothing.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from exercise import FAMILIES, Setup
from registers import TARGETS, Compiled, float_atomics, resources, tf32_products
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from flexmore_kernels import backend
from flexmore_kernels._triton import tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EQUAL = (0, *[64] * 6)
MIXED = (0, 16, 32, 8, 64, "full", (16, 0, "full"))
USUAL = tuple(name for name in FAMILIES if name != "attribution")  # whose ids have one dtype


class Call(NamedTuple):
    """Ops to compile, and for what. Each is here for tiles that no other makes launchers choose."""

    setup: Setup
    families: tuple[str, ...] = USUAL
    tf32: bool = False  # torch allows it
    wide: bool = False  # sizes are passed as 64-bit integers


CALLS = {
    "bf16, equal ranks": Call(Setup(EQUAL, 4096, BF16), tuple(FAMILIES)),
    "bf16, mixed": Call(Setup(MIXED, 1024, BF16)),
    "bf16, odd sizes": Call(Setup((0, 1, 3, 17, 64), 1024, BF16, hidden=509, intermediate=251)),
    "bf16, decode": Call(Setup(EQUAL, 1, BF16)),
    "bf16, large ranks": Call(Setup((0, 512, 300, 16), 4096, BF16), ("lowrank", "experts")),
    "bf16, large aligned ranks": Call(Setup((0, 512, 256, 16), 4096, BF16), ("lowrank",)),
    "bf16, 64-bit sizes": Call(Setup(EQUAL, 256, BF16), ("lowrank",), wide=True),
    "bf16, 40 experts": Call(Setup((0, *[16] * 39), 16384, BF16), ("routing", "attribution")),
    "bf16, 512 experts": Call(
        Setup((0, *[16] * 511), 1024, BF16, top_k=8),
        ("routing", "attribution", "permutation", "experts"),
    ),
    "fp16, equal ranks": Call(Setup(EQUAL, 16384, FP16), ("routing", "gated_mix", "experts")),
    "fp16, 17 experts": Call(Setup((0, *[16] * 16), 1024, FP16)),
    "fp32, equal ranks": Call(Setup(EQUAL, 4096, FP32), ("routing", "experts")),
    "fp32, mixed": Call(Setup(MIXED, 1024, FP32)),
    "fp32, TF32 allowed": Call(Setup(MIXED, 256, FP32), tf32=True),
}
WIDE = ("size", "plane_size")  # of all integers that kernels are given, these can pass 2^31


def entry_kernels() -> set[str]:
    """Names of the kernels in _triton/ that are launched: those that ask which program they are."""
    names = set()
    for path in Path(tiles.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"flexmore_kernels._triton.{path.stem}")
        for function in vars(module).values():
            own = isinstance(function, JITFunction) and function.__module__ == module.__name__
            if own and "program_id" in function.src:
                names.add(function.__name__)
    return names


def compile_all(jobs: list[tuple[int, str]]) -> list[Compiled]:
    """What (target, call) pairs compile to, by a process for each core. Nothing is kept for later.

    Jobs of one call and several targets should follow each other: none then waits for, or repeats,
    what another is compiling.
    """
    with tempfile.TemporaryDirectory() as cache:
        with concurrent.futures.ProcessPoolExecutor(
            os.cpu_count(), multiprocessing.get_context("spawn"), _start_worker, (cache,)
        ) as pool:
            return [one for found in pool.map(_compile, jobs) for one in found]


def tiles_asked(target: int) -> set[tuple]:
    """(kernel, bytes of an element, shape of the safe tile) of all that the calls' launches ask."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        return set().union(*pool.map(_asked, [(target, call) for call in CALLS]))


def _asked(job: tuple[int, str]) -> set[tuple]:
    """In a worker's process; nothing is launched or compiled."""
    target, name = job
    asked, choose = set(), tiles.tile

    def tile(kernel, x, safe, usual=True):
        asked.update([(kernel, x.element_size(), safe.shape)] if usual else [])
        return choose(kernel, x, safe, usual)

    _stand_in(target)
    tiles.tile, JITFunction.run = tile, lambda *args, **kwargs: None
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros
    torch.set_num_threads(1)
    for family in CALLS[name].families:
        FAMILIES[family](CALLS[name].setup)
    return asked


def _start_worker(cache: str) -> None:
    triton.knobs.cache.dir = cache
    torch.set_num_threads(1)
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros


def _compile(job: tuple[int, str]) -> list[Compiled]:
    """In a worker's process, which is patched for good."""
    target, name = job
    call = CALLS[name]
    found: dict[int, Compiled] = {}
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        if call.wide:
            args = [
                value + 2**32 if name in WIDE else value
                for name, value in zip(self.arg_names, args, strict=False)
            ]
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in found:
            found[id(kernel)] = _read(kernel, self.__name__, name, target)
        return kernel

    _stand_in(target)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = call.tf32
    JITFunction.run = run
    try:
        for family in call.families:
            FAMILIES[family](call.setup)
    finally:
        JITFunction.run = launch
    return list(found.values())


def _stand_in(target: int) -> None:
    """Lets Triton and the launchers believe that this GPU is here, and CPU tensors on it."""
    triton.runtime.driver._active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", target, 32),
        get_current_device=lambda: -target,
        get_current_stream=lambda device: 0,
    )
    backend.chosen = lambda stem, device: "triton"
    tiles.shared_memory = lambda device: TARGETS[target].block
    tiles.capability = lambda device: divmod(target, 10)


def _read(kernel, name: str, call: str, target: int) -> Compiled:
    registers, spilled = _registers(kernel.asm["cubin"])
    ptx, made = kernel.asm["ptx"], kernel.metadata
    return Compiled(
        name, call, target, 32 * made.num_warps, registers, spilled, made.shared,
        tf32_products(ptx), float_atomics(ptx),
    )  # fmt: skip


@functools.cache
def _registers(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ((_, _, registers, spilled, _),) = resources(Path(file.name))
    return registers, spilled
