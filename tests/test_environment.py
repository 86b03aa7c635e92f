"""`flexmore env` tells the truth: what it says of an op's kernels is what runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch

from flexmore_kernels import backend, cli, environment, native, ops
from flexmore_kernels.testing import make_pair, make_weight, make_x
from tests.common import some_ids

D, F, T, K = 32, 16, 24, 2


class Recorder(dict):
    """Which kernels' functions ran: {stem: {names}}."""

    def module(self, name: str, stem: str):
        real = importlib.import_module(f"flexmore_kernels._{name}.{stem}")

        def getattribute(function):
            def call(*args, **kwargs):
                self.setdefault(stem, set()).add(name)
                return getattr(real, function)(*args, **kwargs)

            return call

        return type("Kernels", (), {"__getattr__": lambda _, function: getattribute(function)})()


@pytest.fixture
def ran(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(backend, "_module", found.module)
    return found


def some_experts(device: str, num_experts: int) -> list[list]:
    """Full-size experts, low-rank ones and ones without a delta, so that all kernels have work."""
    entries = []
    for out, width in ((F, D), (F, D), (D, F)):
        kinds = [make_weight(out, width, device), make_weight(out, width, device), None]
        kinds += [make_pair(out, width, 3, device) for _ in range(num_experts - 3)]
        entries.append(kinds)
    return entries


def forward(op: str, device: str, num_experts: int):
    """The op's outputs, on inputs that need gradients."""
    x = make_x(T, D, device).requires_grad_()
    if op == "topk_route from x":
        return ops.topk_route(x, make_weight(num_experts, D, device), top_k=K).weights
    if op in ("topk_route from logits", "topk_route"):
        logits = make_x(T, num_experts, device).requires_grad_()
        return ops.topk_route(logits, top_k=K).weights
    ids = some_ids(T, num_experts, K).to(device)
    weights = torch.rand(T, K, device=device, requires_grad=True)
    if op == "experts":
        return ops.experts(x, ids, weights, *some_experts(device, num_experts))
    plan = ops.make_plan(ids, num_experts)
    rows = make_x(T * K, D, device).requires_grad_()
    ranks = [0, *[3] * (num_experts - 1)]
    if op in ("make_plan", "permute", "unpermute", "grouped_gemm"):
        weight = torch.randn(num_experts, F, D, device=device)
        return {
            "make_plan": lambda: x,
            "permute": lambda: ops.permute(x, plan),
            "unpermute": lambda: ops.unpermute(rows, plan, weights),
            "grouped_gemm": lambda: ops.grouped_gemm(rows, weight, plan),
        }[op]()
    z = torch.randn(T * K * 3, device=device, requires_grad=True)
    b = torch.randn(F, sum(ranks), device=device)
    if op == "shrink":
        return ops.shrink(rows, torch.randn(sum(ranks), D, device=device), plan, ranks)
    if op == "expand":
        return ops.expand(z, b, plan, ranks)
    assert op == "gated_mix"
    bases = (torch.randn(T, F, device=device, requires_grad=True) for _ in range(2))
    return ops.gated_mix(*bases, weights, plan, z, b, ranks, z, b, ranks)[0]


def check_rows(device: str, ran: Recorder) -> None:
    for row in environment.kernels(device):
        op, backward = row["op"].partition(",")[0], False
        num_experts = 70 if "E >" in row["op"] else 5
        if op.endswith(" backward"):
            op, backward = op.removesuffix(" backward"), True
        y = forward(op, device, num_experts)
        if op == "make_plan" or not backward:
            seen = dict(ran)
        else:
            ran.clear()
            y.sum().backward()
            seen = dict(ran)
        said = {row["stem"]: {row["kernels"]}} | {s: {n} for s, n in row["inside"].items()}
        if row["stem"] != "routing" and "routing" not in row["inside"]:
            seen.pop("routing", None)  # of the plan that the op was given
        ran.clear()
        assert seen == said, row["op"]


def test_what_is_said_runs(device, ran):
    check_rows(device, ran)


def test_what_is_said_of_chosen_kernels_runs(kernels, device, ran):
    check_rows(device, ran)


def test_every_op_is_reported():
    stems = {name: getattr(ops, name).__module__.rpartition(".")[2] for name in ops.__all__}
    with_kernels = {name for name, stem in stems.items() if stem in backend.STEMS}
    assert {op.name.split()[0] for op in environment.OPS} == with_kernels
    assert {op.stem for op in environment.OPS} == set(backend.STEMS)


def test_use_holds_in_other_threads():
    """A backward on CUDA runs in a thread of torch's."""
    seen = []
    with backend.use("aten"):
        thread = threading.Thread(target=lambda: seen.append(backend.chosen("routing", "cpu")))
        thread.start()
        thread.join()
    assert seen == ["aten"]


class TestOnAGpu:
    """What would be said on a machine with a GPU, from stand-ins for what it would find there."""

    @pytest.fixture
    def machine(self, monkeypatch):
        def set_up(archs="80-real 90a-real", torch_cuda="13.0", runs=True, triton=True):
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
            monkeypatch.setattr(backend, "_triton_installed", lambda: triton)
            backend._available.cache_clear()
            return {row["op"]: row for row in environment.kernels("cuda")}

        yield set_up
        backend._available.cache_clear()

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
        assert "no cuda kernels" in rows["experts"]["not"]["native"]

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
        text = environment.as_text(environment.report())
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
        text = environment.as_text(json.loads(json.dumps(found)))
        assert f"{section} unknown (RuntimeError: it broke)" in " ".join(text.split())
        assert f"torch             {torch.__version__}" in text and "kernels on cuda" in text


def test_text_and_json_say_the_same(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == environment.as_text(found)
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
        text = environment.as_text(environment.report())
    finally:
        backend._available.cache_clear()
    assert "library           not built: no C++ compiler" in text
    assert "not native: not built: no C++ compiler" in text
