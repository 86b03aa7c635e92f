"""The table of registers and its budget: what breaks it, and that it survives being written."""

from __future__ import annotations

import pytest
import registers
from registers import Compiled, Usage

BASE = Compiled("kernel", "call", 90, threads=256, registers=128, spilled=0, shared=64 * 1024)


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 2),
        ({"registers": 129}, 1),
        ({"registers": 255}, 1),
        ({"registers": 64, "shared": 0}, 4),
        ({"registers": 16, "shared": 0}, 8),  # 64 warps
        ({"threads": 32, "registers": 16, "shared": 0}, 32),
        ({"threads": 1024, "registers": 65}, 0),
        ({"threads": 1024, "registers": 64}, 1),
        ({"shared": 227 * 1024}, 1),
        ({"shared": 227 * 1024 + 1}, 0),
        ({"target": 86, "registers": 32, "shared": 49 * 1024}, 2),
        ({"target": 86, "registers": 32, "shared": 50 * 1024}, 1),
        ({"target": 120, "shared": 99 * 1024}, 1),
    ],
    ids=str,
)
def test_resident_blocks(change, blocks):
    assert BASE._replace(**change).blocks == blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 120}, None),
        ({"registers": 100, "shared": 1024}, None),
        ({"spilled": 4}, "128 / 4 / 64 / 2; the table allows 128 / 0 / 64 / 2"),
        ({"registers": 136}, "136 / 0 / 64 / 1; the table allows"),
        ({"shared": 120 * 1024}, "128 / 0 / 120 / 1; the table allows"),
        ({"kernel": "other"}, "not in the table"),
        ({"call": "other"}, "no longer compiled"),
    ],
    ids=str,
)
def test_the_budget(change, message):
    recorded = registers.table([BASE])
    broken = registers.violations(registers.table([BASE._replace(**change)]), recorded)
    assert bool(broken) == (message is not None)
    assert message is None or any(message in line for line in broken)


def test_targets_that_were_not_compiled_are_not_missed():
    recorded = registers.table([BASE, BASE._replace(target=80)])
    assert registers.violations(registers.table([BASE]), recorded) == []


def test_a_cell_is_the_worst_configuration():
    found = [BASE, BASE._replace(registers=64, spilled=16, shared=1025)]
    assert registers.table(found) == {("kernel", "call"): {90: Usage(128, 16, 64, 2)}}


def test_the_table_survives_being_written(tmp_path):
    rows = registers.table([BASE, BASE._replace(kernel="k<float, 8>", target=80, spilled=8)])
    registers.write(rows, "Triton 3.6, nvcc 13.0", tmp_path / "table.md")
    assert registers.read(tmp_path / "table.md") == (rows, "Triton 3.6, nvcc 13.0")


@pytest.mark.parametrize(
    ("ptx", "atomics", "tf32"),
    [
        ("atom.global.add.f32 %f1, [%rd1], %f2;", 1, False),
        ("@%p1 red.relaxed.gpu.global.add.noftz.bf16x2 [%rd1], %r2;", 1, False),
        ("red.global.v4.f32.add [%rd1], {%f1};", 1, False),
        ("atom.shared.add.f64 %fd1, [%r1], %fd2;", 1, False),
        ("atom.global.acq_rel.gpu.cas.b16 %rs1, [%rd1], %rs2, %rs3;", 1, False),
        ("atom.global.add.u32 %r1, [%rd1], 1; red.global.max.s64 [%rd1], %rd2;", 0, False),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1};", 0, True),
        ("wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%f1};", 0, True),
        ("tcgen05.mma.cta_group::1.kind::tf32 [%r1];", 0, True),
        ("fma.rn.f32 %f1, %f2, %f3, %f4; mma.sync.aligned.m16n8k16.row.col.f32.bf16;", 0, False),
    ],
)
def test_what_is_searched_for_is_found(ptx, atomics, tf32):
    assert len(registers.float_atomics(ptx)) == atomics
    assert registers.tf32_products(ptx) == tf32
