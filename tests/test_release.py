"""The wheel and the sdist, built offline."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution

import pytest
from conftest import ROOT, environment
from packaging.requirements import Requirement
from packaging.version import Version

from hfpretrain import __version__
from hfpretrain.recipe import shipped

KEPT = ("pyproject.toml", "MANIFEST.in", "*.md", "LICENSE", "Makefile", "constraints.txt")
FOLDERS = ("hfpretrain", "recipes", "accelerate_configs", "tests", "benchmarks", "examples")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wheel and sdist in `dist`, the wheel's content in `site`.

    They are built in a copy of the project, since setuptools writes into the project's folder.
    """
    folder = tmp_path_factory.mktemp("release")
    (folder / "source").mkdir()
    for path in (path for pattern in KEPT for path in ROOT.glob(pattern)):
        shutil.copy(path, folder / "source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta as b; b.build_wheel('../dist'); b.build_sdist('../dist')"
    (folder / "dist").mkdir()
    result = subprocess.run([sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next((folder / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder


def run(folder, *arguments):
    """Run the command of the unpacked wheel in an empty folder."""
    (folder / "empty").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "hfpretrain.cli", *arguments]
    env = environment(PYTHONPATH=str(folder / "site"))
    return subprocess.run(command, cwd=folder / "empty", env=env, capture_output=True, text=True)


def test_the_wheel_contains_package_recipes_and_engines(folder):
    found = {str(path.relative_to(folder / "site")) for path in (folder / "site").rglob("*") if path.is_file()}
    metadata = f"hfpretrain-{__version__}.dist-info"
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "hfpretrain").rglob("*.py")} | {"hfpretrain/py.typed"}
    for name in ("recipes", "accelerate_configs"):
        wanted |= {f"hfpretrain/{name}/{path.name}" for path in (ROOT / name).glob("*.yaml")}
    assert {path for path in found if not path.startswith(metadata)} == wanted
    assert f"{metadata}/licenses/LICENSE" in found
    assert "hfpretrain = hfpretrain.cli:run" in (folder / "site" / metadata / "entry_points.txt").read_text()


@pytest.mark.parametrize(
    "library",
    ["accelerate", "datasets", "deepspeed", "evaluate", "huggingface_hub", "tokenizers", "torch", "transformers"],
)
def test_a_library_whose_private_names_are_used_is_capped_above_the_tested_version(folder, library):
    wheel = PathDistribution(folder / "site" / f"hfpretrain-{__version__}.dist-info")
    (requirement,) = (needed for needed in map(Requirement, wheel.requires) if needed.name == library)
    (line,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(f"{library}=="))
    tested = Version(line.partition("==")[2])
    assert tested in requirement.specifier
    assert Version(f"{tested.major}.{tested.minor + 1}") not in requirement.specifier, "the next minor is not tested"


def test_the_sdist_contains_the_files_that_tests_need(folder):
    with tarfile.open(folder / "dist" / f"hfpretrain-{__version__}.tar.gz") as sdist:
        found = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"tests/conftest.py", "tests/test_release.py", "benchmarks/small.py", "examples/sft.py"} <= found
    assert {"CHANGELOG.md", "constraints.txt", "recipes/quickstart.yaml", "accelerate_configs/ddp.yaml"} <= found


def test_recipes_and_engines_are_found_by_name(folder):
    shown = run(folder, "path", "ddp")
    assert shown.stdout.strip() == str(folder / "site" / "hfpretrain" / "accelerate_configs" / "ddp.yaml"), shown.stderr
    checked = run(folder, "check", "quickstart", "--training.max_steps=60")
    assert checked.returncode == 0 and "# parameters       at most 4,737,792" in checked.stdout, checked.stderr
    (folder / "empty" / "quickstart").write_text("output_dir: 3")
    mine = run(folder, "check", "quickstart")  # an existing file takes precedence over a name
    assert mine.returncode == 2 and "output_dir" in mine.stderr
    wrong = run(folder, "path", "quickstrat")
    assert wrong.returncode == 2 and "shipped: quickstart" in wrong.stderr and "Traceback" not in wrong.stderr


def test_no_name_is_both_a_recipe_and_an_engine():
    recipes, engines = shipped.file_names("recipe"), shipped.file_names("engine")
    assert "quickstart" in recipes and "fsdp2" in engines and not set(recipes) & set(engines)
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
