"""Tiles of the Triton kernels that a sweep on a GPU chose: data, in tuned/sm_<capability>.json.

The launchers know a tile for every shape that runs wherever its shared memory fits: the safe one.
Where the file of the device's architecture has an entry for a kernel, a width of elements and that
safe tile (which stands for the class of shapes it was made for), the entry's tile runs instead.
Nothing is ever tuned at import or in a call. `python -m benchmarks.tune` writes the files, with the
device, commit and times that made the choice; an entry's `us` and `safe_us` are of its `case`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
FOLDER = Path(__file__).with_name("tuned")


class Tile(NamedTuple):
    """What a launch chooses: sizes of a program's tile, warps, pipeline stages.

    rows, columns: of the result; depth: of the axis summed over at a time. group: row tiles that
    share their column tiles in L2, 0 where the kernel's order has no such choice.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.columns, self.depth


def path(capability: tuple[int, int]) -> Path:
    """The file of an architecture, there or not."""
    return FOLDER / "sm_{}{}.json".format(*capability)


def read(capability: tuple[int, int]) -> dict[str, Any]:
    """What the architecture's file says; no entries where there is none."""
    try:
        return json.loads(path(capability).read_text())
    except FileNotFoundError:
        return {"schema": SCHEMA, "entries": []}


@functools.cache
def tiles(capability: tuple[int, int]) -> dict[tuple, Tile]:
    """{(kernel, bytes of an element, shape of the safe tile): the tile that the sweep chose}."""
    return {
        (entry["kernel"], entry["bytes"], tuple(entry["safe"])): Tile(**entry["tile"])
        for entry in read(capability)["entries"]
    }


def merge_above(capability: tuple[int, int]) -> float:
    """The rank from which a merged expert is faster, as a part of D F / (D + F); 1: by operations.

    Factors reach less of the tensor cores than the products of whole matrices do.
    """
    return read(capability).get("merge_above", {}).get("share", 1.0)


def find(kernel: str, capability: tuple[int, int], width: int, safe: Tile) -> Tile:
    """The tile to run: the architecture's own for this class of shapes, else the safe one."""
    return tiles(capability).get((kernel, width, safe.shape), safe)
