"""The commands on checkpoints: what they print, their exit by ValueError, JSON for programs."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels import checkpoint
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.commands import densify, drop, inspect, merge, split

RANKS = (0, 3, (2, 0, "full"), 0)


@pytest.fixture
def directory(tmp_path):
    checkpoint.make_demo_checkpoint(
        tmp_path / "made", hidden_size=16, intermediate_size=24, num_layers=3, top_k=2,
        vocab_size=11, expert_ranks=RANKS,
    )  # fmt: skip
    return tmp_path / "made"


def run(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def pad(directory):
    """Expert 1 of layer 1, gate: one rank row more, zero."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.1.gate_proj_{}.weight"
    a, b = tensors[name.format("a")], tensors[name.format("b")]
    tensors[name.format("a")] = torch.cat([a, torch.zeros(1, 16)])
    tensors[name.format("b")] = torch.cat([b, torch.zeros(24, 1)], dim=1)
    save_file(tensors, path)


def test_inspect_prints_a_table(directory, capsys):
    pad(directory)
    assert run(inspect, directory) == 0
    printed = capsys.readouterr().out
    assert "flexmore, " in printed and "files, all there" in printed
    assert "3 layers, D = 16, F = 24, top-2 of 4 experts" in printed
    assert "and 160 of zero padding" in printed  # 16 + 24 numbers of 4 bytes
    rows = {line.split()[0] + line.split()[1]: line.split() for line in printed.splitlines()[4:6]}
    assert rows["expert0"] == ["expert", "0", "1", "2", "3"]
    assert rows["layers0-2"] == ["layers", "0-2", "full", "3", "2/0/full", "full"]
    # 3 D F; 3 * 3 (D + F); 2 (D + F) + D F; three layers
    assert ["parameters", "3.46", "k", "1.08", "k", "1.39", "k", "3.46", "k"] in [
        line.split() for line in printed.splitlines()
    ]
    assert "note: expert 1: zero rows of factors trimmed: rank 4 stored, rank 3" in printed


def test_inspect_json(directory, capsys):
    assert run(inspect, directory, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    layout = read_layout(directory)
    assert found["kind"] == "flexmore" and found["notes"] == []
    assert found["parameters"] * 4 == found["bytes"] == found["file_bytes"]
    assert found["parameters_by_dtype"] == {"F32": found["parameters"]}
    assert found["parameters_by_expert"][1] == 3 * 3 * 3 * (16 + 24)
    assert found["layer_expert_ranks"] == json.loads(json.dumps(layout.layer_ranks))


def test_inspect_finds_the_rank_of_what_was_stored_dense(tmp_path, capsys):
    pytest.importorskip("flexmore_kernels.conversion.numerical_rank")
    checkpoint.make_demo_checkpoint(
        tmp_path / "made", hidden_size=32, intermediate_size=48, num_layers=2, top_k=2,
        vocab_size=11, expert_ranks=(0, 3, 0), dtype=torch.float32,
    )  # fmt: skip
    assert run(densify, tmp_path / "made", tmp_path / "olmo", "--device", "cpu") == 0
    arguments = (tmp_path / "olmo", "--numerical-rank", "--device", "cpu")
    assert run(inspect, *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out.partition("bytes\n")[2])
    none = [None] * 3
    assert found["numerical_ranks"] == [[none, [3, 3, 3], none]] * 2
    assert run(inspect, *arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["layers", "0-1", "-", "3", "-"]


def test_split_drop_merge_densify(directory, tmp_path, capsys):
    assert run(split, directory, tmp_path / "parts") == 0
    parts = [tmp_path / "parts" / f"expert-{e}" for e in (1, 2, 3)]
    assert capsys.readouterr().out.count("flexmore, top-2 of 2 experts") == 3
    assert run(merge, *parts, tmp_path / "merged", "--top-k", "3") == 0
    assert "flexmore, top-3 of 4 experts" in capsys.readouterr().out
    assert run(drop, directory, tmp_path / "less", "--experts", "1,3") == 0
    assert "flexmore, top-2 of 2 experts" in capsys.readouterr().out
    assert run(densify, directory, tmp_path / "olmo", "--fused") == 0
    assert "flex_olmo_fused, top-2 of 4 experts" in capsys.readouterr().out
    assert run(drop, directory, tmp_path / "plain", "--experts", "3", "--compat") == 0
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["expert_ranks"] == [0, 3, 0] and "layer_expert_ranks" not in config


def test_bad_input_is_an_error_before_any_work(directory, tmp_path):
    with pytest.raises(ValueError, match="^experts: got 4; accepted: 1 to 3"):
        run(drop, directory, tmp_path / "less", "--experts", "1,4")
    with pytest.raises(ValueError, match="^directory: .* exists"):
        run(densify, directory, directory)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(merge, directory, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="^experts: got 'one', which is not here"):
        run(drop, directory, tmp_path / "less", "--experts", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
