"""`flexmore env` tells the truth: what it says of an op's kernels is what runs."""

from __future__ import annotations

import contextlib
import importlib
import threading

import pytest
import torch

from flexmore_kernels import backend, environment, ops
from flexmore_kernels.testing import make_pair, make_weight, make_x
from tests.common import some_ids

D, F, T, K = 32, 16, 24, 2


class Recorder(dict):
    """Which kernels' functions ran: {stem: {names}}."""

    def module(self, name: str, stem: str):
        real = importlib.import_module(f"flexmore_kernels._{name}.{stem}")

        def getattribute(function):
            def call(*args, **kwargs):
                if not function.endswith(("serve", "serves")):  # which say whether, and run nothing
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
    if op == "attribute":
        return ops.attribute(ids, weights, 1, num_experts)[1]
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
        if "sizes" in row:
            continue  # below
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


def of_sizes(which: str, device: str):
    """Forwards of sizes that a row of `environment.PARTS` names, and of sizes beyond them."""
    tokens = {" on Hopper, many tokens": 1024, ", E > 8": 80}.get(which, 64)
    experts = 12 if "E >" in which else 5
    wide, long = 96, 128

    def route(dtype=torch.bfloat16, tokens=tokens, experts=experts):
        x = make_x(tokens, wide, device, dtype)
        return ops.topk_route(x, make_weight(experts, wide, device).to(dtype), top_k=K)

    def mix(dtype=torch.bfloat16, tokens=tokens, experts=experts, grad=False):
        ids = some_ids(tokens, experts, K).to(device)
        weights = torch.rand(tokens, K, device=device)
        ranks = [0, *[3, 16, 0, 7, 32] * experts]
        if "Hopper" in which:  # one of larger rank, one full-size, the others by token
            ranks[2:4] = [80, "full"]
        sides = []
        for out, width in ((long, wide), (long, wide), (wide, long)):
            full = make_weight(out, width, device).to(dtype)
            kinds = {"full": full, 0: None}
            pairs = [kinds[r] if r in kinds else make_pair(out, width, r, device) for r in ranks]
            pairs = [tuple(t.to(dtype) for t in p) if isinstance(p, tuple) else p for p in pairs]
            sides.append([full, *pairs[1:experts]])
        x = make_x(tokens, wide, device, dtype).requires_grad_(grad)
        return ops.experts(x, ids, weights, *sides)

    return route, mix


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the library's part is on a GPU")
@pytest.mark.parametrize("part", environment.PARTS, ids=lambda part: part.op + part.which)
@pytest.mark.parametrize("name", ["", *backend.NAMES])
def test_the_library_runs_the_sizes_that_are_said_and_no_others(part, name, ran):
    def seen_of(call, **options):
        ran.clear()
        call(**options)
        seen = {stem: set(names) for stem, names in ran.items()}
        if part.inside and seen.get("experts") == {"triton"}:
            del seen["experts"]  # composes the library's steps, launches nothing itself
        return seen

    with backend.use(name) if name else contextlib.nullcontext():
        rows = {row["op"]: row for row in environment.kernels("cuda")}
        row = rows.get(part.op + part.which)
        with torch.no_grad():
            route, mix = of_sizes(part.which, "cuda")
            call = route if part.stem == "routing" else mix
            seen, wide = seen_of(call), seen_of(call, dtype=torch.float32)
            more = seen_of(call, tokens=65) if "up to" in part.which else {}
    said = dict.fromkeys(part.inside or (part.stem,), {"native"})
    if wide == said:  # what runs everything else is the library too
        assert seen == said
        return
    assert (seen == said) == (row is not None)
    if row is not None:
        stems = {row["stem"]: row["kernels"]} if not part.inside else row["inside"]
        assert seen == {stem: {kernels} for stem, kernels in stems.items()}
    assert more != said


@pytest.mark.parametrize(
    "part", [part for part in environment.PARTS if part.stem == "experts"], ids=lambda p: p.which
)
def test_forwards_ask_the_library_for_the_sizes_that_are_said(part, ran, monkeypatch):
    """Without a GPU: the forward asks as it does there, and the library's kernels do nothing."""
    pytest.importorskip("triton")
    nothing = {
        "decode": lambda x, *_: x,
        "hidden_sum": lambda x, gate, *_: (gate, None),
        "add_down": lambda base, *_: base.bfloat16(),
        "hidden": lambda gate, up, weights, plan, s, sides, *_: (
            gate, s.new_zeros(len(gate), sum(sides[2].padded_ranks(16)))
        ),
        "sum_rows": lambda *_: None,
        "gated_rows": lambda *_: None,
    }  # fmt: skip
    for stem in ("experts", "expert_major", "token_major", "grouped_gemm"):
        module = importlib.import_module(f"flexmore_kernels._native.{stem}")
        for name in set(vars(module)) & set(nothing):
            monkeypatch.setattr(module, name, nothing[name])
    chosen, narrow = backend.chosen, lambda device, dtype: dtype == torch.bfloat16
    own = lambda stem, device: "triton" if stem == "experts" else chosen(stem, device)
    monkeypatch.setattr(backend, "chosen", own)
    monkeypatch.setattr(backend, "library_runs", narrow)
    monkeypatch.setattr(backend, "hopper_runs", narrow)
    with torch.no_grad():
        of_sizes(part.which, "cpu")[1]()
    by_library = {stem for stem, names in ran.items() if "native" in names}
    assert by_library | {"routing", "permutation"} >= set(part.inside or ("experts",))
    assert by_library <= set(part.inside or ("experts",)), "or more should be said"
    assert {stem for stem, names in ran.items() if "triton" in names} <= {"experts"}


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
