"""Builds the compiled library with CMake when a C++ compiler and torch are there.

Metadata is in pyproject.toml. Options, as users of torch extensions know them:

    FORCE_CUDA=1           compile the CUDA kernels even where torch is a CPU build (0: never)
    TORCH_CUDA_ARCH_LIST   such as "8.0;9.0a;12.0+PTX"; default: see CMakeLists.txt
    MAX_JOBS               parallel compiler jobs; default: the number of cores

torch is not imported, and no second torch is downloaded into pip's isolated build environment: the
one of the target environment is found by path, and its version is read as text. What was decided
and built goes into `flexmore_kernels/_build.json`, for `flexmore env`.

The library fits every Python from 3.10 on. Beside it the small module `_host` is built, where there
are pybind11's headers, which fits the one that built it: a wheel that is made to fit them all
(`bdist_wheel --py-limited-api cp310`, as `make wheel` does) leaves it out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
HOST = "flexmore_kernels._host"


def say(message: str) -> None:
    print(f"flexmore_kernels: {message}", file=sys.stderr, flush=True)


def site_folders() -> list[Path]:
    """Folders where the target environment's packages may be; pip's isolation hides them."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    folders += site.getsitepackages([sys.prefix, sys.base_prefix])
    for prefix in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")):
        if prefix:
            folders.append(f"{prefix}/lib/{python}/site-packages")
    return [Path(folder) for folder in folders]


def find_torch() -> Path | None:
    """The torch package of the target environment."""
    candidates = [folder / "torch" for folder in site_folders()]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        candidates.append(Path(spec.origin).parent)
    return next((c for c in candidates if (c / "version.py").is_file()), None)


def torch_version(torch: Path) -> tuple[str, str | None]:
    """(version, CUDA version or None), from torch/version.py."""
    text = (torch / "version.py").read_text()
    version = re.search(r"__version__\s*=\s*'([^']+)'", text)
    cuda = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, re.MULTILINE)
    if version is None:
        raise RuntimeError(f"cannot read the version from {torch / 'version.py'}")
    return version[1], cuda[1] if cuda else None


def find_program(*names: str) -> str | None:
    """The first program found on PATH or among the scripts of the target environment."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.environ.get("CUDACXX") or shutil.which(f"{home}/bin/nvcc") or find_program("nvcc")


def cuda_architectures() -> str:
    """CMAKE_CUDA_ARCHITECTURES from TORCH_CUDA_ARCH_LIST; empty: the defaults of CMakeLists.txt."""
    out = []
    for arch in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()):
        if not arch:
            continue
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {arch!r}; accepted: 8.0, 9.0a, 12.0+PTX")
        number = "".join(match.group(1, 2, 3))
        out += [f"{number}-real"] + ([f"{number}-virtual"] if match[4] else [])
    return ";".join(out)


def why_no_cuda(nvcc: str | None, torch_cuda: str | None) -> str | None:
    """The reason to compile no CUDA kernels (Triton takes over), or None to compile them."""
    forced = os.environ.get("FORCE_CUDA")
    if forced == "0":
        return "built with FORCE_CUDA=0"
    if forced:
        if nvcc is None:
            raise SystemExit("FORCE_CUDA is set, but there is no nvcc on PATH or in CUDA_HOME")
        return None
    if torch_cuda is None:
        return "built for a CPU build of torch"
    if nvcc is None:
        return "no nvcc was found when it was built"
    release = nvcc_version(nvcc)
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        return f"the nvcc found was of CUDA {release or '?'}, torch of CUDA {torch_cuda}"
    return None


def nvcc_version(nvcc: str) -> str:
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    match = re.search(r"release ([\d.]+)", run.stdout)
    return match[1] if match else ""


def why_no_library() -> str | None:
    """The reason to install Python and Triton alone, or None when all is there."""
    torch = find_torch()
    if torch is None:
        return "no torch in the target environment (uv: use --no-build-isolation)"
    version, _ = torch_version(torch)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        return f"torch {version} is older than {'.'.join(map(str, MIN_TORCH))}"
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        return f"{torch} has no headers"
    if find_program(os.environ.get("CXX", "c++"), "g++", "clang++") is None:
        return "no C++ compiler"
    if find_program("cmake") is None:
        return "no cmake"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a free-threaded Python, which has no stable ABI"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h (install your system's python-dev package)"
    return None


def pybind11_include() -> str:
    """pybind11's headers, its package's or else the copy in torch; "" if there are none."""
    spec = importlib.util.find_spec("pybind11")
    packages = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    packages += [folder / "pybind11" for folder in site_folders()] + [find_torch()]
    folders = [package / "include" for package in packages if package is not None]
    return next((str(f) for f in folders if (f / "pybind11/pybind11.h").is_file()), "")


def git_commit() -> str:
    """The commit of the sources: git's word for it or, in a source distribution, the one noted."""
    if (ROOT / "COMMIT").is_file():
        return (ROOT / "COMMIT").read_text().strip()
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip()


def write_facts(package: Path, **facts: object) -> None:
    """Writes `_build.json` into the package, wherever it is being built."""
    torch = find_torch()
    always = {
        "commit": git_commit(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch_version(torch)[0] if torch else "",
    }
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(always | facts, indent=1) + "\n")


def reusable(build: Path, ninja: str | None) -> bool:
    """Whether the tools that a build folder was configured with are still these.

    Those of a temporary build environment of pip are gone; recompiling all is the way out.
    """
    try:
        cache = (build / "CMakeCache.txt").read_text()
    except OSError:
        return False
    cmake = re.search(r"^CMAKE_COMMAND:\w+=(.*)$", cache, re.MULTILINE)
    program = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*)$", cache, re.MULTILINE)
    tools = [match[1] if match else "" for match in (cmake, program)]
    return all(map(os.path.exists, tools)) and (ninja is None or tools[1] == ninja)


def remove_host(package: Path) -> None:
    """Removes `_host` of an earlier build, which does not know of this one."""
    for module in package.glob("_host.*.so"):
        module.unlink()


class CMakeBuild(build_ext):
    """One CMake run builds every extension."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.distribution.get_option_dict("bdist_wheel").get("py_limited_api"):
            self.extensions = [e for e in self.extensions if e.name != HOST]

    def build_extensions(self) -> None:
        torch = find_torch()
        version, torch_cuda = torch_version(torch)
        nvcc = find_nvcc()
        no_cuda = why_no_cuda(nvcc, torch_cuda)
        with_cuda = no_cuda is None
        with_host = HOST in {extension.name for extension in self.extensions}
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        output = Path(self.get_ext_fullpath("flexmore_kernels._C")).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        options = {
            "TORCH_DIR": torch,
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "OUTPUT_DIR": output,
            "WITH_CUDA": "ON" if with_cuda else "OFF",
            "NVCC_THREADS": max(1, jobs // 2),
            "CMAKE_CUDA_ARCHITECTURES": cuda_architectures(),
            "PYBIND11_INCLUDE": pybind11_include() if with_host else "",
            "HOST_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX") if with_host else "",
            "TORCH_VERSION": version,
            "GIT_COMMIT": git_commit(),
        }
        if with_cuda:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        ninja = find_program("ninja")
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        cuda_in_words = f"with {nvcc}" if with_cuda else f"off ({no_cuda}; Triton takes over)"
        say(f"building for torch {version}, CUDA kernels {cuda_in_words}")
        cmake = find_program("cmake")
        if not reusable(build, ninja):
            shutil.rmtree(build, ignore_errors=True)
        configure = [cmake, "-S", str(ROOT), "-B", str(build)]
        configure += ["-G", "Ninja"] if ninja else []
        for name, value in options.items():
            configure.append(f"-U{name}" if value == "" else f"-D{name}={value}")
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--parallel", str(jobs)], check=True)
        except subprocess.CalledProcessError as error:
            hint = " FORCE_CUDA=0 builds without CUDA kernels; Triton's take over." * with_cuda
            raise SystemExit(f"flexmore_kernels: compiling failed, see above.{hint}") from error
        facts = (line.partition("=") for line in (build / "facts.txt").read_text().splitlines())
        built = {name: value for name, _, value in facts}
        write_facts(output, why_no_library=None, why_no_cuda=no_cuda, **built)
        if not with_host:
            remove_host(output)

    def copy_extensions_to_source(self) -> None:
        remove_host(ROOT / "flexmore_kernels")
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, "flexmore_kernels/_build.json"), ROOT / "flexmore_kernels")


class Build(build_py):
    """Notes why there is no library; what is in one is noted by CMakeBuild, which runs later."""

    def run(self) -> None:
        super().run()
        in_place = getattr(self, "editable_mode", False)
        package = (ROOT if in_place else Path(self.build_lib)) / "flexmore_kernels"
        if missing is not None:
            if not in_place:  # of an earlier build, with a compiler
                (package / "_C.abi3.so").unlink(missing_ok=True)
                remove_host(package)
            write_facts(package, why_no_library=missing, why_no_cuda=missing)


class SourceDistribution(sdist):
    """Notes the commit, which a build from an archive could not learn otherwise."""

    def make_release_tree(self, base_dir, files) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "COMMIT").write_text(git_commit() + "\n")


missing = why_no_library()
if __name__ == "__main__":
    if missing is not None:
        say(f"WITHOUT the compiled library: {missing}. Python and Triton kernels are installed.")
    extensions = [Extension("flexmore_kernels._C", sources=[], py_limited_api=True)]
    if pybind11_include():
        extensions.append(Extension(HOST, sources=[]))
    every_python = {"bdist_wheel": {"py_limited_api": "cp310"}} if len(extensions) == 1 else {}
    setup(
        packages=[*find_packages(include=["flexmore_kernels*"]), "flexmore_kernels.reference"],
        package_dir={"flexmore_kernels.reference": "reference"},
        package_data={"flexmore_kernels": ["py.typed", "tuned/*.json", "default_model/*"]},
        ext_modules=extensions if missing is None else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": Build, "sdist": SourceDistribution},
        options=every_python if missing is None else {},
    )
