"""The rules of CONTRIBUTING.md, checked: seats, import direction, signatures, sizes, names."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from flexmore_kernels import backend
from tests.floors import PLAN

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flexmore_kernels"
STEMS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if p.stem != "__init__")
LAYERS = ("layer", "model")
PRIVATE = ("_aten", "_native", "_triton")

FLOORS = {room: floor for floor, rooms in enumerate(PLAN) for room in rooms}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, absolute, and whether it does so inside a function."""
    found = []
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((f"{module}.{alias.name}", lazy) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, ast.FunctionDef))

    visit(ast.parse(path.read_text()), False)
    return found


def room(module: str) -> str:
    """The part of the package that a dotted module name is in: ragged, ops, _triton, ..."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("stem", STEMS)
def test_every_op_has_its_seats(stem):
    seats = {
        "what": ROOT / f"reference/{stem}.py",
        "proof": ROOT / f"tests/test_{stem}.py",
    }
    if stem in backend.STEMS:  # the others are made of aten's ops
        seats["how"] = PACKAGE / f"_triton/{stem}.py"
        seats["price"] = ROOT / f"benchmarks/bench_{stem}.py"
    assert set(backend.STEMS) <= set(STEMS)
    assert [seat for seat, path in seats.items() if not path.exists()] == []


@pytest.mark.parametrize("stem", LAYERS)
def test_every_layer_has_its_seats(stem):
    for folder, prefix in ((PACKAGE, ""), (ROOT / "reference", ""), (ROOT / "tests", "test_")):
        assert (folder / f"{prefix}{stem}.py").exists()


def test_no_kernel_without_an_op():
    """Every file of a folder of kernels has an op's stem, or helps one that does, or has the stem
    of one that helps in another folder, or is asked for by its stem there (`backend.library`)."""
    helpers = set()
    for folder in PRIVATE:
        for path in (PACKAGE / folder).glob("*.py"):
            asked = set(re.findall(r"backend\.(?:library|hopper)\(\"(\w+)\"", path.read_text()))
            assert [stem for stem in asked if not (PACKAGE / f"_native/{stem}.py").exists()] == []
            helpers |= asked
            helpers |= {module.split(".")[2] for module, _ in imports(path)
                        if module.startswith(f"flexmore_kernels.{folder}.")}  # fmt: skip
    for folder in PRIVATE:
        stems = {path.stem for path in (PACKAGE / folder).glob("*.py")}
        alone = stems - set(STEMS) - helpers - {"__init__"}
        assert alone == set(), f"{folder}: no ops/<stem>.py, and nothing there imports it"


def test_contributing_lists_the_cuda_files():
    rows = re.findall(r"^\| (`\w+\.cu.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    listed = re.findall(r"`(\w+\.cuh?)`", " ".join(rows))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "csrc/cuda").iterdir())


@pytest.mark.parametrize("path", python_files("flexmore_kernels"), ids=lambda p: p.stem)
def test_imports_go_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module, lazy in imports(path):
        if module.split(".")[0] == "reference":
            pytest.fail("the package must not import reference/ from the repository root")
        target = room(module)
        if not module.startswith("flexmore_kernels.") or target in (own, "__version__"):
            continue
        if target == "reference":
            assert own in ("cli", "commands", "demo") and lazy, (
                "only the command line may, inside a function"
            )
        else:
            assert target in FLOORS, f"{module}: give {target} a floor"
            assert FLOORS[target] < FLOORS[own], f"{own} imports {module}, which is above it"


@pytest.mark.parametrize("path", python_files("reference"), ids=lambda p: p.stem)
def test_reference_imports_torch_and_itself_only(path):
    roots = {module.split(".")[0] for module, _ in imports(path)}
    third_party = roots - {"__future__", "collections", "dataclasses", "math", "typing"}
    assert third_party <= {"torch", "reference"}


def public_ops() -> list[str]:
    return list(importlib.import_module("flexmore_kernels.ops").__all__)


def call(function) -> list[tuple]:
    """How a function is called: names (shape suffixes dropped), kinds, defaults."""
    return [
        (re.sub(r"(_[A-Z][A-Z0-9]*|_n[A-Z])$", "", name), parameter.kind, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    ]


@pytest.mark.parametrize("name", public_ops())
def test_op_and_reference_have_one_signature(name):
    op = getattr(importlib.import_module("flexmore_kernels.ops"), name)
    twin = getattr(importlib.import_module("reference"), name)
    assert call(op) == call(twin)


@pytest.mark.parametrize("name", ["Routing", "RoutingPlan", "StackedFactors", "RouterStatistics"])
def test_nouns_have_one_form(name):
    own = getattr(importlib.import_module("flexmore_kernels.ops.routing"), name, None)
    own = own or getattr(importlib.import_module("flexmore_kernels"), name)
    assert own._fields == getattr(importlib.import_module("reference"), name)._fields


@pytest.mark.parametrize("name", ["FlexMoRE", "FlexMoREForCausalLM"])
def test_layers_have_one_signature(name):
    own = getattr(importlib.import_module("flexmore_kernels"), name)
    twin = getattr(importlib.import_module("reference"), name)
    assert call(own) == call(twin)
    assert call(own.forward) == call(twin.forward)


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_of_one_name_have_one_signature(stem):
    seen: dict[str, tuple[str, list[tuple]]] = {}
    for folder in PRIVATE:
        if not (PACKAGE / folder / f"{stem}.py").exists():
            continue
        if folder == "_triton":
            pytest.importorskip("triton")
        module = importlib.import_module(f"flexmore_kernels.{folder}.{stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue
            where, first = seen.setdefault(name, (folder, call(function)))
            assert call(function) == first, f"{name}: {folder} and {where} differ"


@pytest.mark.parametrize("folder", ["flexmore_kernels", "reference", "tests", "benchmarks", "csrc"])
def test_files_stay_short(folder):
    limits = {".py": 300, ".cu": 400, ".cpp": 400, ".h": 400, ".cuh": 400}
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*")
        if path.suffix in limits
        and (lines := len(path.read_text().splitlines())) > limits[path.suffix]
    }
    assert long == {}


def test_launched_kernels_carry_the_package_s_name():
    """Profilers, sanitizers and nsys show a Triton kernel by its function's name alone."""
    found = []
    for path in sorted((PACKAGE / "_triton").glob("*.py")):
        source = path.read_text()
        for node in ast.parse(source).body:
            text = ast.get_source_segment(source, node) or ""
            jit = any("triton.jit" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))
            if jit and "tl.program_id" in text:
                found.append(node.name)
    assert len(found) > 10
    assert [name for name in found if not name.startswith("flexmore_")] == []


def test_environment_is_no_interface():
    for path in [*python_files("flexmore_kernels"), *python_files("reference")]:
        names = set(re.findall(r"os\.environ|os\.getenv|getenv\(", path.read_text()))
        assert not names, f"{path.relative_to(ROOT)} reads the environment"


def test_readme_lists_the_public_ops():
    section = re.search(r"^## Ops$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    listed = re.findall(r"^\| `(\w+)` ", section.group(1), re.M)
    assert sorted(listed) == sorted(public_ops())


def test_package_is_whole():
    """A folder without __init__.py works in the source tree and is missing in the wheel."""
    assert (PACKAGE / "py.typed").exists()
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []


def test_readme_example_runs():
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    exec(compile(example, "README.md", "exec"), {})
