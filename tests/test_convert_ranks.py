"""Which ranks a conversion gives: rounding of stored weights, budgets, factors in the source.

Traps: an expert that moved by less than its rounding, a source that has factors already, factors in
another dtype than the base, an expert that no token chose.
"""

from __future__ import annotations

import math

import pytest
import torch

from flexmore_kernels import checkpoint
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.conversion.activations import Activations
from flexmore_kernels.conversion.convert import convert_checkpoint
from flexmore_kernels.conversion.matrices import all_keys

D, F = 16, 24
SIZES = {"hidden_size": D, "intermediate_size": F, "num_layers": 1, "top_k": 2, "vocab_size": 11}


def delta(tensors, key):
    """W_e - W_0 of a low-rank expert, in float64."""
    a, b = (tensors[f"{key.name}_{side}.weight"].double() for side in "ab")
    return b @ a


def test_truncated_experts_are_recovered(tmp_path):
    """Experts of rank 3 that were written back dense in bfloat16: their noise is no rank."""
    sizes = SIZES | {"hidden_size": 48, "intermediate_size": 64, "num_layers": 1}
    checkpoint.make_demo_checkpoint(
        tmp_path / "low", expert_ranks=(0, 3, 0, 0), dtype=torch.bfloat16, **sizes
    )
    layout = read_layout(tmp_path / "low")
    tensors = checkpoint.read_tensors(layout)
    for key in (k for k in all_keys(layout) if k.expert == 1):
        base = tensors[f"model.layers.0.mlp.experts.0.{key.projection}_proj.weight"]
        dense = (base.double() + delta(tensors, key)).bfloat16()
        tensors[f"{key.name}.weight"] = dense
        for side in "ab":
            del tensors[f"{key.name}_{side}.weight"]
        # And one that is the public expert but for a last bit here and there: no rank at all.
        moved = base + (torch.rand(base.shape) < 0.03) * base.abs() * 2.0**-8
        tensors[f"{key.name}.weight".replace("experts.1.", "experts.3.")] = moved.bfloat16()
    config = layout.config | {"expert_ranks": [0, 0, 0, 0]}
    checkpoint.save_checkpoint(tmp_path / "dense", tensors, config)
    for rule in ("numerical", "params:48000"):
        report = convert_checkpoint(tmp_path / "dense", tmp_path / rule[:6], rule)
        assert [m.rank for m in report.select(expert=1)] == [3] * 3
        assert [m.numerical_rank for m in report.select(expert=1)] == [3] * 3
        assert [m.numerical_rank for m in report.select(expert=3)] == [0] * 3
        assert report.relative_error(expert=1) < 0.05
        # Where nothing shows a truncation, nothing is lost.
        if rule == "numerical":
            assert [m.rank for m in report.select(expert=2)] == ["full"] * 3
            assert [m.rank for m in report.select(expert=3)] == ["full"] * 3
    # A fixed rank is obeyed, noise or not.
    report = convert_checkpoint(tmp_path / "dense", tmp_path / "fixed", 7)
    assert {m.rank for m in report.matrices} == {7}


@pytest.mark.parametrize("rule", ["energy:0.95", "naive", "numerical", "params:34000"])
def test_small_training_is_no_rounding(tmp_path, rule):
    """An expert a last bit of bfloat16 away from the base: all of its difference may be meant."""
    sizes = SIZES | {"hidden_size": 48, "intermediate_size": 64}
    checkpoint.make_demo_checkpoint(
        tmp_path / "made", expert_ranks=(0, 0), dtype=torch.bfloat16, **sizes
    )
    layout = read_layout(tmp_path / "made")
    tensors = checkpoint.read_tensors(layout)
    for key in all_keys(layout):
        base = tensors[f"model.layers.0.mlp.experts.0.{key.projection}_proj.weight"].float()
        moved = base * (1 + 0.4 * 2.0**-8 * torch.randn(base.shape))
        tensors[f"{key.name}.weight"] = moved.bfloat16()
    checkpoint.save_checkpoint(tmp_path / "near", tensors, layout.config)
    report = convert_checkpoint(tmp_path / "near", tmp_path / "out", rule)
    assert [m.numerical_rank for m in report.matrices] == [0] * 3
    for matrix in report.matrices:
        if rule == "numerical":
            assert (matrix.rank, matrix.error) == ("full", 0.0)
        elif rule == "energy:0.95":
            assert matrix.dropped <= math.sqrt(0.05) * matrix.norm
        else:
            assert matrix.rank == "full" or matrix.rank > 1


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("kind", ["params", "bytes"])
def test_budget_is_kept_where_the_source_has_factors(tmp_path, kind, compat):
    """Rank 14 of 9.6, above which factors cost more than the matrix; and factors of another dtype
    than the base's.
    """
    checkpoint.make_demo_checkpoint(
        tmp_path / "made", expert_ranks=(0, 14, 14, 0), dtype=torch.bfloat16, **SIZES
    )
    layout = read_layout(tmp_path / "made")
    tensors = checkpoint.read_tensors(layout)
    for name in tensors:
        if name.endswith(("_a.weight", "_b.weight")):
            tensors[name] = tensors[name].float()
    checkpoint.save_checkpoint(tmp_path / "source", tensors, layout.config)
    unit = 1 if kind == "params" else 4
    least = unit * sum(t.numel() for n, t in tensors.items() if ".experts.1" not in n)
    tried = met = 0
    for budget in range(least - unit * 5000, least + unit * 4000, unit * 900):
        out = tmp_path / str(budget)
        tried += 1
        try:
            report = convert_checkpoint(tmp_path / "source", out, f"{kind}:{budget}", compat=compat)
        except ValueError as error:
            assert "the least is" in str(error) or (compat and "padded" in str(error))
            continue
        met += 1
        size = report.after.parameters if kind == "params" else report.after.bytes
        assert size <= budget
        files = out.glob("*.safetensors")
        assert kind == "params" or sum(f.stat().st_size for f in files) > size
    assert tried == 10 and met >= (1 if compat else 4)


def test_expert_that_no_token_chose_has_weights_like_the_others(tmp_path):
    """Two equal experts, one never chosen: a budget and the ranks by energy treat them alike."""
    checkpoint.make_demo_checkpoint(tmp_path / "made", expert_ranks=(0, 0, 0), **SIZES)
    layout = read_layout(tmp_path / "made")
    tensors = checkpoint.read_tensors(layout)
    for name in [n for n in tensors if ".experts.2." in n]:
        tensors[name] = tensors[name.replace(".experts.2.", ".experts.1.")].clone()
    checkpoint.save_checkpoint(tmp_path / "source", tensors, layout.config)
    wide = 1e-4 * (torch.rand(F) + 0.1)  # small, as real ones are: unweighted s would outweigh it
    inputs, hidden = "layers.0.inputs", "layers.0.experts.{}.hidden"
    means = {inputs: 1e-4 * torch.eye(D), hidden.format(1): wide, hidden.format(2): 0 * wide}
    tokens = {inputs: 9, hidden.format(1): 9, hidden.format(2): 0}
    Activations(means, tokens).save(tmp_path / "moments")
    report = convert_checkpoint(
        tmp_path / "source", tmp_path / "out", "params:4000", activations=tmp_path / "moments"
    )
    ranks = [[m.rank for m in report.select(expert=e, projection="down")] for e in (1, 2)]
    # Equal to whole ranks: of equal gains the last one affordable is one expert's alone.
    assert abs(ranks[0][0] - ranks[1][0]) <= 1
    tokens[hidden.format(1)] = 0
    Activations(means, tokens).save(tmp_path / "none")
    with pytest.raises(ValueError, match="no token chose"):
        convert_checkpoint(tmp_path / "source", tmp_path / "x", 4, activations=tmp_path / "none")


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_error_of_factors_that_become_full_size(tmp_path, dtype):
    """One full-size matrix makes all of its expert full-size in the padded form, round(W_0 + B A):
    the rounding is an error.
    """
    checkpoint.make_demo_checkpoint(
        tmp_path / "source", expert_ranks=(0, (3, 3, "full")), dtype=torch.bfloat16, **SIZES
    )
    report = convert_checkpoint(
        tmp_path / "source", tmp_path / "out", "fixed:full", compat=True, dtype=dtype
    )
    before, after = (checkpoint.read_tensors(read_layout(tmp_path / d)) for d in ("source", "out"))
    for matrix, key in zip(report.matrices, all_keys(read_layout(tmp_path / "out")), strict=True):
        base = before[f"model.layers.0.mlp.experts.0.{key.projection}_proj.weight"].double()
        stored = after[f"{key.name}.weight"].double() - base
        low = key.projection != "down"
        assert matrix.rank == "full" and (matrix.error > 0 or not low)
        if low:
            assert matrix.error == pytest.approx(float((delta(before, key) - stored).norm()))
