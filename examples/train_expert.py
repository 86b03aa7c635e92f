"""Train a low-rank expert on a text, beside a model that stays as it is; then tune the router.

    python examples/train_expert.py TEXT OUT [--checkpoint DIR] [--rank 16] ...

FlexOlmo's recipe (arXiv 2507.07024, section 3), with a low-rank expert in place of a full-size one:

1. The expert in isolation: the public expert and the new one are active for every token (2 of 2);
   the new expert's factors and its row of the router are trained, all else is frozen.
2. The router: all experts are frozen, all rows of the router are trained, on the whole mixture.

Stop it when you like, or let it be killed: the same command goes on where the last checkpoint was,
to the same final bits. README.md beside this file has commands; run_state.py says what is kept.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import run_options
import torch
from run_model import UNFINISHED, small_decoder, with_expert, write_result
from run_report import Bar, write_curves
from run_state import RunFolder, State
from run_text import BYTES, batch_of, contents, read_ids
from torch import Tensor
from torch.nn import functional as F

import flexmore_kernels as fk
from flexmore_kernels.checkpoint import load_model
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.checkpoint_writer import fingerprint
from flexmore_kernels.text import TOKENIZER_FILE, read_tokenizer


class Stage(NamedTuple):
    """Which parameters are trained, on which ids, and how.

    mask: bool (E,), the experts that are there; None: all. own: the expert whose row of the router
    is trained, and no other; None: all rows are. balance: the load-balancing loss's share.
    """

    name: str
    trained: list[str]
    ids: Tensor
    steps: int
    rate: float
    top_k: int
    mask: Tensor | None
    own: int | None
    balance: float


def stages_of(model, options, texts: tuple[Tensor, Tensor], new: int | None) -> list[Stage]:
    """The expert's stage, if there is a new one, and the router's, if it is to be tuned."""
    names = [name for name, _ in model.named_parameters()]
    router = [name for name in names if ".mlp.gate." in name]
    stages = []
    if new is not None:
        own = [name for name in names if f".mlp.experts.{new}." in name]
        mask = torch.zeros(new + 1, dtype=torch.bool, device=options.device)
        mask[[0, new]] = True
        stages.append(Stage(
            "expert", own + router, texts[0], options.steps, options.learning_rate,
            top_k=2, mask=None if new == 1 else mask, own=new, balance=0.0,
        ))  # fmt: skip
    if options.router_steps:
        stages.append(Stage(
            "router", router, texts[1], options.router_steps, options.router_learning_rate,
            top_k=model.config.num_experts_per_tok, mask=None, own=None, balance=options.balance,
        ))  # fmt: skip
    return stages


def losses_of(model, stage: Stage, z_loss: float, batch: tuple[Tensor, Tensor]):
    """(what is minimised, the text's own loss) of a batch."""
    inputs, targets = batch
    with model.routings() as seen:
        logits = model(inputs, expert_mask=stage.mask)
    text = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    layers = [block.mlp for block in model.model.layers]
    router = [routing.logits for routing in seen]
    about = {"bias": [layer.gate.expert_bias for layer in layers], "mask": stage.mask}
    total = text
    if z_loss:
        total = total + z_loss * fk.ops.router_z_loss(router, **about)
    if stage.balance:
        ids, scoring = [routing.indices for routing in seen], layers[0].scoring
        even = fk.ops.load_balancing_loss(router, ids, scoring=scoring, **about)
        total = total + stage.balance * even
    return total, text.detach()


def rate_at(step: int, stage: Stage, options) -> float:
    """The learning rate of a step, counted from 0."""
    rate = stage.rate * min(1.0, (step + 1) / (options.warmup + 1))
    if options.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return rate


class Run:
    """The stages, one after the other, from the newest state on."""

    def __init__(self, model, stages: Sequence[Stage], options, folder: RunFolder) -> None:
        self.model, self.stages, self.options, self.folder = model, stages, options, folder
        names = {name for stage in stages for name in stage.trained}
        self.trained = {n: p for n, p in model.named_parameters() if n in names}
        for parameter in self.trained.values():  # what a step changes, bfloat16 would round away
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(wide)
        self.losses: list[list[float]] = [[] for _ in stages]

    def train(self, state: State | None) -> None:
        first = 0
        if state is not None:
            first = state.stage
            for name, parameter in self.trained.items():
                parameter.data.copy_(state.tensors[f"model/{name}"])
            for number in range(first + 1):
                self.losses[number] = state.tensors[f"loss/{number}"].tolist()
            say(f"going on after step {state.step} of the {self.stages[first].name}")
        for number in range(first, len(self.stages)):
            self._train(number, state if number == first else None)

    def _train(self, number: int, state: State | None) -> None:
        stage, options = self.stages[number], self.options
        trained = {name: self.trained[name] for name in stage.trained}
        self.model.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_()
        for block in self.model.model.layers:
            block.mlp.top_k, block.mlp.recompute = stage.top_k, options.recompute
        optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), weight_decay=0.0)
        if state is not None:
            restore(optimizer, trained, state.tensors)
        first = state.step if state is not None else 0
        bar = Bar(stage.name, first, stage.steps, options.batch * options.length)
        fresh: list[Tensor] = []  # losses that were not waited for
        for step in range(first, stage.steps):
            batch = batch_of(stage.ids, options.batch, options.length, options.seed, number, step)
            batch = tuple(part.to(options.device) for part in batch)
            total, loss = losses_of(self.model, stage, options.z_loss, batch)
            optimizer.zero_grad()
            total.backward()
            if stage.own is not None:
                self._keep_other_rows(stage.own)
            torch.nn.utils.clip_grad_norm_(trained.values(), options.clip)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, stage, options)
            optimizer.step()
            fresh.append(loss)
            bar.step(loss)
            if (step + 1) % options.save_every == 0 or step + 1 == stage.steps:
                self.losses[number] += torch.stack(fresh).tolist()
                fresh.clear()
                self._save(number, step + 1, optimizer, trained)

    def _keep_other_rows(self, own: int) -> None:
        """No gradient for the rows of the router that other experts own: AdamW, without weight
        decay, leaves them as they are, to the bit."""
        for block in self.model.model.layers:
            gate = block.mlp.gate
            gate.weight.grad[:own] = 0
            if gate.expert_bias is not None:
                gate.expert_bias.grad[: own - 1] = 0

    def _save(self, number: int, step: int, optimizer, trained: dict[str, Tensor]) -> None:
        bad = [i for i, loss in enumerate(self.losses[number], 1) if not math.isfinite(loss)]
        if bad:
            raise ValueError(
                f"loss: not finite at step {bad[0]} of the {self.stages[number].name}; the last "
                "checkpoint is from before; accepted: a smaller learning rate, in a new directory"
            )
        tensors = {f"model/{name}": p for name, p in self.trained.items()}
        for name, parameter in trained.items():
            tensors |= {f"{k}/{name}": value for k, value in optimizer.state[parameter].items()}
        for i, losses in enumerate(self.losses[: number + 1]):
            tensors[f"loss/{i}"] = torch.tensor(losses, dtype=torch.float64)
        self.folder.save(number, step, tensors)
        self.write_curves()

    def write_curves(self) -> None:
        names = [stage.name for stage in self.stages]
        write_curves(self.folder.directory, names, self.losses)


def restore(optimizer, trained: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """AdamW's averages and counts, as `Run._save` wrote them."""
    found = optimizer.state_dict()
    for i, name in enumerate(trained):
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
        found["state"][i] = {key: tensors[f"{key}/{name}"] for key in keys}
    optimizer.load_state_dict(found)


def say(text: str) -> None:
    print(f"train_expert: {text}", file=sys.stderr, flush=True)


def read_texts(options, tokenizer, vocabulary: int, settings: dict) -> tuple[Tensor, Tensor]:
    """Ids for the expert and for the router; what they are goes into the settings."""
    texts = []
    for name, path in (("text", options.text), ("--router-text", options.router_text)):
        if path is not None:
            texts.append(read_ids(Path(path), tokenizer, vocabulary, options.length, name))
            settings[name] = contents(texts[-1])
    return texts[0], texts[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on; ValueError names what is wrong."""
    options = run_options.parse(arguments)
    if options.device == "cuda":  # for equal bits: some of torch's ways are quicker, but not that
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    settings, layout, tokenizer, vocabulary = run_options.settings(options), None, None, BYTES
    if options.checkpoint is not None:
        layout = read_layout(options.checkpoint)
        settings["--checkpoint"] = f"{options.checkpoint}, {fingerprint([layout])}"
        vocabulary = layout.config["vocab_size"]
        if (layout.directory / TOKENIZER_FILE).exists():
            instead = f"a --checkpoint without {TOKENIZER_FILE}, whose ids are bytes"
            tokenizer = read_tokenizer(layout.directory, argument="text", instead=instead)
    texts = read_texts(options, tokenizer, vocabulary, settings)
    folder = RunFolder(Path(options.out), settings, run_options.machine(options), say)
    try:
        state = folder.newest()
        if not (folder.directory / "model").exists():
            train(options, folder, state, layout, texts, tokenizer is None)
        elif state is None:
            raise ValueError(
                f"out: {folder.directory} has a model; accepted: a new directory, or a run's"
            )
        else:  # a kill just before the end may have left it
            shutil.rmtree(folder.directory / UNFINISHED, ignore_errors=True)
    finally:
        folder.close()
    say(f"{folder.directory}/model: a FlexMoRE checkpoint, for `flexmore generate`")
    return 0


def train(options, folder: RunFolder, state, layout, texts, bytewise: bool) -> None:
    """Make or load the model, train it, write it."""
    dtype, new = getattr(torch, options.dtype), None
    torch.manual_seed(options.seed)  # of what is made here, before any step
    if layout is None:
        model = small_decoder(options, options.device, dtype)
    else:
        model = load_model(layout, options.device, dtype)
    if options.steps:
        new = model.config.num_experts
        model = with_expert(model, options.rank)
    config = model.config
    if options.top_k is not None:
        config.num_experts_per_tok = options.top_k
    elif new is not None:
        config.num_experts_per_tok = max(2, config.num_experts_per_tok)
    if config.num_experts < 2 or config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"--top-k: got {config.num_experts_per_tok} of {config.num_experts} experts; accepted: "
            "1 to as many as there are, and two experts or more"
        )
    run = Run(model, stages_of(model, options, texts, new), options, folder)
    run.train(state)
    run.write_curves()
    write_result(model, folder.directory, dtype, new, options, bytewise)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"train_expert: {error}")
    except KeyboardInterrupt:
        sys.exit("train_expert: stopped; the same command goes on from the last checkpoint")
