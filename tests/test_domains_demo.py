"""The packaged mixture and what the demo shows of it.

Traps covered: a domain without a sample, a sample that its expert does not help, tokens counted to
another expert than the one that weighs most, a package without the `tokenizers` package.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from flexmore_kernels import cli, domains_demo
from flexmore_kernels.checkpoint import load_model
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.ops.routing import Routing

DOMAINS = ("scripture", "dictionary", "python", "docs", "proofs", "arithmetic", "sqlite")


def test_every_domain_is_shown_and_its_expert_matters(capsys):
    """Without its expert each domain's text is at least a tenth less likely a token: the least that
    was seen of the seven is 1.13 times the perplexity."""
    pytest.importorskip("tokenizers")
    shown = domains_demo.show(colour=False, new_tokens=4)
    assert tuple(one.domain for one in shown) == DOMAINS
    for one in shown:
        assert one.without > 1.1 * one.perplexity > 1.1
        assert len(one.continued) >= 4 and all(0 <= e < 8 for _, e in one.prompt + one.continued)
    samples = json.loads((domains_demo.DIRECTORY / domains_demo.PROMPTS).read_text())
    printed = capsys.readouterr().out
    for one in shown:
        assert "".join(text for text, _ in one.prompt) == samples[one.domain]["prompt"]
        assert f"{one.domain}: [" in printed and f"{one.without:.1f}" in printed
    assert "3 python" in printed and "\x1b[" not in printed


def test_colours_are_the_experts():
    pieces = [("a", 0), ("b", 1), ("c", 1), ("d", 2)]
    assert domains_demo._coloured(pieces, False) == "[0]a[1]bc[2]d"
    assert domains_demo._coloured(pieces, True) == (
        "a\x1b[36mb\x1b[0m\x1b[36mc\x1b[0m\x1b[33md\x1b[0m"
    )


def test_the_largest_weight_over_the_layers_wins():
    def routing(weights, indices):
        return Routing(torch.zeros(1, 2, 3), torch.tensor([weights]), torch.tensor([indices]))

    layers = [
        routing([[0.5, 0.4], [0.9, 0.0]], [[0, 2], [1, 3]]),
        routing([[0.3, 0.2], [0.2, 0.7]], [[2, 1], [0, 2]]),
    ]
    assert domains_demo._most(layers, 3).tolist() == [2, 1]


def test_the_packaged_checkpoint_is_whole_and_named():
    layout = read_layout(domains_demo.DIRECTORY)
    assert [card["name"] for card in layout.config["experts"]] == ["base", *DOMAINS]
    assert layout.notes == () and layout.config["num_experts_per_tok"] == 4
    size = sum(path.stat().st_size for path in domains_demo.DIRECTORY.iterdir())
    assert size < 8e6
    card = (domains_demo.DIRECTORY / "README.md").read_text()
    assert all(f"| {domain} |" in card for domain in DOMAINS)
    model = load_model(layout)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card


def test_demo_without_the_tokenizers_package_still_checks(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert cli.main(["demo", "--tokens", "8", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "PASS: 3 of 3 layers are right." in out and "pip install tokenizers" in err


def test_generate_takes_the_packaged_mixture(capsys, monkeypatch, tmp_path):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    words = ["generate", "default", "12 + 30 =", "--max-new-tokens", "3", "--device", "cpu"]
    assert cli.main([*words, "--experts=-arithmetic"]) == 0
    assert "arithmetic: 0.0 %" in capsys.readouterr().err
