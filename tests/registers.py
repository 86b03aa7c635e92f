"""What compiled kernels ask of a GPU, the table of it in docs/registers.md, and its budget.

The table is written by tests/record_registers.py and held to by test_triton_compile.py and
test_cuda_compile.py: more spilled bytes or fewer resident blocks than recorded, a kernel without a
row and a row without a kernel are failures. More registers alone are not, while as many blocks fit.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent.parent / "docs/registers.md"
CUDA = "CUDA C++"  # the call of a kernel of csrc/cuda
KIB = 1024


class Target(NamedTuple):
    """Of one multiprocessor, by the CUDA C++ programming guide, technical specifications."""

    block: int  # bytes of shared memory that a block may use
    shared: int  # bytes that all blocks share; 1 KiB goes with every block
    warps: int
    blocks: int


TARGETS = {
    80: Target(163 * KIB, 164 * KIB, 64, 32),
    86: Target(99 * KIB, 100 * KIB, 48, 16),
    89: Target(99 * KIB, 100 * KIB, 48, 24),
    90: Target(227 * KIB, 228 * KIB, 64, 32),
    100: Target(227 * KIB, 228 * KIB, 64, 32),
    120: Target(99 * KIB, 100 * KIB, 48, 24),
}


class Compiled(NamedTuple):
    """One kernel as compiled for one target."""

    kernel: str
    call: str
    target: int
    threads: int  # a block
    registers: int  # a thread
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes a block
    tf32: bool = False  # has matrix products in TF32
    atomics: tuple[str, ...] = ()  # on floats

    @property
    def blocks(self) -> int:
        """Blocks that fit on a multiprocessor at a time; 0: it cannot be launched."""
        target, warps = TARGETS[self.target], self.threads // 32
        if self.shared > target.block:
            return 0
        # A quarter of the 64 Ki registers serves a quarter of the warps, by 256 a warp.
        by_registers = 4 * (16 * KIB // (-(-self.registers * 32 // 256) * 256)) // warps
        by_shared = target.shared // (self.shared + KIB)
        return min(by_registers, by_shared, target.warps // warps, target.blocks)


class Usage(NamedTuple):
    """A cell of the table: the worst of all configurations that a call compiles of a kernel."""

    registers: int
    spilled: int
    shared: int  # KiB, rounded up
    blocks: int

    def __str__(self) -> str:
        return " / ".join(map(str, self))


Row = tuple[str, str]  # kernel, call
Table = dict[Row, dict[int, Usage]]


def table(found: Iterable[Compiled]) -> Table:
    """The worst of each kernel, call and target."""
    rows: Table = {}
    for one in found:
        cell = Usage(one.registers, one.spilled, -(-one.shared // KIB), one.blocks)
        row = rows.setdefault((one.kernel, one.call), {})
        worst = row.get(one.target, cell)
        row[one.target] = Usage(*map(max, cell[:3], worst[:3]), min(cell.blocks, worst.blocks))
    return rows


def violations(found: Table, recorded: Table) -> list[str]:
    """How `found` breaks the budget that `recorded` is, for the targets that were compiled."""
    compiled = {target for row in found.values() for target in row}
    out = []
    for row in sorted(found.keys() | recorded.keys()):
        name = f"{row[0]} ({row[1]})"
        old, new = recorded.get(row, {}), found.get(row, {})
        if old.keys() & compiled - new.keys():
            out.append(f"{name}: in the table, but no longer compiled")
        for target in sorted(new.keys() & old.keys()):
            is_, was = new[target], old[target]
            if is_.spilled > was.spilled or is_.blocks < was.blocks:
                out.append(f"{name}, sm_{target}: {is_}; the table allows {was}")
        if new.keys() - old.keys():
            out.append(f"{name}: not in the table")
    return out


HEADER = """# What every kernel asks of a GPU

Written by `make registers`, not by hand. Compiled by {versions}.

A cell is the worst of all configurations that the call compiles of the kernel:
**registers a thread / bytes spilled a thread / KiB of shared memory a block / blocks that fit on a
multiprocessor at a time**. CI fails when a change spills more bytes, lets fewer blocks fit, or adds
or drops a row. `tests/compiling.py` has the calls; "{cuda}" are the kernels of `csrc/cuda`, without
the shared memory that `make_plan` asks for at launch.
"""


def write(rows: Table, versions: str, path: Path = TABLE) -> None:
    heads = ["kernel", "call", *(f"sm_{target}" for target in TARGETS)]
    lines = [HEADER.format(versions=versions, cuda=CUDA), _line(heads), _line(["---"] * len(heads))]
    for (kernel, call), cells in sorted(rows.items()):
        lines.append(_line([f"`{kernel}`", call, *(str(cells.get(t, "")) for t in TARGETS)]))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read(path: Path = TABLE) -> tuple[Table, str]:
    """(the recorded table, the versions of the compilers that it holds for)."""
    if not path.exists():
        return {}, ""
    rows: Table = {}
    text = path.read_text()
    for line in text.splitlines():
        if line.startswith("| `"):
            kernel, call, *cells = [cell.strip() for cell in line[1:-1].split("|")]
            numbers = [re.findall(r"\d+", cell) for cell in cells]
            rows[kernel.strip("`"), call] = {
                target: Usage(*map(int, found))
                for target, found in zip(TARGETS, numbers, strict=True)
                if found
            }
    return rows, re.search(r"^.*Compiled by (.*)\.$", text, re.MULTILINE)[1]


def resources(binary: Path) -> list[tuple[int, str, int, int, int]]:
    """(architecture, symbol, registers, bytes of local memory, static shared bytes) of a binary."""
    pattern = r"arch = sm_(\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found, arch = [], 0
    for match in re.finditer(pattern, cuobjdump("--dump-resource-usage", binary)):
        if match[1]:
            arch = int(match[1])
        else:
            registers, stack, shared, local = map(int, match.groups()[2:])
            found.append((arch, match[2], registers, stack + local, shared))
    return found


def cuobjdump(option: str, binary: Path) -> str:
    """Output of the reader of GPU binaries that Triton's wheel brings."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(program), option, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def float_atomics(ptx: str) -> tuple[str, ...]:
    """Instructions that change memory by the order in which threads come.

    Those that add floats, and compare-and-swap, by which a type without such an instruction does.
    """
    pattern = r"\b(?:red|atom)\.\S*\.(?:b?f(?:16|32|64)|cas\.|exch\.)\S*"
    return tuple(sorted(set(re.findall(pattern, ptx))))


def tf32_products(ptx: str) -> bool:
    return re.search(r"mma\S*tf32", ptx) is not None
