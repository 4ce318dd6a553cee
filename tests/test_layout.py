"""The layout that CONTRIBUTING.md describes, checked on the syntax trees of the package."""

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
    """The first part below hfpretrain of every module that a file imports."""
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


def test_the_docstring_of_a_room_is_all_that_its_init_has():
    for room in ROOMS:
        tree = ast.parse((ROOT / "hfpretrain" / room / "__init__.py").read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, room


def test_no_module_shadows_a_library_it_wraps():
    libraries = {"evaluate", "datasets", "tokenizers", "transformers", "accelerate", "safetensors", "torch"}
    assert libraries.isdisjoint(path.stem for path in (ROOT / "hfpretrain").glob("*.py"))


def test_the_kind_of_engine_is_asked_where_its_class_is_chosen():
    for path in MODULES:
        place, text = path.relative_to(ROOT / "hfpretrain").as_posix(), path.read_text()
        if place != "engines/choose.py":
            assert ".distributed_type ==" not in text and "parallelism_config and" not in text, path
        if not place.startswith("engines/"):
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
def test_benchmarks_import(path):
    """Most run by hand: what they call must be there all the same."""
    importlib.import_module(path.stem)
