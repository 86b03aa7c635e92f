"""What the files of a checkpoint directory say they hold: config.json, the index, the headers.

Every file must be as long as its header says. Of the tensors' numbers only trailing rank rows are
ever looked at here, to find those that are zero.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def file_names(count: int) -> list[str]:
    """The names of a checkpoint's `count` safetensors files."""
    numbered = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return [SINGLE_FILE] if count == 1 else numbered


class Stored(NamedTuple):
    """Where a tensor lies: the file's name, the tensor's name in it, its dtype as safetensors names
    it, its shape, and the byte of the file at which its numbers begin.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOAT_BYTES[self.dtype]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError names the file when there is none."""
    if not path.is_file():
        raise ValueError(f"{path.name}: missing in {path.parent}")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: got a {type(found).__name__}; accepted: an object")
    return found


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory's safetensors files by name.

    Raises ValueError naming the file or tensor when one is missing, in two places, truncated or not
    floating point.
    """
    if (directory / SINGLE_FILE).exists() or not (directory / INDEX_FILE).exists():
        return read_header(directory / SINGLE_FILE)
    files = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{INDEX_FILE}: no weight_map")
    names = sorted(set(map(str, files.values())))
    for file in names:
        if Path(file).name != file:
            raise ValueError(f"{INDEX_FILE}: {file!r}; accepted: names of files beside it")
    absent = [file for file in names if not (directory / file).is_file()]
    if absent:
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise ValueError(f"{shown}: missing in {directory}: {len(absent)} of {len(names)} files")
    found: dict[str, Stored] = {}
    for file in names:
        for name, stored in read_header(directory / file).items():
            if files.get(name) != file:
                raise ValueError(f"{name}: in {file}, but not there in {INDEX_FILE}")
            found[name] = stored
    for name, file in files.items():
        if name not in found:
            raise ValueError(f"{name}: missing in {file}")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, which must be as long as its header says."""
    if not path.is_file():
        raise ValueError(f"{path.name}: missing in {path.parent}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if 8 + length > size:
            raise ValueError(f"{path.name}: truncated in its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [(*t["data_offsets"], n, t["dtype"], t["shape"]) for n, t in header.items()]
            entries.sort()
            if not all(type(k) is int for entry in entries for k in (*entry[:2], *entry[4])):
                raise TypeError("a size that is no integer")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name}: not a safetensors file ({error!r})") from error
    found, position = {}, 0
    for begin, end, name, dtype, shape in entries:
        if dtype not in FLOAT_BYTES:
            accepted = ", ".join(FLOAT_BYTES)
            raise ValueError(f"{name}: dtype {dtype} in {path.name}; accepted: {accepted}")
        if end - begin != math.prod(shape) * FLOAT_BYTES[dtype]:
            raise ValueError(f"{name}: {end - begin} bytes in {path.name} for shape {shape}")
        if begin != position:
            raise ValueError(f"{name}: at byte {begin} of {path.name}; accepted: {position}")
        if 8 + length + end > size:
            raise ValueError(f"{name}: truncated in {path.name}")
        position = end
        found[name] = Stored(path.name, name, dtype, tuple(shape), 8 + length + begin)
    if 8 + length + position != size:
        raise ValueError(f"{path.name}: {size - 8 - length - position} bytes after its tensors")
    return found


class ZeroTails:
    """Finds how many trailing rank rows of a factor pair hold nothing but zeros.

    A pair whose last row of A has a number in it, as most do, costs one look at that row.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, np.ndarray] = {}

    def count(self, a: Stored, b: Stored) -> int:
        """Trailing rows of A (r, in) that are zero, with their columns of B (out, r) zero too.

        Both sides: where only one is zero the row still learns (LoRA starts with B = 0).
        """
        rank, a_bits = a.shape[0], self._bits(a)
        if rank == 0 or _nonzero(a_bits[-1]).any():
            return 0
        live = _nonzero(a_bits).any(axis=1)
        dead = rank if not live.any() else rank - 1 - int(live.nonzero()[0][-1])
        used = _nonzero(self._bits(b)[:, rank - dead :]).any(axis=0)
        return dead if not used.any() else dead - 1 - int(used.nonzero()[0][-1])

    def _bits(self, stored: Stored) -> np.ndarray:
        """A tensor's numbers as unsigned integers of their width."""
        if stored.file not in self._files:
            path = self._directory / stored.file
            self._files[stored.file] = np.memmap(path, dtype=np.uint8, mode="r")
        numbers = self._files[stored.file][stored.begin : stored.begin + stored.nbytes]
        return numbers.view(f"<u{FLOAT_BYTES[stored.dtype]}").reshape(stored.shape)


def _nonzero(bits: np.ndarray) -> np.ndarray:
    """Which floats are not zero; the sign is shifted out, since -0.0 is zero too."""
    return np.left_shift(bits, bits.dtype.type(1)) != 0
