"""A run's folder: checkpoints of its training that outlive a kill, and who may go on from them.

    state-0-00000050.safetensors    stage 0 after 50 steps; the last two are kept
    lock                            held while a process trains

A state is one safetensors file of what is trained, AdamW's averages and the losses so far; its
header's metadata says which stage and step they are of, and with which settings. It is written
under another name, flushed to the disk and renamed, so a state is there whole or not at all.
Nothing is pickled.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from flexmore_kernels.checkpoint_headers import read_header
from flexmore_kernels.checkpoint_writer import write_tensors

KEPT = 2
LOCK = "lock"


class State(NamedTuple):
    """After `step` steps of stage number `stage`."""

    stage: int
    step: int
    tensors: dict[str, Tensor]


class RunFolder:
    """The folder, locked until `close`.

    Args:
        directory: made if it is not there.
        settings: what the result depends on, as JSON can hold it, by the names of options.
        machine: what its bits may depend on besides: only told when it differs.
        say: is told what is worth knowing.

    Raises ValueError where another process trains.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        machine: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.directory, self._say = directory, say
        self._settings = json.loads(json.dumps(dict(settings)))
        self._machine = json.loads(json.dumps(dict(machine)))
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"out: {directory} is a file; accepted: a directory, new or a run's")
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = (directory / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"out: another process trains in {directory}; accepted: one"
            ) from error
        for left in directory.glob("state-*.tmp"):  # what a kill left half written
            left.unlink()

    def newest(self) -> State | None:
        """The newest state that is whole; None where there is none at all.

        One that is not as long as its header says, which no kill makes but a broken disk or copy
        may, is told and passed over for the one before. ValueError when all are such, or when the
        settings are others.
        """
        paths = self._states()
        for path in reversed(paths):
            try:
                read_header(path)
            except ValueError as error:
                self._say(f"{error}; going on from the state before it")
                continue
            return self._read(path)
        if paths:
            raise ValueError(
                f"out: no state in {self.directory} is whole; accepted: a new directory, or this "
                "one without its state-* files, to begin anew"
            )
        return None

    def save(self, stage: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a state, then remove all but the last two."""
        about = {"stage": stage, "step": step}
        about |= {"settings": self._settings, "machine": self._machine}
        path = self.directory / f"state-{stage}-{step:08}.safetensors"
        write_tensors(path, tensors, run=json.dumps(about))
        for old in self._states()[:-KEPT]:
            old.unlink()

    def close(self) -> None:
        self._lock.close()

    def _states(self) -> list[Path]:
        return sorted(self.directory.glob("state-*.safetensors"))

    def _read(self, path: Path) -> State:
        with safe_open(path, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get("run", "null"))
            if about is None:
                raise ValueError(f"out: {path} was written by something else; remove it")
            self._compare(about["settings"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name, value in self._machine.items():
            if about["machine"].get(name) != value:
                was = about["machine"].get(name)
                self._say(f"{name} is {value} and was {was}: the last bits may come out otherwise")
        return State(about["stage"], about["step"], tensors)

    def _compare(self, before: dict[str, Any]) -> None:
        for name in self._settings.keys() | before.keys():
            now, was = self._settings.get(name), before.get(name)
            if now != was:
                raise ValueError(
                    f"{name}: got {now!r}, but {self.directory} was begun with {was!r}; accepted: "
                    "the same, or a new directory"
                )
