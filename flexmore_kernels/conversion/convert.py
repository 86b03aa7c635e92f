"""From full-size experts to low-rank ones: a checkpoint's matrices one by one, a file a layer.

    W_e = W_0 + delta,   delta ~ b a,   a = s^(1/2) vt (r, in),   b = u s^(1/2) (out, r)

for each of gate, up and down of each expert beside the public one (FlexMoRE, arXiv 2602.08818, and
its authors' converter). At any time one layer's tensors are in memory, and one matrix's difference
in float64 with its decomposition. One decomposition serves every target, since factors are nested:
of each matrix those of the largest rank alone are kept, in place of the matrix, which is let go of
when it is done. What a target writes of them is copied, for one target at a time, when no matrix of
the source is left: that is the most there is where factors are smaller than what they stand for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint_folders import removed_if_bad
from ..checkpoint_layout import Layout, mlp_prefix
from ..checkpoint_writer import CheckpointWriter
from ..progress import Progress
from .matrices import (
    Key,
    SourceLayer,
    all_keys,
    keys_of,
    read_others,
    sizes_of,
    unit_of,
    units_of,
)
from .one_matrix import OneMatrix
from .recover import AnyRule, read_rule
from .report import Report
from .spectra import Say, Spectrum, all_spectra, forget
from .targets import Target
from .work import Work, prepare


def convert_checkpoint(
    source: str | os.PathLike | Layout,
    directory: str | os.PathLike,
    rule: str | int | AnyRule,
    *,
    method: str = "exact",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    activations: str | os.PathLike | None = None,
    compat: bool = False,
    say: Say | None = None,
) -> Report:
    """Convert the experts of a checkpoint to low-rank ones, by a rule.

    Args:
        source: a checkpoint of any kind that `read_layout` reads.
        directory: must not exist yet, or be empty. It appears when it is complete, with report.json
            and report.svg in it; the same call goes on after a kill.
        rule: see `rank_rules`; "numerical" beside those.
        method: "exact", or "randomized" (faster where ranks are small; rules that look at singular
            values still take those exactly).
        device: where the work is done; default: a GPU if there is one.
        dtype: of everything that is written; None keeps what is stored.
        activations: a file of second moments of the matrices' inputs; then the error of the
            outputs is what is made small.
        compat: write the padded form, for the authors' reader.
        say: takes a line of progress from time to time.

    Raises ValueError for a source, a rule or a directory that cannot be, naming it; OSError when
    there is no space left. What is written by then is taken up by the next call.
    """
    parsed = read_rule(rule)
    work = prepare(source, method, device, dtype, activations)
    check_rule(work, parsed)
    with ExitStack() as stack:
        target = open_target(stack, work, directory, parsed, compat)
        return run(work, [target], Path(directory), say)[0]


def check_rule(work: Work, rule: AnyRule) -> None:
    """ValueError for a rule that cannot be met, as far as that shows without singular values: so
    before there is anything on the disk.
    """
    experts = work.layout.config["num_experts"] - 1
    if rule.kind == "fixed" and max(1, experts) < len(rule.fixed):
        raise ValueError(
            f"rule: {rule.text!r} has ranks for {len(rule.fixed)} experts, and there are {experts} "
            "beside the public one; accepted: one rank, or one for each of them"
        )
    if not rule.needs_spectra:
        rule.ranks(dict.fromkeys(all_keys(work.layout)), sizes_of(work.layout))


def open_target(
    stack: ExitStack, work: Work, directory: str | os.PathLike, rule: AnyRule, compat: bool
) -> Target:
    """A target whose writer is open as long as `stack` is; of a fixed rule, with its ranks.

    Raises ValueError when the directory exists, or holds other work.
    """
    settings = {"rank": rule.text, **work.settings, "compat": compat}
    name = fingerprint_of(work, rule, compat)
    units = units_of(work.layout)
    writer = CheckpointWriter(directory, units, config=work.layout.config, fingerprint=name)
    stack.enter_context(writer)
    target = Target(work.layout, Path(directory), rule, settings, name, work.dtype, compat, writer)
    if not rule.needs_spectra:
        target.settle({})
    return target


def fingerprint_of(work: Work, rule: AnyRule, compat: bool) -> str:
    """Names what is written by a rule."""
    settings = {k: work.settings[k] for k in ("method", "dtype")}
    return work.fingerprint(work="convert", rank=rule.text, compat=compat, **settings)


def run(work: Work, targets: Sequence[Target], directory: Path, say: Say | None) -> list[Report]:
    """Write all targets; `directory` names the folder of the spectra, where any needs them all."""
    layout = work.layout
    first = [t for t in targets if t.needs_spectra_first and t.writer.remaining]
    name = f".{directory.name}.spectra-{work.fingerprint(work='spectra')}"
    plain, more = (directory.parent / f"{name}{end}" for end in ("", "-features"))
    # Those with features serve all rules; of a run that was killed, with other targets left, too.
    features = more.exists() or any(target.rule.needs_features for target in first)
    folder = more if features else plain
    spectra: Mapping[Key, Spectrum] = {}
    with removed_if_bad(*(target.writer.folder for target in targets)):
        if first:
            with removed_if_bad(folder):
                spectra = all_spectra(layout, folder, work.moments, work.device, say, features)
            _settle(first, spectra, folder, say)
        with removed_if_bad(folder):
            _write_all(work, targets, spectra, say)
    if say is not None and targets:
        say("checking and finishing")
    reports = [target.finish() for target in targets]
    for folder in (plain, more):
        forget(folder)
    return reports


def _settle(
    targets: Sequence[Target], spectra: Mapping[Key, Spectrum], folder: Path, say: Say | None
) -> None:
    try:
        for target in targets:
            target.settle(spectra)
    except ValueError:
        if say is not None:
            say(f"singular values stay in {folder}, for another rule and the same directory")
        raise


def _write_all(
    work: Work, targets: Sequence[Target], spectra: Mapping[Key, Spectrum], say: Say | None
) -> None:
    left = {unit for target in targets for unit in target.writer.remaining}
    layers = [n for n in range(len(work.layout.layer_ranks)) if unit_of(n) in left]
    progress = Progress(sum(len(keys_of(work.layout, layer)) for layer in layers), say)
    if unit_of(None) in left:
        _write_ends(work, _waiting(targets, None))
    for layer in layers:
        _convert_layer(work, _waiting(targets, layer), layer, spectra, progress)


def _write_ends(work: Work, targets: Sequence[Target]) -> None:
    """What is outside of the layers, gone from memory before the first of them is read."""
    start, tensors = time.monotonic(), read_others(work.layout, None)
    for target in targets:
        target.write(None, tensors, [], time.monotonic() - start)


def _waiting(targets: Sequence[Target], layer: int | None) -> list[Target]:
    return [target for target in targets if unit_of(layer) in target.writer.remaining]


def _convert_layer(
    work: Work,
    targets: Sequence[Target],
    layer: int,
    spectra: Mapping[Key, Spectrum],
    progress: Progress,
) -> None:
    start = time.monotonic()
    source = SourceLayer(work.layout, layer, work.device)
    tensors, matrices = make_layer(work, targets, source, spectra, progress)
    del source  # with what is left of it
    for target in targets:  # nothing but what is still to be written is held on to
        target.write(layer, tensors.pop(0), matrices.pop(0), time.monotonic() - start)


def make_layer(
    work: Work,
    targets: Sequence[Target],
    source: SourceLayer,
    spectra: Mapping[Key, Spectrum],
    progress: Progress,
) -> tuple[list[dict[str, Tensor]], list[list[dict]]]:
    """Of each target a layer's tensors, all of them views of the same, and its matrices' facts.

    Takes the experts' matrices out of `source` as they are done.
    """
    layer = source.layer
    shared = {f"{mlp_prefix(layer)}{name}": tensor for name, tensor in source.others().items()}
    shared |= read_others(work.layout, layer)
    tensors = [dict(shared) for _ in targets]
    matrices: list[list[dict]] = [[] for _ in targets]
    for key in keys_of(work.layout, layer):
        one = OneMatrix(work, source, key, spectra.get(key))
        for i, rank in enumerate(one.settle(targets)):
            kept, fields = one.store(rank, targets[i])
            tensors[i] |= {f"{mlp_prefix(layer)}{name}": tensor for name, tensor in kept.items()}
            matrices[i].append(fields)
        source.let_go(key)
        del one  # with its decomposition, before the next one's difference is made
        progress.done(1, str(key))
    return tensors, matrices
