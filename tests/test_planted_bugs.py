"""The list of planted bugs fits the sources: each can be planted, and names tests that exist."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import planted_bugs
import pytest
from planted import BUGS, Bug

ROOT = Path(__file__).parent.parent
by_name = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)


def functions(path: Path) -> set[str]:
    """Names of the test functions in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_there_are_thirty_and_no_two_alike():
    assert len(BUGS) >= 30
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
    assert sum(bug.on != "gpu" for bug in BUGS) >= 20


@by_name
def test_a_bug_can_be_planted(bug: Bug):
    text = (ROOT / bug.file).read_text()
    assert text.count(bug.old) == 1, "say in `old` what is there now, or drop the bug"
    assert bug.old != bug.new and bug.why
    assert bug.on in planted_bugs.WAYS
    assert not bug.file.startswith(("tests/", "reference/")), "the truth is not to be mutated"
    if bug.file.endswith(".py"):
        ast.parse(text.replace(bug.old, bug.new))


@by_name
def test_its_tests_exist(bug: Bug):
    arguments = shlex.split(bug.tests)
    selected = arguments[: arguments.index("-k")] if "-k" in arguments else arguments
    assert selected
    for node in selected:
        file, _, function = node.partition("::")
        assert (ROOT / file).is_file()
        assert not function or function in functions(ROOT / file)


@pytest.mark.parametrize(
    ("status", "output", "word"),
    [
        (1, "FAILED tests/test_a.py::test_b[x - y] - assert 0\n1 failed in 0.1s", "caught"),
        (1, "ERROR tests/test_a.py::test_b - NameError\n1 error in 0.1s", "BROKEN"),
        (0, "3 passed, 2 skipped in 0.2s", "MISSED"),
        (2, "ERROR tests/test_a.py\nInterrupted: 1 error during collection", "BROKEN"),
        (5, "no tests ran in 0.01s", "BROKEN"),
        (-11, "", "BROKEN"),
        (None, "tests/test_a.py ..", "BROKEN"),
    ],
)
def test_only_a_failing_test_catches(status, output, word):
    found, test, detail = planted_bugs.verdict(status, output)
    assert found == word
    assert test == ("tests/test_a.py::test_b[x - y]" if word == "caught" else "")
    assert detail == "assert 0" or word != "caught"


def test_a_copy_holds_what_tests_and_builds_need(tmp_path):
    tree = planted_bugs.Planter(tmp_path, jobs=1, limit=1.0).copy("tree")
    for name in ("flexmore_kernels", "reference", "tests/conftest.py", "csrc", "setup.py"):
        assert (tree / name).exists()
    assert not (tree / ".git").exists() and not list(tree.rglob("__pycache__"))
