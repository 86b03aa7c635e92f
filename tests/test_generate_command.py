"""`flexmore generate`: text as it comes, experts of a request, ids without a tokenizer."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch

from flexmore_kernels import checkpoint
from flexmore_kernels.commands import generate
from flexmore_kernels.text import Pieces, ids_of, read_tokenizer

NEW = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("generate") / "made"
    checkpoint.make_demo_checkpoint(
        made, hidden_size=24, intermediate_size=40, num_layers=2, expert_ranks=(0, 3, 1, 0),
        top_k=2, vocab_size=256,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def with_text(directory):
    tokenizers = pytest.importorskip("tokenizers")
    # A token a byte.
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    other = directory.parent / "with_text"
    other.mkdir()
    for file in directory.iterdir():
        (other / file.name).symlink_to(file)
    made.save(str(other / "tokenizer.json"))
    return other


def run(directory, *words):
    parser = argparse.ArgumentParser()
    generate.add(parser)
    more = ("--device", "cpu", "--max-new-tokens", str(NEW))
    return generate.run(parser.parse_args([str(directory), *words, *more]))


def test_ids_of_one_prompt(directory, capsys):
    assert run(directory, "--ids", "5,17,3") == 0
    out, err = capsys.readouterr()
    model = checkpoint.load_model(directory)
    expected = model.generate(torch.tensor([[5, 17, 3]]), max_new_tokens=NEW)[0, 3:].tolist()
    assert ids_of(",".join(out.split())) == expected
    assert re.search(r"first token after \d+ ms \(3 tokens of prompt\); then [\d.]+ tokens/s", err)
    shares = [float(part) for part in re.findall(r": ([\d.]+) %", err)]
    assert len(shares) == 4 and sum(shares) == pytest.approx(200, abs=0.2)


def test_an_account_of_each_prompt(directory, tmp_path):
    path = tmp_path / "account.json"
    prompts = ("--ids", "5,17,3", "--ids", "9", "--experts=-1", "--experts=-2")
    assert run(directory, *prompts, "--account", str(path)) == 0
    account = json.loads(path.read_text())
    assert len(account["experts"]) == 4 and account["layers"] == 2
    first, second = account["requests"]
    assert (first["tokens"], second["tokens"]) == (3 + NEW - 1, 1 + NEW - 1)
    assert first["rows"][1] == 0 == second["rows"][2] and first["weight_sum"][1] == 0
    for one in (first, second):
        assert sum(one["rows"]) == 2 * 2 * one["tokens"]


def test_a_batch_with_experts_for_each_prompt(directory, capsys):
    prompts = ("--ids", "5,17,3", "--ids", "9")
    assert run(directory, *prompts, "--experts", "0,2", "--experts=-3,-1", "--active", "1") == 0
    out, err = capsys.readouterr()
    model = checkpoint.load_model(directory)
    for block in model.model.layers:
        block.mlp.top_k = 1
    for row, (ids, experts) in enumerate((([5, 17, 3], [0, 2]), ([9], [0, 2]))):
        mask = torch.zeros(4, dtype=torch.bool)
        mask[experts] = True
        alone = model.generate(torch.tensor([ids]), max_new_tokens=NEW, expert_mask=mask)
        shown = " ".join(map(str, alone[0, len(ids) :].tolist()))
        assert out.splitlines()[row] == f"[{row}] {shown} "
    assert "2 at once" in err and "1: 0.0 %" in err and "3: 0.0 %" in err
    run(directory, "--ids", "5,17,3", "--experts", "-3")
    assert "3: 0.0 %" in capsys.readouterr().err


def test_experts_by_name_at_a_lower_rank(directory, capsys):
    words = ("--ids", "5,17,3", "--experts", "base,expert-1", "--rank-limit", "expert-1=2")
    assert run(directory, *words) == 0
    out, err = capsys.readouterr()
    model, mask = checkpoint.load_model(directory), torch.tensor([True, True, False, False])
    asked = {"expert_mask": mask, "rank_limit": [None, 2, None, None], "max_new_tokens": NEW}
    expected = model.generate(torch.tensor([[5, 17, 3]]), **asked)[0, 3:].tolist()
    assert ids_of(",".join(out.split())) == expected and "expert-2: 0.0 %" in err


def test_text_comes_as_it_is(with_text, capsys):
    assert run(with_text, "héllo", "--temperature", "1.5", "--top-k", "50", "--seed", "3") == 0
    first = capsys.readouterr().out
    tokenizer = read_tokenizer(with_text)
    ids = torch.tensor([tokenizer.encode("héllo").ids])
    options = {"temperature": 1.5, "top_k": 50, "generator": torch.Generator().manual_seed(3)}
    found = checkpoint.load_model(with_text).generate(ids, max_new_tokens=NEW, **options)
    assert first == tokenizer.decode(found[0, ids.shape[1] :].tolist())
    run(with_text, "a", "bc")
    assert [line[:3] for line in capsys.readouterr().out.splitlines() if line[:1] == "["] == [
        "[0]",
        "[1]",
    ]


def test_pieces_are_whole_characters(with_text):
    tokenizer, text = read_tokenizer(with_text), "naïve ✓ text, 漢字\n🙂!"
    ids = tokenizer.encode(text).ids
    pieces = Pieces(tokenizer)
    shown = [pieces.add(token) for token in ids]
    assert "".join(shown) + pieces.rest() == text
    assert all("\ufffd" not in piece for piece in shown) and "" in shown
    broken = Pieces(tokenizer)
    assert "".join(map(broken.add, ids[:3])) + broken.rest() == "na\ufffd"


def test_an_end_of_text_ends_a_request(directory, tmp_path, capsys):
    import json

    model = checkpoint.load_model(directory)
    new = model.generate(torch.tensor([[5, 17, 3]]), max_new_tokens=NEW)[0, 3:].tolist()
    last = next(i for i in range(1, NEW) if new[i] not in new[:i])
    for file in directory.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": new[last]}))
    assert run(tmp_path, "--ids", "5,17,3") == 0
    assert capsys.readouterr().out.split() == [str(one) for one in new[:last]]


def test_speed_counts_the_tokens_of_those_that_go_on(monkeypatch):
    ticks = iter((0.0, 1.0, 2.0, 3.0, 4.0))
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(ticks))
    printer = generate._Printer([Pieces(), Pieces()], [7])
    clock = generate._Clock(printer)
    for column in ([1, 2], [7, 3], [7, 4], [7, 5]):
        clock(torch.tensor(column))
    # After the first step's: 2, 1 and 1 in three seconds.
    text = "first token after 1000 ms (9 tokens of prompt); then 1.3 tokens/s (1000.00 ms a step"
    assert clock.speed(2, 9).startswith(text)


REFUSED = [
    ((), "prompt: got none"),
    (("text", "--ids", "1"), "prompt: got none, or texts and --ids"),
    (("text",), "tokenizer.json: missing"),
    (("--ids", "1,x"), "ids: got '1,x'"),
    (("--ids", "1,256"), r"prompt 0: got \[1, 256\]"),
    (("--ids", "1", "--experts", "0,4"), "--experts: got '0,4'"),
    (("--ids", "1", "--experts", "0,-1"), "--experts: got '0,-1'"),
    (("--ids", "1", "--experts", "x,1"), "--experts: got 'x,1'; accepted: 0,2,5"),
    (("--ids", "1", "--experts=--1"), "--experts: got '--1'"),
    (("--ids", "1", "--experts", ""), "--experts: got ''"),
    (("--ids", "1", "--experts=-0,-1,-2,-3"), "--experts: got '-0,-1,-2,-3'; accepted: what"),
    (("--ids", "1", "--experts", "0", "--experts", "1"), "--experts: got 2; accepted: one, or"),
    (("--ids", "1", "--experts", "base,news"), "--experts: got 'base,news'; .* of base, expert-1"),
    (("--ids", "1", "--rank-limit", "1"), "--rank-limit: got '1'; accepted: EXPERT=RANK"),
    (("--ids", "1", "--rank-limit", "news=1"), "--rank-limit: got 'news=1'"),
    (
        ("--ids", "1", "--rank-limit", "1=4"),
        r"rank_limit\[1\]: got 4; accepted: an integer from 0 to 3",
    ),
    (("--ids", "1", "--active", "5"), "--active: got 5; accepted: 1 to 4"),
    (("--ids", "1", "--top-p", "0", "--temperature", "1"), "top_p: got 0.0"),
    (("--ids", "1", "--top-p", "0.9"), "--top-p: got 0.9 without --temperature"),
    (("--ids", "1", "--top-k", "5", "--temperature", "0"), "--top-k: got 5 without --temperature"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_generate_refuses(directory, words, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        run(directory, *words)


def test_a_broken_tokenizer_is_named(directory, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="^tokenizer.json: not a tokenizer"):
        read_tokenizer(tmp_path)
