"""The layout that CONTRIBUTING.md describes, checked on the package's syntax trees."""

import ast
import importlib

import pytest
from conftest import ROOT

# What each room may import. The top level (`train.py`, `cli.py`, `runs.py`) may import all of them.
ROOMS = {
    "recipe": set(),
    "data": {"recipe"},
    "modeling": {"recipe"},
    "engines": {"recipe", "data", "modeling"},
    "checkpoints": {"recipe", "data", "modeling", "engines"},
    "planning": {"recipe", "data", "modeling", "engines", "checkpoints"},
    "evaluation": {"recipe", "data", "modeling", "engines", "checkpoints"},
    "training": {"recipe", "data", "modeling", "engines", "checkpoints", "planning", "evaluation"},
    "publishing": {"recipe", "data", "modeling", "engines", "checkpoints", "planning", "evaluation", "training"},
    "ladder": {
        *("recipe", "data", "modeling", "engines", "checkpoints", "planning", "evaluation", "training", "publishing"),
    },
}
FOR_ALL = {"files"}
MODULES = sorted((ROOT / "hfpretrain").rglob("*.py"))


def imported(path):
    """For every module of hfpretrain that a file imports, the first part of its name after `hfpretrain.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "hfpretrain":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hfpretrain."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    for path in (ROOT / "hfpretrain" / room).glob("*.py"):
        assert set(imported(path)) <= ROOMS[room] | {room} | FOR_ALL, path


def test_every_folder_of_the_package_and_of_the_tests_is_a_room():
    for top in ("hfpretrain", "tests"):
        folders = {path.parent.name for path in (ROOT / top).glob("*/*.py")}
        assert folders == set(ROOMS), top


def test_the_init_of_a_room_has_only_a_docstring():
    for room in ROOMS:
        tree = ast.parse((ROOT / "hfpretrain" / room / "__init__.py").read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, room


def test_no_module_shadows_a_library_it_wraps():
    libraries = {"evaluate", "datasets", "tokenizers", "transformers", "accelerate", "safetensors", "torch"}
    assert libraries.isdisjoint(path.stem for path in (ROOT / "hfpretrain").iterdir())


def test_only_engines_choose_asks_for_the_kind_of_engine():
    for path in MODULES:
        name, text = path.relative_to(ROOT / "hfpretrain").as_posix(), path.read_text()
        if name != "engines/choose.py":
            assert ".distributed_type ==" not in text and "parallelism_config and" not in text, path
        if not name.startswith("engines/"):
            assert "DistributedType" not in text and "deepspeed_plugin" not in text, path


def test_public_functions_and_classes_have_docstrings():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        hidden = [
            n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) or str(getattr(n, "name", "")).startswith("_")
        ]
        private = {inner for outer in hidden for inner in ast.walk(outer) if inner is not outer}
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node in private, f"{path}: {node.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports(path):
    """Most benchmarks are run by hand, so tests would not notice that a name they import is gone."""
    importlib.import_module(path.stem)
