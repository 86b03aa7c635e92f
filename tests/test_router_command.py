"""`flexmore embed` and `flexmore router`: each --init against the functions it calls, what is
written whole or not at all, and everything beside the routers, to the bit.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

from flexmore_kernels import FlexMoREConfig, FlexMoREForCausalLM
from flexmore_kernels.base_fingerprint import of_checkpoint
from flexmore_kernels.checkpoint import (
    load_model,
    make_demo_checkpoint,
    read_tensors,
    save_checkpoint,
)
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.checkpoint_writer import CheckpointWriter
from flexmore_kernels.commands import embed, router
from flexmore_kernels.domain_embedding import HashingEmbedder, domain_embedding, load_embeddings
from flexmore_kernels.router_inputs import layers_of, padded
from flexmore_kernels.router_ridge import RidgeStatistics, from_ridge
from flexmore_kernels.router_rows import from_hidden, from_prompts
from flexmore_kernels.router_tune import tune
from flexmore_kernels.text import read_tokenizer

D, NAMES = 16, ("base", "math", "code", "law/2")
TEXTS = {
    "base": "the cat sat\n\non the mat, and slept", "math": "1 + 1 = 2\n\n3 * 7 = 21\n\n9 - 4",
    "code": "def f(x):\n    return x\n\nfor i in y: pass", "law/2": "Whereas the party\n\nhereto",
}  # fmt: skip


def run(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def name_experts(directory, **more):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"experts": [{"name": n} for n in NAMES]} | more
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with a byte-level tokenizer, and a text of each expert beside it."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("made")
    make_demo_checkpoint(
        folder / "model", hidden_size=D, intermediate_size=24, num_layers=2, top_k=2,
        vocab_size=260, expert_ranks=(0, 3, 0, 2),
    )  # fmt: skip
    name_experts(folder / "model")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    for name, text in TEXTS.items():
        (folder / f"{name[:3]}.txt").write_text(text)
    return folder


def texts(made):
    return [f"{name}={made}/{name[:3]}.txt" for name in TEXTS]


def ids_of(made):
    tokenizer = read_tokenizer(made / "model")
    return {n: [tokenizer.encode(d).ids for d in text.split("\n\n")] for n, text in TEXTS.items()}


def check_written(out, model, made):
    """`out` has the model's routers, and else what the source has, to the bit."""
    old, new = read_layout(made / "model"), read_layout(out)
    before, after = read_tensors(old), read_tensors(new)
    assert before.keys() == after.keys()
    live = model.state_dict()
    for name, tensor in after.items():
        right = live[name].to(tensor.dtype) if ".gate." in name else before[name]
        assert torch.equal(tensor, right), name
        assert ".gate." not in name or not torch.equal(tensor, before[name])
    assert (out / "tokenizer.json").read_text() == (made / "model/tokenizer.json").read_text()
    drop = ("auto_map", "architectures")
    configs = [{k: v for k, v in x.config.items() if k not in drop} for x in (old, new)]
    assert configs[0] == configs[1]


def test_embed_then_router(made, tmp_path, capsys):
    file = tmp_path / "e.safetensors"
    assert run(embed, *texts(made), "--size", D, "--out", file) == 0
    printed = capsys.readouterr().out
    assert "4 embeddings of 16 numbers" in printed and "math       3 documents" in printed
    found = load_embeddings(file)
    for name, text in TEXTS.items():
        right = domain_embedding(text.split("\n\n"), HashingEmbedder(D))
        assert torch.equal(found[name], right)
    assert run(router, made / "model", tmp_path / "out", "--init", "embeddings",
               "--embeddings", file) == 0  # fmt: skip
    assert "math: rows of length" in capsys.readouterr().out
    model = load_model(made / "model")
    for layer in layers_of(model):
        layer.gate.weight.data = torch.stack([found[name] for name in NAMES])
    check_written(tmp_path / "out", model, made)


def test_rows_from_prompts(made, tmp_path):
    given = {"1": ["2 + 2", "seven"], "code": ["import os"], "base": ["a story", "of old"]}
    (tmp_path / "p.json").write_text(json.dumps(given))
    assert run(router, made / "model", tmp_path / "out", "--init", "prompts", "--prompts",
               tmp_path / "p.json", "--experts", "2,math") == 0  # fmt: skip
    tokenizer = read_tokenizer(made / "model")
    ids = {n: [tokenizer.encode(t).ids for t in own] for n, own in given.items()}
    model = load_model(made / "model")
    from_prompts(model, {1: ids["1"], 2: ids["code"], 0: ids["base"]}, experts=[1, 2])
    check_written(tmp_path / "out", model, made)


def test_rows_from_hidden_states(made, tmp_path):
    assert run(router, made / "model", tmp_path / "out", "--init", "hidden", "--texts",
               *texts(made), "--through", "own", "--top-k", 3) == 0  # fmt: skip
    model = load_model(made / "model")
    from_hidden(model, ids_of(made), through="own")
    written = read_layout(tmp_path / "out")
    assert written.config["num_experts_per_tok"] == 3
    for n, layer in enumerate(layers_of(model)):
        name = f"model.layers.{n}.mlp.gate.weight"
        assert torch.equal(read_tensors(written, names=[name])[name], layer.gate.weight)


def test_owners_send_statistics_and_no_text(made, tmp_path, capsys):
    for text in texts(made):
        assert run(router, made / "model", "--init", "ridge", "--texts", text,
                   "--save-statistics", tmp_path / "stats") == 0  # fmt: skip
    assert "law-2.safetensors: of 23 tokens" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]
    files = [f"{name}={tmp_path}/stats/{name.replace('/', '-')}.safetensors" for name in NAMES]
    assert run(router, made / "model", tmp_path / "out", "--init", "ridge", "--statistics",
               *files) == 0  # fmt: skip
    assert run(router, made / "model", tmp_path / "mixed", "--init", "ridge", "--statistics",
               *files[:2], "--texts", *texts(made)[2:]) == 0  # fmt: skip
    model = load_model(made / "model")
    base = of_checkpoint(made / "model")
    statistics = {
        name: RidgeStatistics.collect(model, own, base=base, expert=name)
        for name, own in ids_of(made).items()
    }
    stored = {n: RidgeStatistics.load(file.partition("=")[2]) for n, file in zip(NAMES, files,
              strict=True)}  # fmt: skip
    for name, one in statistics.items():
        assert stored[name].tokens == one.tokens and stored[name].base == base
        for mine, theirs in zip(stored[name].layers, one.layers, strict=True):
            assert all(torch.equal(a, b.float()) for a, b in zip(mine, theirs, strict=True))
    from_ridge(model, stored)
    check_written(tmp_path / "out", model, made)
    # Of a text that is here, what is in memory is not rounded to float32.
    from_ridge(model, statistics | {name: stored[name] for name in NAMES[:2]})
    check_written(tmp_path / "mixed", model, made)


def test_tuned_rows(made, tmp_path, capsys):
    options = ("--steps", 3, "--seed", 5, "--batch", 2, "--length", 8)
    assert run(router, made / "model", tmp_path / "out", "--init", "tune", *options,
               "--texts", *texts(made)) == 0  # fmt: skip
    assert "3 steps: loss" in capsys.readouterr().out
    documents = [ids for own in ids_of(made).values() for ids in own]
    pieces = [torch.tensor(ids[i : i + 8]) for ids in documents for i in range(0, len(ids) - 1, 8)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [pieces[i] for i in order]
    batches = [padded(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    model = load_model(made / "model")
    tune(model, batches, 3, seed=5)
    check_written(tmp_path / "out", model, made)


def test_a_kill_leaves_nothing_and_is_taken_up(made, tmp_path, monkeypatch):
    given = (made / "model", tmp_path / "out", "--init", "hidden", "--texts", *texts(made))
    write, done = CheckpointWriter.write, []

    def second(self, unit, *rest):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(unit)
        return write(self, unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", second)
        with pytest.raises(KeyboardInterrupt):
            run(router, *given)
    assert not (tmp_path / "out").exists()
    assert run(router, *given) == 0
    model = load_model(made / "model")
    from_hidden(model, ids_of(made))
    check_written(tmp_path / "out", model, made)
    with pytest.raises(ValueError, match="exists; accepted: a new or an empty directory"):
        run(router, *given)


def test_a_projected_router_s_embeddings(made, tmp_path):
    model = load_model(made / "model")
    config = {"router": "projected", "domain_embedding_size": 5, "projector_size": 6}
    other = FlexMoREForCausalLM(FlexMoREConfig.from_dict(model.config.to_dict() | config))
    save_checkpoint(tmp_path / "nexus", other.state_dict(), other.config.to_dict())
    file = tmp_path / "e.safetensors"
    run(embed, *texts(made), "--size", 5, "--out", file)
    run(router, tmp_path / "nexus", tmp_path / "out", "--init", "embeddings", "--embeddings", file)
    found, given = read_tensors(read_layout(tmp_path / "out")), load_embeddings(file)
    for name, tensor in read_tensors(read_layout(tmp_path / "nexus")).items():
        if name.endswith("domain_embeddings"):
            assert torch.equal(found[name], torch.stack([given[name] for name in NAMES]))
        else:
            assert torch.equal(found[name], tensor)
    with pytest.raises(ValueError, match="router: got 'projected'"):
        run(router, tmp_path / "nexus", tmp_path / "no", "--init", "ridge", "--statistics",
            f"1={tmp_path}/none")  # fmt: skip


def test_wide_rows_survive_a_narrow_model(made, tmp_path):
    """What is stored in float64 and not written keeps its bits, also where the model has fewer."""
    tensors = load_model(made / "model", dtype=torch.float64).state_dict()
    for name in tensors:
        if ".gate." in name:
            tensors[name] += 1e-12
    config = json.loads((made / "model/config.json").read_text())
    save_checkpoint(tmp_path / "wide", tensors, config)
    (tmp_path / "wide/tokenizer.json").write_text((made / "model/tokenizer.json").read_text())
    run(router, tmp_path / "wide", tmp_path / "out", "--init", "hidden", "--texts", *texts(made),
        "--experts", "math", "--dtype", "float32")  # fmt: skip
    for name, tensor in read_tensors(read_layout(tmp_path / "out")).items():
        same = torch.equal(tensor, tensors[name])
        if ".gate." in name:
            rest = [0, 2, 3]
            assert not same and torch.equal(tensor[rest], tensors[name][rest])
            assert tensor.dtype == torch.float64
        else:
            assert same


@pytest.mark.parametrize(
    "options, words",
    [
        (["--init", "hidden"], "--texts: got none; --init hidden needs it"),
        (["--init", "ridge"], "--init ridge needs one of them"),
        (["--init", "prompts", "--steps", "3"], "--steps: got one with --init prompts"),
        (["--init", "ridge", "--statistics", "math"], "--statistics: got 'math'"),
        (["--init", "ridge", "--statistics", "a=b", "a=c"], "got 'a' twice"),
        (["--init", "ridge", "--statistics", "1=b", "--save-statistics", "d"], "with --texts"),
        (["--init", "hidden", "--texts", "art=x"], "--texts: got 'art'.*law/2"),
        (["--init", "hidden", "--texts", "1=x", "--top-k", "5"], "top_k: got 5; accepted: .* 4"),
        (["--init", "embeddings", "--embeddings", "{made}/math.npy"], "got width 3"),
        (["--init", "prompts", "--prompts", "{made}/mat.txt"], "is no JSON"),
        (["--init", "prompts", "--prompts", "{made}/list.json"], "accepted: {name: .texts.}"),
    ],
)
def test_bad_options(made, tmp_path, options, words):
    np.save(made / "math.npy", np.ones(3))
    (made / "list.json").write_text('{"math": "text"}')
    options = [option.format(made=made) for option in options]
    with pytest.raises(ValueError, match=words):
        run(router, made / "model", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_without_out_there_is_something_else_to_write(made):
    with pytest.raises(ValueError, match="OUT: got none; accepted: a new directory, or"):
        run(router, made / "model", "--init", "hidden", "--texts", *texts(made))


def test_bad_options_of_embed(made, tmp_path, monkeypatch):
    out = ["--out", tmp_path / "e.safetensors"]
    for given, words in (
        (["math"], "NAME=PATH: got 'math'"),
        ([f"a={made}/mat.txt", f"a={made}/mat.txt"], "got 'a' twice"),
        ([f"a={made}/mat.txt", "--size", 3, "--sentence-transformer", "x"], "--size: got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            run(embed, *given, *out)
    with pytest.raises(FileNotFoundError):
        run(embed, "a=none", *out)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        run(embed, f"a={made}/mat.txt", "--out", tmp_path / "e.npy")
    assert list(tmp_path.iterdir()) == []
