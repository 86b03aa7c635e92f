"""Times a whole model: a long prompt, decoding step by step, `generate`; ours beside others.

    python -m benchmarks.generation               # four minutes on an H100
    python -m benchmarks.generation --device cpu  # a small model

Four layers of FlexOlmo-7x7B's width, six experts of rank 64, five chosen (decoders.py), against
the same model around one dense FFN in our own runner, and transformers' FlexOlmo with full-size
experts: static cache, compiled as its `generate` does, by each of its two ways to compute experts.
Ours is checked against the float64 reference before anything is timed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import decoders, printed, records
from benchmarks.bench_experts import in_words
from benchmarks.decoders import WORK, OurSteps, TheirSteps
from benchmarks.generation_checks import Checks
from benchmarks.generation_work import decoding, prefilling
from benchmarks.problem import DTYPES
from benchmarks.run import Progress
from benchmarks.shapes import SHAPES
from flexmore_kernels.timing import Call, CallFailed, Times, compare

OURS, DENSE, THEIRS = "ours", "dense FFN", "Hugging Face"
KINDS = {OURS: "ours", DENSE: "dense"}
"""Of candidates, in what is priced and checked; all others are "theirs"."""
ROUNDS = 15
GENERATE_ROUNDS = 7
LONGEST_S = 8.0
"""For the timed rounds of one comparison, beyond the first three."""


class Bench:
    """The models, checked; each method takes one record."""

    def __init__(self, shape_name: str, device: str, dtype: torch.dtype, say) -> None:
        self.shape_name, self.device, self.dtype, self.say = shape_name, device, dtype, say
        self.work, self.clocks = WORK[shape_name], records.Clocks(device)
        say("drawing weights")
        self.ours = decoders.ours(decoders.config_of(shape_name), device, dtype)
        self.ours.prepare()
        self.dense = decoders.dense(self.ours)
        self.theirs, self.absent = None, ""
        try:
            self.theirs = decoders.hugging_face(self.ours)
        except ImportError as error:
            self.absent = f"not installed: {error}"
        say("checking against the reference in float64")
        self.errors = Checks(self.ours).all(self.dense, self.theirs)
        for name in KINDS.values():
            if not self.errors[name] <= 1:
                raise RuntimeError(f"{name} is wrong: error ratio {self.errors[name]:.3g}")

    def prompts(self, batch: int, length: int) -> Tensor:
        """Random ids."""
        generator = torch.Generator(self.device).manual_seed(length)
        vocab = self.ours.config.vocab_size
        return torch.randint(vocab, (batch, length), device=self.device, generator=generator)

    def prefill(self) -> tuple[dict[str, Any], dict[str, Times]]:
        """Last logits of long prompts, into a new cache that grows."""
        ids = self.prompts(*self.work.prompts)
        calls: dict[str, Call] = {
            OURS: lambda: decoders.prefill(self.ours, ids),
            DENSE: lambda: decoders.prefill(self.dense, ids),
        }
        if self.theirs is not None:
            calls[f"{THEIRS} grouped_mm"] = lambda: decoders.their_prefill(self.theirs, ids)
            if self.device == "cuda":
                forward = torch.compile(self.theirs.__call__, dynamic=False)
                calls[f"{THEIRS} grouped_mm, compiled"] = lambda: decoders.their_prefill(
                    self.theirs, ids, forward
                )
        return self._compared(calls)

    def _compared(self, calls: dict[str, Call]) -> tuple[dict[str, Any], dict[str, Times]]:
        found: dict[str, Any] = {}
        while True:
            try:
                return found, compare(
                    calls, self.device, rounds=ROUNDS, budget_s=LONGEST_S,
                    each_round=self.clocks.look,
                )  # fmt: skip
            except CallFailed as failed:
                found[failed.name] = {"not_run": in_words(failed.__cause__)}
                calls = {name: call for name, call in calls.items() if name != failed.name}

    def decode(self, batch: int) -> tuple[dict[str, Any], dict[str, Times]]:
        """A token of each request, from prompts of `context` tokens on."""
        ids, columns = self.prompts(batch, self.work.context), self.work.columns
        makers: dict[str, Callable[[], Any]] = {
            OURS: lambda: OurSteps(self.ours, ids, columns),
            DENSE: lambda: OurSteps(self.dense, ids, columns),
        }
        if self.theirs is not None:
            compiled = self.device == "cuda"
            for experts in ("grouped_mm", "batched_mm"):
                makers[f"{THEIRS} {experts}"] = lambda experts=experts: TheirSteps(
                    self.theirs, ids, columns, experts, compiled
                )
        found, steps = {}, {}
        for name, make in makers.items():
            self.say(f"decode, batch {batch}: building {name}")
            try:
                one = make()
                one.restart()
                for _ in range(self.work.steps):  # compiles, captures
                    one.step()
                steps[name] = one
            except Exception as error:
                found[name] = {"not_run": in_words(error)}
        self.say(f"decode, batch {batch}: timing {len(steps)} side by side")
        count = self.work.steps

        def sample(name: str) -> float:
            steps[name].restart()
            steps[name].step()
            return milliseconds(steps[name].step, count, self.device) / count

        how = "events" if self.device == "cuda" else "wall"
        return found, in_turn(steps, sample, count, how, self.clocks, ROUNDS)

    def generate(self, batch: int) -> tuple[dict[str, Any], dict[str, Times]]:
        """A new token of `generate`, the prompt's part taken off, as its user calls it."""
        ids, count = self.prompts(batch, self.work.context), self.work.new_tokens
        runs = {
            name: lambda n, model=model: model.generate(ids, max_new_tokens=n, eos_token_id=())
            for name, model in ((OURS, self.ours), (DENSE, self.dense))
        }
        if self.theirs is not None:

            def theirs(n: int) -> None:
                self.theirs.set_experts_implementation("grouped_mm")  # of the prompt
                self.theirs.generate(
                    ids, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                    cache_implementation="static",
                )  # fmt: skip

            runs[THEIRS] = theirs
        found: dict[str, Any] = {}
        for name, run in list(runs.items()):
            self.say(f"generate, batch {batch}: building {name}")
            try:
                for n in (1, count + 1):
                    run(n)
            except Exception as error:
                found[name] = {"not_run": in_words(error)}
                del runs[name]

        def sample(name: str) -> float:
            return self._apart(runs[name], count)

        self.say(f"generate, batch {batch}: timing {len(runs)} side by side")
        return found, in_turn(runs, sample, count, "wall", self.clocks, GENERATE_ROUNDS)

    def _apart(self, run: Callable[[int], Any], count: int) -> float:
        """Milliseconds a new token takes beside the first one."""
        taken = []
        for tokens in (1, count + 1):
            self._wait()
            begin = time.perf_counter()
            run(tokens)
            self._wait()
            taken.append((time.perf_counter() - begin) * 1e3)
        return (taken[1] - taken[0]) / count

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def in_turn(
    names: Iterable[str],
    sample: Callable[[str], float],
    count: int,
    how: str,
    clocks: records.Clocks,
    rounds: int,
) -> dict[str, Times]:
    """Times by name: every round takes a sample of each, milliseconds, in an order of its own."""
    names = list(names)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > LONGEST_S:
            break
        for name in random.Random(done).sample(names, len(names)):
            samples[name].append(sample(name))
        clocks.look()
    return {name: Times.of(values, how, count) for name, values in samples.items()}


def milliseconds(call: Call, count: int, device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) * 1e3
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def take(bench: Bench, context: dict[str, Any], write: Callable[[dict[str, Any]], Any]) -> None:
    """All records of the models, each written as soon as it is there."""
    work, shape = bench.work, SHAPES[bench.shape_name]
    groups = [("prefill", work.prompts[0] * work.prompts[1], bench.prefill)]
    groups += [("decode", batch, lambda batch=batch: bench.decode(batch)) for batch in work.batches]
    groups += [
        ("generate", batch, lambda batch=batch: bench.generate(batch)) for batch in work.batches
    ]
    for op, tokens, measure in groups:
        bench.say(f"{op}, {tokens} tokens at once")
        torch._dynamo.reset()  # else what was compiled for another batch makes this one symbolic
        found, times = measure()
        priced = prefilling(bench.ours, work) if op == "prefill" else decoding(
            bench.ours, bench.prompts(tokens, work.context)
        )  # fmt: skip
        results = dict(found)
        for name, one in times.items():
            kind = KINDS.get(name, "theirs")
            results[name] = records.result(one, context["roofs"], *priced[kind])
            results[name]["error_ratio"] = records.short(bench.errors[kind])
        if bench.absent:
            results[THEIRS] = {"not_run": bench.absent}
        write({
            "benchmark": "generation", "op": op, "shape": bench.shape_name, **shape._asdict(),
            "tokens": tokens, "dtype": str(bench.dtype).removeprefix("torch."), "pass": "forward",
            **context, "clocks": bench.clocks.seen(), "bytes": priced["ours"][0],
            "flops": priced["ours"][1], "model": work._asdict(), "results": results,
        })  # fmt: skip


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=WORK)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--commit", help="to record, where the sources have no git history")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    given = parser.parse_args(words)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    progress = Progress(250)
    progress.say("measuring a large copy and a large matrix product")
    context = {**records.environment(device, given.commit), "roofs": records.roofs(device)}
    taken: list[dict[str, Any]] = []

    def write(record: dict[str, Any]) -> None:
        taken.append(record)
        records.append(record, given.results)
        print(printed.full(record), flush=True)

    shape_name = given.shape or ("flexolmo_6x64" if device == "cuda" else "small")
    take(Bench(shape_name, device, DTYPES[device], progress.say), context, write)
    missing = [
        f"{printed.name(record)}: {name}: {one['not_run']}"
        for record in taken
        for name, one in record["results"].items()
        if "not_run" in one and name in KINDS
    ]
    for line in missing:
        print(f"MISSING: {line}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
