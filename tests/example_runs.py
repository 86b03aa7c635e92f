"""Small runs of examples/train_expert.py, for its tests."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

import flexmore_kernels as fk
from flexmore_kernels import checkpoint

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
import run_model  # noqa: E402
import run_options  # noqa: E402
import run_report  # noqa: E402, F401 (for the tests)
import run_state  # noqa: E402, F401
import run_text  # noqa: E402, F401
import train_expert  # noqa: E402

SMALL = {"--layers": 2, "--hidden-size": 16, "--intermediate-size": 24, "--heads": 2, "--rank": 3,
         "--batch": 2, "--length": 12, "--steps": 8, "--router-steps": 6, "--save-every": 3,
         "--device": "cpu", "--learning-rate": 1e-2}  # fmt: skip


def words(**changed) -> list[str]:
    """The small run's options, with these in place of its own; None leaves one out."""
    options = SMALL | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return [f"{name}={value}" for name, value in options.items() if value is not None]


def train(text, out, *more, **changed):
    assert train_expert.main([text, str(out), *words(**changed), *more]) == 0
    return checkpoint.load_model(out / "model")


def left(out: Path) -> dict[str, object]:
    """Every byte that a run leaves, and of states, whose metadata has no order, all they hold."""
    found: dict[str, object] = {}
    for path in out.rglob("*"):
        if path.name.startswith("state-"):
            with safe_open(path, framework="pt") as opened:
                names = opened.keys()
                numbers = {n: opened.get_tensor(n).numpy().tobytes() for n in names}
                found[path.name] = (json.loads(opened.metadata()["run"]), numbers)
        elif path.is_file():
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


def start(**changed):
    """The model before the first step."""
    options = run_options.parse(["text", "out", *words(**changed)])
    torch.manual_seed(options.seed)
    return run_model.with_expert(
        run_model.small_decoder(options, "cpu", torch.float32), options.rank
    )


def write_text(path: Path) -> str:
    path.write_text("Low rank means less to read, and less to write. " * 40)
    return str(path)


def write_mixture(directory: Path) -> str:
    """Three experts with biases, top-2, of which one is full-size and one ragged."""
    config = fk.FlexMoREConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, expert_ranks=[0, 0, (2, 0, "full")], num_experts_per_tok=2,
        expert_bias=True,
    )  # fmt: skip
    torch.manual_seed(1)
    model = fk.FlexMoREForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif len(parameter) < 16:
                parameter.fill_(-0.1)
    checkpoint.save_checkpoint(directory, model.state_dict(), config.to_dict())
    return str(directory)


OWN_SIZES = dict.fromkeys(("layers", "hidden_size", "intermediate_size", "heads"))


@contextlib.contextmanager
def determinism_restored():
    """The script sets torch's ways for its process on a GPU; other tests want theirs."""
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_deterministic_debug_mode(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled
