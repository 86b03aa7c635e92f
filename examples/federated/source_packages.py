"""Files of Debian packages: those that the machine has, or else fetched and unpacked beside.

Nothing is installed and no rights are needed: `apt-get download` and `dpkg-deb -x` write into a
temporary folder, which goes when the work is done.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path


class Packages:
    """Finds files of packages.

        with Packages(say) as packages:
            root, version = packages.root("wordnet-base", "usr/share/wordnet/data.noun")

    Args:
        say: is told what is fetched.
        system: where installed files are.
    """

    def __init__(self, say: Callable[[str], None], system: Path = Path("/")) -> None:
        self._say, self._system = say, system
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Packages:
        return self

    def __exit__(self, *_) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def root(self, package: str, needed: str) -> tuple[Path, str]:
        """Where the package's files are, and its version.

        needed: a pattern of a file that has to be there; a machine can have a package without its
        documents. Raises OSError that names the package when it cannot be had.
        """
        version = self._installed(package)
        if version and any(self._system.glob(needed)):
            return self._system, version
        folder = self._fetched(package)
        if not any(folder.glob(needed)):
            raise OSError(f"package {package}: has no {needed}; accepted: a release that has it")
        return folder, (folder / "version").read_text()

    def documents_of_python(self, needed: str) -> str:
        """The name of the package with the documentation of Debian's Python: python3.11-doc."""
        for path in sorted(self._system.glob(needed), reverse=True):
            return f"{path.relative_to(self._system).parts[3]}-doc"
        text = self._run("python3-doc", "apt-cache", "depends", "python3-doc")
        if found := re.search(r"Depends: (python3\.\d+-doc)$", text, re.M):
            return found[1]
        raise OSError(
            "package python3-doc: apt knows nothing of it; accepted: a machine on which "
            "`apt-get update` has run"
        )

    def _installed(self, package: str) -> str | None:
        if shutil.which("dpkg-query") is None:
            return None
        asked = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${Version}", package],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return asked.stdout.strip() or None if asked.returncode == 0 else None

    def _fetched(self, package: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="texts-")
        folder = Path(self._folder.name) / package
        if (folder / "version").exists():
            return folder
        self._say(f"fetching the Debian package {package}")
        folder.mkdir(exist_ok=True)
        self._run(package, "apt-get", "download", package, folder=folder)
        archive = next(folder.glob("*.deb"))
        version = self._run(package, "dpkg-deb", "--field", str(archive), "Version").strip()
        self._run(package, "dpkg-deb", "-x", str(archive), str(folder))
        archive.unlink()
        (folder / "version").write_text(version)
        return folder

    def _run(self, package: str, program: str, *words: str, folder: Path | None = None) -> str:
        """What a program prints. Raises OSError that says which package is missing, and what to
        do."""
        if shutil.which(program) is None:
            raise OSError(
                f"package {package}: not on this machine, and there is no {program} to fetch it; "
                "accepted: a Debian or Ubuntu machine, or a folder that was prepared on one"
            )
        done = subprocess.run(
            [program, *words], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(
                f"package {package}: {program} failed ({last}); accepted: a network that reaches a "
                f"Debian mirror (after `apt-get update`), or `apt-get install {package}` first"
            )
        return done.stdout
