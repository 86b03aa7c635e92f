"""Writes a checkpoint directory file by file, whole or not at all, and goes on after a kill.

The work is done in a hidden folder beside the directory, `.{name}.partial`:

    journal.json                    fingerprint of the work, units written, what is known of each
    model-00003-of-00034.safetensors    one file a unit, renamed to this name when it is complete

When all units are there, `finish` adds config.json and the index, reads all of it as `read_layout`
does, and renames the folder to the directory. Until then the directory does not exist.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint_config import AUTO_MAP, LOADER
from .checkpoint_folders import JOURNAL, LOCK, clear_finished, refuse_existing
from .checkpoint_headers import INDEX_FILE, file_names, read_header, read_json
from .checkpoint_layout import Layout, read_layout

SIDE_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
              "chat_template*", "generation_config.json")  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointWriter:
    """A checkpoint directory that is written one unit at a time and appears when it is complete.

        with CheckpointWriter(out, ["ends", "layer 0"], config=c, fingerprint=f) as writer:
            for unit in writer.remaining:
                writer.write(unit, tensors_of(unit))
            writer.finish()

    Args:
        directory: where the checkpoint is to be; must not exist yet, or be empty.
        units: what is written together, in order; each becomes one safetensors file.
        config: what config.json is to hold, unless `finish` gets another.
        fingerprint: names the work (see `fingerprint`). A folder that a killed run left behind is
            taken up if its fingerprint and units are the same, and refused if not.

    Attributes: `remaining`, the units not yet written, in order; `facts`, of each written unit what
    `write` was told to remember; `folder`, the hidden folder, in which a caller may put more files
    that are to be in the directory.

    Raises ValueError for a directory that exists, another fingerprint, a folder in which another
    process writes; OSError with errno ENOSPC when the disk is full, with all that is written kept.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        units: Sequence[str],
        *,
        config: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.directory = Path(directory)
        self.units = list(units)
        if not self.units or len(set(self.units)) != len(self.units):
            raise ValueError(f"units: got {self.units!r}; accepted: one or more, each once")
        refuse_existing(self.directory)
        self.folder = self.directory.parent / f".{self.directory.name}.partial"
        self._config, self._fingerprint = dict(config), fingerprint
        self._files = dict(zip(self.units, file_names(len(self.units)), strict=True))
        self.facts: dict[str, dict[str, Any]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        # A lock of the process, released when it ends however it ends.
        self._lock = (self.folder / LOCK).open("a")
        try:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"directory: another process is writing {self.directory}; accepted: one"
                ) from error
            self._take_up()
        except BaseException:
            self.close()
            raise

    @property
    def remaining(self) -> list[str]:
        return [unit for unit in self.units if unit not in self.facts]

    def write(
        self, unit: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write a unit's tensors (on any device) under their names, and remember `facts` of it.

        When it returns, the unit is on the disk and a later run does not write it again. facts are
        what JSON can hold.
        """
        if unit not in self.remaining:
            what = "written already" if unit in self.units else "unknown"
            raise ValueError(f"unit: {unit!r} is {what}; accepted: one of {self.remaining}")
        if not tensors:
            raise ValueError(f"tensors: got none for {unit!r}; accepted: one or more")
        try:
            write_tensors(self.folder / self._files[unit], tensors)
            self.facts[unit] = dict(facts or {})
            self._write_journal()
        except OSError as error:
            self.facts.pop(unit, None)
            self._explain(error, f"for {unit!r}")

    def add(self, source: Path, texts: Mapping[str, str] | None = None) -> None:
        """Put what a source holds beside its weights and config, and these files, into the folder:
        a tokenizer, a generation config."""
        try:
            for path in sorted({path for pattern in SIDE_FILES for path in source.glob(pattern)}):
                if path.is_file():
                    shutil.copy2(path, self.folder / path.name)
            for name, text in (texts or {}).items():
                (self.folder / name).write_text(text)
        except OSError as error:
            self._explain(error, "for what is beside the weights")

    def finish(self, config: Mapping[str, Any] | None = None) -> Layout:
        """Write config.json and the index, check everything, and let the directory appear.

        Returns what `read_layout` says of it. Raises ValueError when units remain, or as
        `read_layout` does; then the folder is left as it is.
        """
        if self.remaining:
            raise ValueError(f"units: {', '.join(self.remaining)} not written yet")
        try:
            write_config(self.folder, self._config if config is None else config)
            if len(self.units) > 1:
                write_index(self.folder, self._files.values())
        except OSError as error:
            self._explain(error, "for config.json")
        try:
            layout = read_layout(self.folder)
        except ValueError as error:
            raise ValueError(f"{error}; remove {self.folder} to begin anew") from error
        os.replace(self.folder, self.directory)
        clear_finished(self.directory)
        self.close()
        return dataclasses.replace(layout, directory=self.directory)

    def close(self) -> None:
        """Let another process go on; what is written stays."""
        self._lock.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_up(self) -> None:
        path = self.folder / JOURNAL
        if not path.exists():
            self._write_journal()
            return
        journal = read_json(path)
        advice = f"remove {self.folder} to begin anew"
        if journal.get("fingerprint") != self._fingerprint:
            raise ValueError(
                f"fingerprint: {self.folder} holds other work, {journal.get('fingerprint')}, than "
                f"this, {self._fingerprint}; {advice}"
            )
        if journal.get("units") != self.units:
            raise ValueError(f"units: {self.folder} has others in its journal; {advice}")
        for unit, facts in journal["written"].items():
            read_header(self.folder / self._files[unit])
            self.facts[unit] = facts
        for left in self.folder.glob("*.tmp"):
            left.unlink()

    def _write_journal(self) -> None:
        journal = {"fingerprint": self._fingerprint, "units": self.units, "written": self.facts}
        write_json(self.folder / JOURNAL, journal)

    def _explain(self, error: OSError, what: str) -> None:
        if error.errno not in _FULL:
            raise error
        done = len(self.units) - len(self.remaining)
        raise OSError(
            error.errno,
            f"no space left {what} ({error.strerror}): {done} of {len(self.units)} files are safe "
            f"in {self.folder}; make room, then run the same again to go on",
        ) from error


def fingerprint(layouts: Iterable[Layout], **options: Any) -> str:
    """Names work on these checkpoints with these options: the same for the same, else another.

    Of a checkpoint count its config, names, shapes, dtypes and its files' sizes and dates.
    """
    digest = hashlib.sha256()
    for layout in layouts:
        states = {f: (layout.directory / f).stat() for f in sorted(set(layout.files.values()))}
        about = (
            str(layout.directory.resolve()),
            layout.config,
            {file: (state.st_size, state.st_mtime_ns) for file, state in states.items()},
            {name: (part.shape, *part.stored, str(part.index)) for name, part in
             layout.parts.items()},
        )  # fmt: skip
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def file_state(path: str | os.PathLike) -> tuple:
    """What tells a file from another one, and from itself before it was changed."""
    state = os.stat(path)
    return os.path.realpath(path), state.st_size, state.st_mtime_ns


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """A safetensors file of these tensors, whole or not at all; metadata: more for its header.

    Raises OSError, with errno ENOSPC when there is no space, before or while it is written.
    """
    needed = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes to write, {free:,} free", str(path))
    part, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory, such as views of stacked factors.
        if storage.nbytes() > tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        part[name] = tensor
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask makes of a file; save_file hides it
        save_file(part, temporary, metadata={"format": "pt", **metadata})
        temporary.chmod(mode)
        _settle(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        numbers = [number for number in _FULL if f"os error {number})" in str(error)]
        raise OSError(numbers[0] if numbers else errno.EIO, str(error), str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all; what a kill leaves, the next call writes over."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text)
        _settle(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """config.json, and what its `auto_map` names where that is ours."""
    if config.get("auto_map") == AUTO_MAP:
        write_text(directory / LOADER.name, LOADER.read_text())
    write_json(directory / "config.json", config)


def write_index(directory: Path, files: Iterable[str]) -> None:
    """The index of a directory's safetensors files."""
    weight_map, total = {}, 0
    for file in files:
        for name in (header := read_header(directory / file)):
            weight_map[name] = file
        total += sum(stored.nbytes for stored in header.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX_FILE, index)


def _settle(path: Path) -> None:
    """Wait until a file is on the disk, so that a rename never outlives its contents."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
