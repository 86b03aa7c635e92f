"""The compiled library as a file: what was built, that it loads, which symbols it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexmore_kernels import environment, environment_text, native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no library: {native.why_not()}")


def test_build_info_names_what_was_built():
    info = native.build_info()
    assert info["loaded"] and info["why_not"] is None
    assert info["vector_width"] in ("baseline", "avx2", "avx512")
    if "vector_widths" in info:
        assert info["vector_width"] in info["vector_widths"].split()
        assert info["compiler"] and info["torch"]
        assert bool(info["nvcc"]) == bool(info["cuda_archs"])


def test_an_unknown_vector_width_is_refused():
    before = native.vector_width()
    with pytest.raises(ValueError, match="name"), native.use_vector_width("mmx"):
        pass
    assert native.vector_width() == before


def test_cuda_kernels_need_cuda_in_torch_too():
    if torch.version.cuda is None:
        assert not native.cuda_built()
    assert native.cuda_runs_on(0) <= native.cuda_built()


def test_everything_works_without_the_build_facts(monkeypatch):
    monkeypatch.setattr(native, "facts", dict)
    own = {"loaded", "why_not", "vector_width", "cuda_archs", "host"}
    assert set(native.build_info()) == own
    monkeypatch.setattr(native, "cuda_archs", str)
    assert "no CUDA kernels" in native.why_not_cuda_built.__wrapped__()


def test_everything_works_without_the_host_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "flexmore_kernels._host", None)  # importing it raises
    assert native.host() is None and native.available()
    assert native.build_info()["host"] is False
    assert "_host: not built" in environment_text.as_text(environment.report())


def _forget():
    for cached in (native.why_not, native.why_not_cuda_built, native.why_not_cuda):
        cached.cache_clear()


@pytest.mark.parametrize("error", (None, OSError("undefined symbol: x")), ids=("absent", "broken"))
def test_a_library_that_cannot_be_used_is_reported_not_raised(error, monkeypatch):
    if error is None:
        monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    else:

        def refuse(name):
            raise error

        monkeypatch.setattr(native.importlib, "import_module", refuse)
    _forget()
    try:
        assert ("not built" if error is None else "undefined symbol") in native.why_not()
        assert not native.available() and not native.cuda_built()
        assert native.vector_width() == "none" and not native.build_info()["loaded"]
    finally:
        monkeypatch.undo()
        _forget()
    assert native.available()


def _library() -> Path:
    return Path(native.__file__).with_name("_C.abi3.so")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
def test_the_binary_needs_nothing_newer_than_promised():
    """Only C symbols of torch (the stable ABI), libstdc++ up to GCC 8's, CUDA's shims weak."""
    table = subprocess.run(
        ["objdump", "-T", str(_library())], capture_output=True, text=True, check=True
    ).stdout
    versions = [tuple(map(int, v.split("."))) for v in re.findall(r"GLIBCXX_([\d.]+)", table)]
    assert max(versions) <= (3, 4, 24)
    undefined = [line.split() for line in table.splitlines() if "*UND*" in line]
    names = [fields[-1] for fields in undefined]
    assert [n for n in names if n.startswith("_Z") and re.search("torch|c10|at[0-9]", n)] == []
    assert [n for n in names if re.match(r"cuda[A-Z]|cu[A-Z]", n)] == []
    for fields in undefined:
        if "cuda_stream" in fields[-1]:
            assert "w" in fields
    # Defined and visible: the module's init and nothing of ours besides.
    defined = [line.split()[-1] for line in table.splitlines() if " g " in line and ".text" in line]
    assert [n for n in defined if "flexmore" in n] == []
    assert "PyInit__C" in defined


def test_the_binary_holds_no_path_of_the_build_machine():
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    dynamic = subprocess.run(["readelf", "-d", str(_library())], capture_output=True, text=True)
    assert "RUNPATH" not in dynamic.stdout and "RPATH" not in dynamic.stdout
