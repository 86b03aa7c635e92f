"""The directory that a checkpoint is to appear in, and the folder in which it is made.

checkpoint_writer.py says how one becomes the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint_headers import read_json

JOURNAL, LOCK = "journal.json", "lock"


@contextmanager
def removed_if_bad(*folders: Path) -> Iterator[None]:
    """Remove folders on a ValueError: what was begun for a source or a rule that cannot be, nobody
    will take up, and it would be in the way of the same command with a repaired one.
    """
    try:
        yield
    except ValueError:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_existing(directory: Path) -> None:
    """ValueError unless a directory is new or empty, and one that a folder can be renamed to."""
    kind = None
    if directory.name in ("", "..") or directory.resolve() == Path.cwd():
        kind = "the working directory, or has no name of its own"
    elif os.path.islink(directory):
        kind = "a symbolic link"
    elif os.path.ismount(directory):
        kind = "a mount point"
    if kind is not None:
        raise ValueError(
            f"directory: {directory} is {kind}, which the finished folder cannot replace; accepted:"
            " a new or an empty directory in it, or elsewhere"
        )
    clear_finished(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"directory: {directory} exists; accepted: a new or an empty directory")


def clear_finished(directory: Path) -> None:
    """Remove the journal and the lock of a checkpoint that has appeared; a kill may leave them.

    Without them in the hidden folder a kill before the rename would cost all that is written.
    """
    path = directory / JOURNAL
    if (directory / "config.json").is_file() and path.is_file():
        try:
            ours = {"fingerprint", "units", "written"} == read_json(path).keys()
        except ValueError:
            ours = False
        if ours:
            for name in (LOCK, JOURNAL):
                (directory / name).unlink(missing_ok=True)
