"""The directory that a checkpoint is to appear in, and the folder in which it is made.

What fits in memory is written by `made_whole`; checkpoint_writer.py says how the rest is.
"""

from __future__ import annotations

import os
import shutil
import uuid
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


@contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """A new folder beside `directory`, which becomes it at the end, or is removed on any error.

    ValueError, from the start, as `refuse_existing`.
    """
    refuse_existing(directory)
    # Unlike what tempfile makes, open to whom the user's umask lets in.
    folder = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, directory)
    except BaseException:
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
