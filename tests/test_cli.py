"""The command line: exit codes, what is printed, and that the demo can fail."""

from __future__ import annotations

import pytest

from flexmore_kernels import baselines, checkpoint, cli
from flexmore_kernels.testing import (
    CASE_IDS,
    CASES,
    assert_accurate,
    make_experts,
    make_routing,
    make_x,
    to_float64,
)
from reference import experts

RANKS = (0, 3, 1, 0, (2, 0, "full"), 16)


@pytest.fixture
def directory(tmp_path):
    checkpoint.make_demo_checkpoint(
        tmp_path / "made", hidden_size=24, intermediate_size=40, num_layers=2, expert_ranks=RANKS,
        top_k=3, vocab_size=8,
    )  # fmt: skip
    return str(tmp_path / "made")


def demo(directory, device, *more):
    return cli.main(["demo", directory, "--device", device, "--tokens", "20", *more])


def test_demo_passes(directory, device, capsys):
    assert demo(directory, device) == 0
    printed = capsys.readouterr().out
    assert "PASS: 2 of 2 layers are right." in printed
    for word in ("ours", "fair eager", "published", "dense FFN", "full 3 1 full 2/0/full 16"):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_demo_break_fails(directory, device, capsys):
    assert demo(directory, device, "--break") == 1
    printed = capsys.readouterr().out
    assert "FAIL: 0 of 2 layers are right." in printed
    assert "layer 0: output: " in printed and "times the allowed error" in printed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_demo_in_half_precision(directory, device, dtype):
    assert demo(directory, device, "--dtype", dtype) == 0
    assert demo(directory, device, "--dtype", dtype, "--break") == 1


def test_demo_in_float64(directory):
    assert demo(directory, "cpu", "--dtype", "float64") == 0


def test_demo_needs_two_experts_to_break(tmp_path, capsys):
    checkpoint.make_demo_checkpoint(
        tmp_path / "one", hidden_size=16, intermediate_size=24, num_layers=1, expert_ranks=(0, 2),
        top_k=1, vocab_size=8,
    )  # fmt: skip
    assert demo(str(tmp_path / "one"), "cpu", "--break") == 2
    assert "two low-rank experts" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["1", "2", "5"])
def test_demo_breaks_experts_that_tokens_chose(tmp_path, tokens):
    checkpoint.make_demo_checkpoint(
        tmp_path / "few", hidden_size=16, intermediate_size=24, num_layers=1, top_k=1, vocab_size=8,
        expert_ranks=(0, 3, 4, 5, 0, 0, 1, 2),
    )  # fmt: skip
    # 2 where no token chose a low-rank expert at all; never 0, as if nothing had been swapped.
    assert demo(str(tmp_path / "few"), "cpu", "--break", "--tokens", tokens) in (1, 2)


def test_bad_directory_is_named(tmp_path, capsys):
    assert cli.main(["demo", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--tokens", "0"], ["--dtype", "int8"], ["--device", "tpu"]])
def test_bad_option_is_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *option])
    assert stopped.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_inspect(directory, capsys):
    assert cli.main(["inspect", directory]) == 0
    assert "top-3 of 6 experts" in capsys.readouterr().out


def test_env(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed and "gated_mix" in printed


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
@pytest.mark.parametrize("name", ["fair_eager", "every_expert", "published"])
def test_baselines_compute_the_same(name, case):
    """A comparison is fair only with what is right; to bfloat16, since sums are in other orders."""
    arguments = (make_x(case.tokens, case.hidden), *make_routing(case))
    weights = make_experts(case)
    indices = (arguments[1], arguments[2])
    y = getattr(baselines, name)(arguments[0], *indices, *weights)
    exact = experts(*to_float64((*arguments, *weights)))
    assert_accurate(y.bfloat16(), exact, name=name)
