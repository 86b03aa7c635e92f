"""The report of `flexmore env`, on this machine and on others, by stand-ins for what they have."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from flexmore_kernels import backend, cli, environment, environment_text, native


class TestOnAGpu:
    """What would be said on a machine with a GPU, from stand-ins for what it would find there."""

    @pytest.fixture
    def machine(self, monkeypatch):
        def set_up(archs="80-real 90a-real", runs=True, triton=True, capability=(9, 0)):
            reason = None
            if not archs:
                reason = "no CUDA kernels in it: no nvcc was found when it was built"
            elif not runs:
                reason = f"no code in it for sm_75 (built for {archs})"
            monkeypatch.setattr(native, "why_not_cuda_built", lambda: None if archs else reason)
            monkeypatch.setattr(native, "cuda_archs", lambda: archs)
            monkeypatch.setattr(native, "why_not_cuda", lambda index: reason)
            monkeypatch.setattr(native, "cuda_runs_on", lambda device=None: reason is None)
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            monkeypatch.setattr(backend, "_triton_installed", lambda: triton)
            backend._available.cache_clear()
            backend._is_hopper.cache_clear()
            return {row["op"]: row for row in environment.kernels("cuda")}

        yield set_up
        backend._available.cache_clear()
        backend._is_hopper.cache_clear()

    def test_measured_exceptions(self, machine):
        rows = machine()
        assert rows["permute"]["kernels"] == "native"
        assert rows["permute"]["not"]["triton"].startswith("native comes first")
        few, many = (rows[f"topk_route from x, E {limit}"] for limit in ("up to 64", "> 64"))
        assert few["kernels"] == "triton" and many["kernels"] == "native"
        assert "measured faster: 52 us" in few["not"]["native"]
        assert rows["topk_route from logits"]["kernels"] == "native"
        assert rows["experts"]["kernels"] == "triton"
        assert rows["experts"]["inside"]["permutation"] == "native"
        assert "16-bit floats and some sizes" in rows["experts"]["not"]["native"]
        assert "inside the experts alone" in rows["shrink"]["not"]["native"]
        assert "no cuda kernels" in rows["gated_mix"]["not"]["native"]

    def test_what_the_library_takes_over(self, machine):
        rows = machine()
        parts = {name: row for name, row in rows.items() if "sizes" in row}
        assert set(parts) == {
            "topk_route from x, up to 64 tokens", "experts, up to 64 tokens",
            "experts on Hopper, many tokens", "experts, E > 8",
        }  # fmt: skip
        assert {row["kernels"] for row in parts.values()} == {"native"}
        assert set(parts["experts, E > 8"]["inside"]) == {"routing", "expert_major"}
        order = list(rows)
        assert order.index("experts, E > 8") + 1 == order.index("experts backward")
        text = environment_text.as_text(
            {**environment.report(), "kernels": {"cuda": [*rows.values()]}}
        )
        assert "for 16-bit floats, no gradient, up to 16 experts" in " ".join(text.split())

    def test_the_library_where_it_is_not_asked(self, machine):
        hopper = "experts on Hopper, many tokens"
        for options in ({"capability": (10, 0)}, {"archs": "80-real 90-real"}):
            rows = machine(**options)
            assert hopper not in rows and "experts, E > 8" in rows
        rows = machine(triton=False)  # the forward whose steps these are is Triton's
        assert hopper not in rows and "experts, E > 8" not in rows
        assert rows["experts, up to 64 tokens"]["not"]["triton"] == "not installed"
        machine()
        with backend.use("triton"):
            assert not [row for row in environment.kernels("cuda") if "sizes" in row]

    def test_without_nvcc(self, machine):
        rows = machine(archs="")
        assert {row["kernels"] for row in rows.values()} == {"triton"}
        assert "no nvcc was found" in rows["make_plan"]["not"]["native"]
        assert "only where Triton is missing" in rows["make_plan"]["not"]["aten"]

    def test_without_code_for_this_gpu(self, machine):
        assert "sm_75" in machine(runs=False)["permute"]["not"]["native"]

    def test_without_triton(self, machine):
        rows = machine(archs="", triton=False)
        assert {row["kernels"] for row in rows.values()} == {"aten"}
        assert rows["shrink"]["not"]["triton"] == "not installed"

    def test_gpus_and_their_memory(self, machine, monkeypatch):
        machine(runs=False)
        properties = SimpleNamespace(
            name="NVIDIA Tesla T4", major=7, minor=5, total_memory=16 * 2**30,
            multi_processor_count=40, shared_memory_per_block_optin=64 * 1024,
        )  # fmt: skip
        self.cuda(monkeypatch, get_device_properties=lambda index: properties)
        self.driver(monkeypatch, 12040)
        text = environment_text.as_text(environment.report())
        assert max(map(len, text.splitlines())) <= 110
        text = " ".join(text.split())
        assert "gpu 0 NVIDIA Tesla T4, compute capability 7.5, 16.0 GiB" in text
        assert "64 KiB shared memory a block" in text and "up to CUDA 12.4" in text
        assert "library: no code in it for sm_75" in text and "kernels on cuda" in text

    def cuda(self, monkeypatch, **functions):
        """A torch.cuda of one GPU that has no more than is public in torch 2.11."""
        here = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_capability": lambda device: (9, 0),
        }
        monkeypatch.setattr(torch, "cuda", SimpleNamespace(**(here | functions)))

    def driver(self, monkeypatch, version, error=0):
        def answer(at):
            at._obj.value = version
            return error

        library = SimpleNamespace(cuDriverGetVersion=answer)
        monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: library)

    @pytest.mark.parametrize(
        ("version", "error", "words"), [(13000, 0, "13.0"), (12080, 0, "12.8"), (12080, 3, None)]
    )
    def test_the_driver_is_asked_without_torch(self, monkeypatch, version, error, words):
        self.driver(monkeypatch, version, error)
        assert environment._driver_cuda() == words
        monkeypatch.setattr(environment, "_driver_number", lambda: "580.95.05")
        cuda = f", up to CUDA {words}" if words else ""
        assert environment._driver() == f"580.95.05{cuda}"

    def test_a_machine_without_the_driver(self, monkeypatch):
        def absent(name):
            raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(environment.ctypes, "CDLL", absent)
        monkeypatch.setattr(environment.shutil, "which", lambda name: None)
        assert environment._driver() is None

    def test_a_hung_nvidia_smi(self, monkeypatch):
        def hang(command, timeout, **options):
            raise subprocess.TimeoutExpired(command, timeout)

        monkeypatch.setattr(environment.shutil, "which", lambda name: name)
        monkeypatch.setattr(environment.subprocess, "run", hang)
        assert environment._driver_number() is None

    def test_what_torch_lacks_costs_its_own_line_only(self, machine, monkeypatch):
        machine()
        old = SimpleNamespace(name="NVIDIA X", major=9, minor=0, total_memory=2**30)
        self.cuda(monkeypatch, get_device_properties=lambda index: old)
        (gpu,) = environment.report()["gpus"]
        assert gpu["name"] == "NVIDIA X" and gpu["memory_gib"] == 1.0
        assert gpu["multiprocessors"].startswith("unknown (AttributeError: ")

    @pytest.mark.parametrize(
        ("module", "function", "section"),
        [
            (environment, "_driver", "driver"),
            (environment, "_processor", "processor"),
            (environment, "_gpus", "gpu"),
            (environment, "_library", "library"),
            (environment, "kernels", "kernels on cpu:"),
            (native, "build_info", "library"),
            (native, "why_not_cuda", "library:"),
            (backend, "why_not", "kernels on cuda:"),
        ],
    )
    def test_one_failure_leaves_the_rest(self, machine, monkeypatch, module, function, section):
        machine()

        def fail(*given):
            raise RuntimeError("it broke")

        self.cuda(monkeypatch, get_device_properties=lambda index: torch._C._no_such_thing())
        monkeypatch.setattr(module, function, fail)
        found = environment.report()
        text = environment_text.as_text(json.loads(json.dumps(found)))
        assert f"{section} unknown (RuntimeError: it broke)" in " ".join(text.split())
        assert f"torch             {torch.__version__}" in text and "kernels on cuda" in text


def test_text_and_json_say_the_same(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == environment_text.as_text(found)
    assert text.isascii() and "\x1b" not in text
    assert text.startswith("flexmore_kernels  ")  # a column, not a sentence
    text = " ".join(text.split())
    for row in found["kernels"]["cpu"]:
        assert f" {row['op']} {row['kernels']} " in text
        for reason in row["not"].values():
            assert reason in text
    assert found["versions"]["torch"] == torch.__version__


def test_a_library_that_is_not_there_is_reported(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "not built: no C++ compiler")
    monkeypatch.setattr(native, "facts", lambda: {"why_no_library": "no C++ compiler"})
    backend._available.cache_clear()
    try:
        text = environment_text.as_text(environment.report())
    finally:
        backend._available.cache_clear()
    assert "library           not built: no C++ compiler" in text
    assert "not native: not built: no C++ compiler" in text
