"""What setup.py decides, on stand-ins for torch, nvcc, programs. Real installs: .ci/installs.py"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parent.parent / "setup.py"
pytestmark = pytest.mark.skipif(not SETUP.exists(), reason="an install carries no setup.py")


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module: under another name than __main__ it sets up nothing."""
    pytest.importorskip("setuptools")
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CUDACXX", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("flexmore_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(folder: Path, version: str, cuda: str | None) -> Path:
    """A torch of which there is but what setup.py looks at: its version and one header."""
    torch_folder = folder / "torch"
    header = torch_folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (torch_folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n"
        f"cuda: Optional[str] = {cuda!r}\ngit_version = '1234'\nhip: Optional[str] = None\n"
    )
    return torch_folder


def program(folder: Path, name: str, prints: str = "") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{prints}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_version_of_torch_is_read_as_text(setup, tmp_path, cuda):
    assert setup.torch_version(stand_in(tmp_path, "2.13.0+x", cuda)) == ("2.13.0+x", cuda)


def test_the_torch_here_is_found(setup):
    version, cuda = setup.torch_version(setup.find_torch())
    assert version == torch.__version__ and cuda == torch.version.cuda


@pytest.mark.parametrize(
    ("release", "torch_cuda", "force", "words"),
    [
        ("13.0", "13.0", None, None),
        ("13.2", "13.0", None, None),
        ("12.4", "13.0", None, "the nvcc found was of CUDA 12.4, torch of CUDA 13.0"),
        (None, "13.0", None, "no nvcc was found"),
        ("13.0", None, None, "a CPU build of torch"),
        (None, None, None, "a CPU build of torch"),
        ("13.0", None, "1", None),
        ("13.0", "13.0", "0", "FORCE_CUDA=0"),
    ],
)
def test_when_cuda_kernels_are_compiled(
    setup, tmp_path, monkeypatch, release, torch_cuda, force, words
):
    prints = f"Cuda compilation tools, release {release}, V{release}.88"
    nvcc = program(tmp_path, "nvcc", prints) if release else None
    if force is not None:
        monkeypatch.setenv("FORCE_CUDA", force)
    found = setup.why_no_cuda(nvcc, torch_cuda)
    assert found is None if words is None else words in found


def test_forced_cuda_needs_nvcc(setup, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc"):
        setup.why_no_cuda(None, "13.0")


def test_nvcc_is_looked_for_where_users_have_it(setup, tmp_path, monkeypatch):
    nvcc = program(tmp_path / "bin", "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.find_nvcc() == nvcc
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    assert setup.find_nvcc() is None
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup.find_nvcc() == nvcc


def test_why_there_is_no_library(setup, tmp_path, monkeypatch):
    here = stand_in(tmp_path, "2.13.0+cu130", "13.0")
    monkeypatch.setattr(setup, "find_torch", lambda: here)
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.why_no_library() == "no C++ compiler"
    program(tmp_path, "c++")
    assert setup.why_no_library() == "no cmake"
    program(tmp_path, "cmake")
    assert setup.why_no_library() is None
    (tmp_path / "Python.h").unlink()
    assert "no Python.h" in setup.why_no_library()
    monkeypatch.setattr(setup, "torch_version", lambda torch: ("2.10.1", None))
    assert setup.why_no_library() == "torch 2.10.1 is older than 2.11"
    monkeypatch.setattr(setup, "find_torch", lambda: None)
    assert "no torch" in setup.why_no_library()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("", ""), ("9.0a", "90a-real"), ("8.0;12.0+PTX", "80-real;120-real;120-virtual")],
)
def test_architectures_as_torch_names_them(setup, monkeypatch, given, wanted):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert setup.cuda_architectures() == wanted


def test_unknown_architectures_are_refused(setup, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="got 'Hopper'"):
        setup.cuda_architectures()


def test_the_module_for_one_python_is_left_out_of_wheels_for_all(setup):
    setuptools = pytest.importorskip("setuptools")
    options = {"bdist_wheel": {"py_limited_api": ("command line", "cp310")}}
    for given, wanted in ((options, ["_C"]), ({}, ["_C", "_host"])):
        modules = [setup.Extension(f"flexmore_kernels.{n}", sources=[]) for n in ("_C", "_host")]
        distribution = setuptools.Distribution({"ext_modules": modules})
        distribution.command_options = given
        command = setup.CMakeBuild(distribution)
        command.ensure_finalized()
        assert [e.name.rpartition(".")[2] for e in command.extensions] == wanted


def test_headers_of_pybind11_are_found(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup, "site_folders", lambda: [tmp_path])
    monkeypatch.setattr(setup, "find_torch", lambda: None)
    assert setup.pybind11_include() == ""
    header = tmp_path / "pybind11/include/pybind11/pybind11.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert setup.pybind11_include() == str(tmp_path / "pybind11/include")


def test_facts_are_noted(setup, tmp_path):
    setup.write_facts(tmp_path / "package", why_no_library="no C++ compiler")
    facts = json.loads((tmp_path / "package/_build.json").read_text())
    assert facts["why_no_library"] == "no C++ compiler" and facts["torch"] == torch.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
