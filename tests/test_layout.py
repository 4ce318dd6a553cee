"""The rules that DESIGN.md gives the package, held by its syntax trees."""

import ast
import importlib

import pytest
from conftest import ROOT

PACKAGE = sorted((ROOT / "hfpretrain").glob("*.py"))
# Lower levels never import higher ones, and a leaf no other leaf.
FOUNDATION = {
    "recipe",
    "redaction",
    "files",
    "console",
    "source_files",
    "devices",
    "hygiene",
    "mirror",
    "shipped",
    "prepared",
    "token_perplexity",
    "launcher",
    "precision",
    "zero",
    "fsdp",
    "tensor_parallel",
    "loss",
    "sequence_parallel",
    "initialisation",
    "fragments",
    "collectives",
    "subruns",
    "tokenizer",
}
LEAVES = {
    "corpus",
    "packing",
    "joining",
    "shares",
    "dataloader",
    "model",
    "optim",
    "engine",
    "checkpoint",
    "export",
    "evaluation",
    "footprint",
    "metrics",
    "sampling",
    "metric_folders",
    "tasks",
    "card",
    "hub",
    "outbox",
    "ranks",
    "stopping",
    "stability",
    "scaling",
}
COMPOSITION = [
    "loading",
    "vocabulary",
    "prepare",
    "trace",
    "consumption",
    "validation",
    "streaming",
    "plan",
    "communication",
    "family",
    "bill",
    "report",
    "run_card",
    "plain",
    "score",
    "downstream",
    "publisher",
    "publishing",
    "push",
    "incident",
    "records",
    "run_folder",
    "preflight",
    "resume_from",
    "evaluator",
    "runs",
    "run",
    "train",
    "verify_resume",
    "rungs",
    "ladder",
    "cli",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "hfpretrain":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hfpretrain."):
            yield node.module.split(".")[1]


def test_imports_go_one_way():
    for path in PACKAGE:
        name, found = path.stem, set(imports(path))
        if name in FOUNDATION:
            assert found <= {"recipe", "redaction", "files", "fragments", "shipped"} - {name}, name
        elif name in LEAVES:
            assert found <= FOUNDATION, (name, found)
        elif name != "__init__":
            assert found <= FOUNDATION | LEAVES | set(COMPOSITION[: COMPOSITION.index(name)]), (name, found)


def test_no_module_shadows_a_library_it_wraps():
    libraries = {"evaluate", "datasets", "tokenizers", "transformers", "accelerate", "safetensors", "torch"}
    assert libraries.isdisjoint(path.stem for path in PACKAGE)


def test_only_composition_sees_the_whole_recipe():
    for path in PACKAGE:
        if path.stem in LEAVES:
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert "Recipe" not in names, path.stem


def test_engine_names_stand_in_engine_alone():
    for path in PACKAGE:
        if path.stem != "engine":
            text = path.read_text()
            assert "DistributedType" not in text and "deepspeed_plugin" not in text, path.stem


def test_public_functions_and_classes_have_docstrings():
    for path in PACKAGE:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path.stem
        hidden = [
            n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) or str(getattr(n, "name", "")).startswith("_")
        ]
        private = {inner for outer in hidden for inner in ast.walk(outer) if inner is not outer}
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node in private, f"{path.stem}.{node.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import(path):
    """Most run by hand: what they call must be there all the same."""
    importlib.import_module(path.stem)
