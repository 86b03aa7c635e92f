"""The study's folder: finished pieces, each written whole or not at all, so that the same command
goes on where it was stopped.

    OUT/settings.json             what the results depend on
    OUT/seed-0/base.safetensors   weights, which go when a seed is done and nothing needs them
    OUT/seed-0/base.json          {"seconds": what it took, "value": what was found}
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from flexmore_kernels.checkpoint_writer import write_json, write_tensors
from flexmore_kernels.progress import Progress

Say = Callable[[str], None]


class Piece(NamedTuple):
    """What is computed and kept under a name. cost: how much work it is, in any unit."""

    name: str
    cost: float
    make: Callable[[], Any]


class Store:
    """The folder, locked until `close`.

    Args:
        directory: made if it is not there.
        settings: what the results depend on, as JSON can hold it.
        device: where tensors are wanted.

    Raises ValueError where another process is at work there, or the settings were others.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], device: torch.device) -> None:
        self.directory, self.device = directory, device
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"out: {directory} is a file; accepted: a directory, new or a study's")
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = (directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._compare(json.loads(json.dumps(dict(settings))))
        except OSError as error:
            self.close()
            raise ValueError(
                f"out: another process is at work in {directory}; accepted: one"
            ) from error
        except ValueError:
            self.close()
            raise
        for left in directory.rglob("*.tmp"):  # what a kill left half written
            left.unlink()

    def has(self, name: str) -> bool:
        """Whether a piece of JSON is there."""
        return self._json(name).is_file()

    def read(self, name: str) -> Any:
        """A piece's value; ValueError where it is not there or not whole."""
        return self._read(name)["value"]

    def seconds(self, name: str) -> float:
        """What a piece took."""
        return self._read(name)["seconds"]

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """A piece's value, read or made."""
        if not self.has(name):
            begin = time.monotonic()
            value = make()
            path = self._json(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"seconds": time.monotonic() - begin, "value": value})
        return self.read(name)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors by name on the device, read or made."""
        path = self.directory / f"{name}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, make())
        return load_file(path, device=str(self.device))

    def forget(self, *names: str) -> None:
        """Remove tensors that nothing needs any more."""
        for name in names:
            (self.directory / f"{name}.safetensors").unlink(missing_ok=True)

    def close(self) -> None:
        self._lock.close()

    def _json(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _read(self, name: str) -> dict:
        try:
            return json.loads(self._json(name).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"out: {self._json(name)}: {error}; remove it to go on") from error

    def _compare(self, now: dict[str, Any]) -> None:
        path = self.directory / "settings.json"
        if not path.exists():
            write_json(path, now)
            return
        was = json.loads(path.read_text())
        for name in sorted(now.keys() | was.keys()):
            if now.get(name) != was.get(name):
                raise ValueError(
                    f"{name}: got {now.get(name)!r}, but {self.directory} was begun with "
                    f"{was.get(name)!r}; accepted: the same, or a new directory"
                )


def work(store: Store, pieces: list[Piece], say: Say) -> Iterator[Piece]:
    """Make the pieces that are not there, in order; each is yielded when it is there."""
    missing = [piece for piece in pieces if not store.has(piece.name)]
    if missing:
        say(f"{len(missing)} of {len(pieces)} pieces to do")
    progress = Progress(sum(piece.cost for piece in missing), say)
    for piece in pieces:
        new = not store.has(piece.name)
        store.json(piece.name, piece.make)
        if new:
            progress.done(piece.cost, piece.name)
        yield piece
