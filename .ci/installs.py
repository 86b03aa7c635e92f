"""The kinds of install, each made anew, outside the source tree, from what `.ci/wheels.py` built.

    cpu          the CPU wheel: demo, env, tests with the compiled library
    no nvcc      from the source distribution, as for a CUDA build of torch where there is no nvcc:
                 the library without CUDA kernels, and it says so; Triton serves the GPU
    no compiler  from the source distribution with nothing on PATH: Python and Triton alone

A CUDA build of torch is gigabytes: a stand-in that has its version and the headers of the torch
that is here takes its place while the second kind is built. With nvcc: `FORCE_CUDA=1 make build`
and `make wheel`; on a GPU `make test-gpu`.

Each environment sees torch and the other packages of the Python that runs this script by path, and
this package only if it was installed into it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
TORCH = Path(torch.__file__).parent
TOOLS = Path(sys.executable).parent


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Both outputs of a command, which must succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


class Install:
    """A fresh environment and a folder with the tests, from which no source of ours is seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "env", with_pip=False)
        self.python = folder / "env/bin/python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = folder / f"env/lib/{version}/site-packages"
        known = [sysconfig.get_paths()["purelib"], str(TORCH.parent)]
        (self.packages / "host.pth").write_text("\n".join(dict.fromkeys(known)) + "\n")
        for name in ("tests", "reference", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)

    def pip(self, *arguments: object, **variables: str) -> str:
        """pip of this script's environment, which nothing of is looked for on an index."""
        alone = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "-v")
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", *alone)
        return run(*pip, *arguments, cwd=self.folder, **variables)

    def flexmore(self, *arguments: object) -> str:
        return run(self.folder / "env/bin/flexmore", *arguments, cwd=self.folder)

    def environment(self) -> dict:
        found = json.loads(self.flexmore("env", "--json"))
        where = Path(found["versions"]["path"])
        assert where.is_relative_to(self.packages), f"not what was installed: {where}"
        return found

    def test(self, selection: str, *stems: str) -> None:
        """These of the tests of the stems."""
        files = [f"tests/test_{stem}.py" for stem in stems]
        pytest = (self.python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
        out = run(*pytest, "-k", selection, *files, cwd=self.folder)
        print("  " + out.strip().splitlines()[-1])

    def says(self, code: str) -> str:
        return run(self.python, "-c", code, cwd=self.folder)


LAYER = """
import torch, flexmore_kernels as fk
layer = fk.FlexMoRE(16, 24, (0, 2, 3), 2)
layer(torch.randn(5, 16)).sum().backward()
"""


def cpu(install: Install) -> None:
    (wheel,) = DIST.glob("*+cpu-*.whl")
    install.pip(wheel)
    found = install.environment()
    assert found["versions"]["flexmore_kernels"].endswith("+cpu"), found["versions"]
    assert found["library"]["loaded"] and "FORCE_CUDA=0" in found["library"]["why_no_cuda"]
    assert not found["library"]["host"], "it fits one Python, the wheel all"
    assert "SlowPathWarning" not in install.says(LAYER)
    assert "PASS" in install.flexmore("demo", "--tokens", "64")
    install.test("native and (plain or triples)", "routing", "permutation", "experts")


def no_nvcc(install: Install) -> None:
    """Needs a compiler and cmake, which may be in the environment of this script."""
    standin = install.packages / "torch"
    standin.mkdir()
    (standin / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: str = '13.0'\n")
    for part in ("include", "lib"):
        (standin / part).symlink_to(TORCH / part)
    folders = [TOOLS, *map(Path, os.environ["PATH"].split(os.pathsep))]
    path = os.pathsep.join(str(f) for f in folders if not (f / "nvcc").exists())
    (archive,) = DIST.glob("*.tar.gz")
    out = install.pip(archive, PATH=path, CUDA_HOME="/nowhere", CUDACXX="", FORCE_CUDA="")
    assert "CUDA kernels off (no nvcc was found when it was built; Triton takes over)" in out
    shutil.rmtree(standin)
    found = install.environment()["library"]
    assert found["loaded"] and found["torch"] == "2.13.0+cu130" and not found["cuda_archs"]
    assert found["host"]
    assert found["why_no_cuda"] == "no nvcc was found when it was built"
    assert "SlowPathWarning" not in install.says(LAYER)
    install.test("native and plain", "permutation")
    install.test("", "schedule")


def no_compiler(install: Install) -> None:
    (archive,) = DIST.glob("*.tar.gz")
    out = install.pip(archive, PATH="/nowhere", CXX="", FORCE_CUDA="")
    assert "WITHOUT the compiled library: no C++ compiler" in out, out
    assert "-py3-none-any.whl" in out and not list(install.packages.rglob("_C*.so"))
    found = install.environment()["library"]
    assert found["why_not"] == "not built: no C++ compiler"
    assert "SlowPathWarning: The compiled library is not used" in install.says(LAYER)
    install.test("aten and (plain or triples)", "routing", "permutation", "experts")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flexmore-installs-") as folder:
        for kind in (cpu, no_nvcc, no_compiler):
            begin = time.perf_counter()
            print(f"install: {kind.__name__.replace('_', ' ')}", flush=True)
            kind(Install(Path(folder, kind.__name__)))
            print(f"  passed in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
