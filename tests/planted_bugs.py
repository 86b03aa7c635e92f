"""Plant known bugs, one at a time, in copies of the tree, and see which the tests catch.

    python tests/planted_bugs.py                  all that need no GPU (make planted-bugs)
    python tests/planted_bugs.py --gpu            those that need one
    python tests/planted_bugs.py --only NAME ...  some; --list shows them

The bugs are in tests/planted/. First the tests that are to catch them run without any: they must
pass, else catching means nothing. Then each bug is planted in a copy of its own, where csrc/ is
compiled again if the bug is there, and its tests run up to the first failure. The working tree is
never touched. Exit status 0: every bug that was to be run was caught.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import os
import platform
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from planted import BUGS, Bug

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix(".md")
FOLDERS = ("benchmarks", "csrc", "flexmore_kernels", "reference", "tests")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# Where a bug shows: the environment and the tests that count there.
WAYS: dict[str, tuple[dict[str, str], list[str]]] = {
    "cpu": (NO_GPU, []),
    "interpreter": ({**NO_GPU, "TRITON_INTERPRET": "1"}, ["-m", "triton"]),
    "gpu": ({}, ["-m", "gpu"]),
}


class Outcome(NamedTuple):
    """What became of a bug: "caught" by a test, or any other word, which is a failure."""

    bug: Bug
    word: str
    test: str
    detail: str
    seconds: float


class Planter:
    """Makes copies of the tree, compiles them and runs tests in them."""

    def __init__(self, folder: Path, jobs: int, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self.builders: queue.Queue[Path] = queue.Queue()

    def copy(self, name: str) -> Path:
        """A copy of the tree as it is, the compiled library included, without what git ignores."""
        tree = self.folder / name
        tree.mkdir()
        for path in ROOT.iterdir():
            if path.name in FOLDERS:
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, tree / path.name, ignore=ignored)
            elif path.is_file() and not path.name.startswith("."):
                shutil.copy2(path, tree)
        return tree

    def build(self, tree: Path, with_cuda: bool) -> str | None:
        """Compile csrc/ in place, again what changed since; None, or what the compiler said."""
        options = {} if with_cuda else {"FORCE_CUDA": "0"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=tree, env=os.environ | options, capture_output=True, text=True
        )
        errors = re.findall(r"^.*error.*$", done.stdout + done.stderr, re.M)
        return None if done.returncode == 0 else (errors or [done.stderr[-200:]])[0]

    def test(self, tree: Path, bug: Bug, first: bool) -> tuple[int | None, str]:
        """pytest's exit status (None: out of time) and output; `first` ends it at a failure."""
        options, marked = WAYS[bug.on]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        command += [*(["-x"] if first else []), *marked, *shlex.split(bug.tests)]
        environment = os.environ | {
            "OMP_NUM_THREADS": self.threads, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "240"
        }  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment | options, timeout=self.limit,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            return None, (late.stdout or b"").decode(errors="replace")
        return done.returncode, done.stdout

    def plant(self, bug: Bug) -> Outcome:
        """Plant the bug in a copy, which is deleted afterwards, and run its tests."""
        begin = time.monotonic()
        text = (ROOT / bug.file).read_text()
        if text.count(bug.old) != 1:
            found = f"the old text is there {text.count(bug.old)} times"
            return Outcome(bug, "DOES NOT APPLY", "", found, 0.0)
        tree = self.copy(bug.name)
        planted = text.replace(bug.old, bug.new)
        (tree / bug.file).write_text(planted)
        try:
            if bug.compiled and (error := self._compile(bug, text, planted, tree)):
                return Outcome(bug, "DOES NOT COMPILE", "", error, time.monotonic() - begin)
            status, output = self.test(tree, bug, first=True)
        finally:
            shutil.rmtree(tree, ignore_errors=True)
        return Outcome(bug, *verdict(status, output), time.monotonic() - begin)

    def _compile(self, bug: Bug, text: str, planted: str, tree: Path) -> str | None:
        """In a tree that was built before, so that one file is compiled; then copied to `tree`."""
        builder = self.builders.get()
        try:
            (builder / bug.file).write_text(planted)
            error = self.build(builder, bug.on == "gpu")
            for library in (builder / "flexmore_kernels").glob("*.so"):
                shutil.copy2(library, tree / "flexmore_kernels")
            return error
        finally:
            (builder / bug.file).write_text(text)
            self.builders.put(builder)


def verdict(status: int | None, output: str) -> tuple[str, str, str]:
    """(word, test, detail): a test that fails catches a bug, a run that breaks off does not."""
    failed = re.search(r"^FAILED ([^\s\[]+(?:\[.*?\](?= - |$))?)(?: - (.*))?$", output, re.M)
    if status == 1 and failed:
        return "caught", failed[1], failed[2] or ""
    if status == 0:
        return "MISSED", "", re.findall(r"\d+ passed.*", output)[-1]
    reason = "out of time" if status is None else f"pytest ended with {status}"
    return "BROKEN", "", f"{reason}: {output.strip().splitlines()[-1] if output.strip() else ''}"


def passes_unplanted(planter: Planter, bugs: list[Bug], pool) -> bool:
    """Whether every selection of tests passes, and runs a test at all, in a tree without bugs."""
    runs = {(bug.on, bug.tests, bug.compiled): bug for bug in bugs}
    plain = planter.copy("without a bug")
    compiled = planter.builders.queue[0] if planter.builders.qsize() else plain
    work = {
        pool.submit(planter.test, compiled if bug.compiled else plain, bug, False): bug
        for bug in runs.values()
    }
    right = True
    for run, bug, progress in _as_they_end(work):
        status, output = run.result()
        passed = re.search(r"(\d+) passed", output)
        fine = status == 0 and passed is not None
        right = right and fine
        word = f"{passed[1]} passed" if fine else f"FAILED without a bug, status {status}"
        print(f"{progress} {word}: {bug.on}: {bug.tests}", flush=True)
        if not fine:
            print(output[-3000:], flush=True)
    return right


def _as_they_end(work: dict) -> Iterator[tuple]:
    """(future, its value, progress with the time left), in the order in which they end."""
    begin = time.monotonic()
    for done, future in enumerate(concurrent.futures.as_completed(work), 1):
        left = (time.monotonic() - begin) / done * (len(work) - done)
        yield future, work[future], f"[{done}/{len(work)}, {left / 60:.1f} min left]"


def run(bugs: list[Bug], jobs: int, limit: float) -> list[Outcome]:
    """Outcomes in the order of `bugs`; SystemExit if the tests fail without any bug."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        planter = Planter(Path(folder), jobs, limit)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            compiled = [bug for bug in bugs if bug.compiled]
            if compiled:
                count = max(1, min(len(compiled), jobs, (os.cpu_count() or 1) // 4))
                print(f"compiling csrc/ in {count} trees", flush=True)
                trees = [planter.copy(f"builder {n}") for n in range(count)]
                cuda = compiled[0].on == "gpu"
                for tree, error in pool.map(lambda t: (t, planter.build(t, cuda)), trees):
                    if error:
                        raise SystemExit(f"csrc/ does not compile without a bug: {error}")
                    planter.builders.put(tree)
            print("without a bug:", flush=True)
            if not passes_unplanted(planter, bugs, pool):
                raise SystemExit("the tests fail without any bug: what they catch says nothing")
            print("with one:", flush=True)
            outcomes = {}
            work = {pool.submit(planter.plant, bug): bug for bug in bugs}
            for future, bug, progress in _as_they_end(work):
                outcome = outcomes[bug.name] = future.result()
                print(f"{progress} {outcome.word}: {bug.name}, {outcome.seconds:.0f} s: "
                      f"{outcome.test} {outcome.detail}", flush=True)  # fmt: skip
    return [outcomes[bug.name] for bug in bugs]


def table(outcomes: Iterable[Outcome]) -> list[str]:
    """A Markdown table."""
    lines = ["| bug | in | runs on | result |", "| --- | --- | --- | --- |"]
    for bug, word, test, detail, _ in outcomes:
        result = f"`{test}`" if word == "caught" else f"**{word}** {detail}"
        lines.append(f"| {bug.name} | {bug.file} | {bug.on} | {result} |")
    return lines


def record(outcomes: list[Outcome], gpu: bool, commit: str) -> None:
    """Write this run's half of the record; the other half stays as it is."""
    titles = ("## Without a GPU", "## On a GPU")
    old = RECORD.read_text() if RECORD.exists() else ""
    halves = dict.fromkeys(titles, "Not run yet.")
    for title in titles:
        found = re.search(rf"^{title}\n+(.*?)(?=\n## |\Z)", old, re.M | re.S)
        halves[title] = found[1].strip() if found else halves[title]
    caught = sum(outcome.word == "caught" for outcome in outcomes)
    head = f"{caught} of {len(outcomes)} caught. Commit {commit}, {datetime.date.today()}"
    halves[titles[gpu]] = "\n".join([f"{head}, {machine()}.", "", *table(outcomes)])
    intro = ("# Planted bugs, and the tests that caught them\n\nWritten by `tests/planted_bugs.py "
             "--record`. Each bug is explained in `tests/planted/`. The test named is the first "
             "that failed.\n")  # fmt: skip
    RECORD.write_text("\n".join([intro, *(f"{t}\n\n{half}\n" for t, half in halves.items())]))


def machine() -> str:
    """Processor, GPU and versions in a few words."""
    import torch
    import triton

    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    parts = [f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"]
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return ", ".join([*parts, f"Triton {triton.__version__}"])


def described_commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def use_this_gpu() -> None:
    """Compile for the GPU that is here, unless the environment says for which."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--gpu: no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}{'a' * (major == 9)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these bugs alone")
    parser.add_argument("--gpu", action="store_true", help="the bugs that need a GPU")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a run of tests")
    parser.add_argument("--list", action="store_true", help="print the bugs and plant none")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    parser.add_argument("--commit", help="of these sources, where git does not know")
    args = parser.parse_args()
    unknown = set(args.only or ()) - {bug.name for bug in BUGS}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: no such bug; see --list")
    if args.record and args.only:
        parser.error("--record: a record is of all bugs, not of some")
    if args.list:
        for bug in BUGS:
            print(f"{bug.name} ({bug.on}, {bug.file}): {bug.why}")
        return 0
    chosen = [bug for bug in BUGS if not args.only or bug.name in args.only]
    bugs = [bug for bug in chosen if (bug.on == "gpu") == args.gpu]
    if args.gpu:
        use_this_gpu()
    outcomes = run(bugs, args.jobs, args.limit)
    print("\n".join(["", *table(outcomes)]))
    left = [bug.name for bug in chosen if bug not in bugs]
    if left:
        print(f"\nnot run, {'without' if args.gpu else 'needing'} a GPU: {', '.join(left)}")
    missed = [outcome.bug.name for outcome in outcomes if outcome.word != "caught"]
    print(f"\n{len(outcomes) - len(missed)} of {len(outcomes)} caught", *missed, sep="\n  ")
    if args.record:
        record(outcomes, args.gpu, args.commit or described_commit())
    return 1 if missed or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
