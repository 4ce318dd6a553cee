"""Publishing to the Hub and reading from it, with the real client against a server on localhost."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import small
from conftest import ROOT, rows, small_text, write_jsonl, write_recipe
from hub_server import TOKEN, HubError, HubServer, Repo
from hub_trials import FAULTS, always, first
from huggingface_hub import ModelCard
from warm import WarmProcess

from hfpretrain import files, load_recipe
from hfpretrain.publishing import card, outbox
from hfpretrain.recipe.schema import RecipeError

STEPS = [f"step-{step:08d}" for step in (2, 4, 6, 8)]
# Prints the largest difference between the logits of a revision and of the run's checkpoint, and the logits' deviation.
LOGITS = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from hfpretrain.engines.pieces import load_whole_tensors
repo, run, *revisions = sys.argv[1:]
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision).eval()
    ids = AutoTokenizer.from_pretrained(repo, revision=revision)("the quiet river", return_tensors="pt").input_ids
    found = model(ids).logits
    weights = load_whole_tensors(Path(run) / "checkpoints" / revision, ["model", "buffers"])
    model.load_state_dict(weights, strict=False)
    print(revision, (found - model(ids).logits).abs().max().item(), found.std().item())
"""


class World:
    """A Hub with a dataset, a run that pushed its checkpoints there, and a process that runs commands with that Hub."""

    def __init__(self, hub, folder, warm):
        self.hub, self.folder, self.warm = hub, folder, warm
        self.env = hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}

    def recipe(self, **changes):
        return write_recipe(self.folder, checkpoint__every_steps=2, **changes)

    def train(self, *arguments):
        return self.warm.run("hfpretrain.train", *arguments)

    def cli(self, *arguments):
        return self.warm.run("hfpretrain.cli", *arguments)

    def push(self, *arguments):
        return self.cli("push", *arguments)

    @property
    def repo(self):
        return self.hub.repos["models/user/tiny"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    data = Repo("user/data", private=False)
    data.commit("main", "data", {"corpus.jsonl": (folder / "corpus.jsonl").read_bytes()})
    with HubServer() as hub, WarmProcess(hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}) as warm:
        hub.repos["datasets/user/data"] = data
        world = World(hub, folder, warm)
        # The first request is refused: the run reports it, continues, and pushes once the token is accepted.
        hub.fault = first(1, lambda: HubError(401, "Invalid username or password."), "repos/create")
        path = world.recipe(
            hub={"repo_id": "user/tiny", "push_state": True, "license": "apache-2.0"},
            checkpoint__keep_last=9,
            evaluation__every_steps=4,
            evaluation__prompts=["the river"],
        )
        world.trained = world.train(path)
        hub.fault = None
        assert world.trained.returncode == 0, world.trained.stderr
        yield world


def test_every_checkpoint_becomes_a_revision_and_the_export_becomes_main(world):
    repo, run = world.repo, world.folder / "run"
    assert sorted(repo.tags) == STEPS and all(repo.branches[name] == oid for name, oid in repo.tags.items())
    stored = repo.at("main").files
    for path in (run / "model").iterdir():
        assert stored[path.name] == path.read_bytes(), path.name
    last = repo.at(STEPS[-1])
    assert last.files["model.safetensors"] == stored["model.safetensors"]
    assert json.loads(repo.at(STEPS[1]).files["metrics.json"])["eval/loss"] == rows(run, "eval/loss")[4]["eval/loss"]
    assert [commit.title for commit in repo.history(STEPS[0])][1:] == ["initial commit"]
    assert "eval/loss: " in repo.at(STEPS[1]).message
    # The commits are in the table and in metrics.jsonl.
    for name, oid in {**repo.tags, "main": repo.at("main").oid}.items():
        assert f"{name:<16} commit {oid}" in world.trained.stdout
    events = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "hub/commit" in row]
    assert {row["hub/revision"] for row in events} == {*STEPS, "main"}
    assert not outbox.waiting_checkpoints(run / "outbox")


def test_a_refusal_is_reported_and_the_token_is_in_no_file(world):
    assert "the repo is not on the Hub: 401" in world.trained.stderr and "hf auth login" in world.trained.stderr
    for path in [*(world.folder / "run").rglob("*"), *(world.folder / "prepared").rglob("*")]:
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in world.trained.stdout + world.trained.stderr


def test_revisions_load_and_give_the_logits_of_their_checkpoints(world):
    result = world.warm.run("-c", LOGITS, "user/tiny", world.folder / "run", *STEPS[:3])
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == STEPS[:3] and all(float(line[1]) == 0 for line in lines)
    assert len({line[2] for line in lines}) == 3


def test_push_adds_missing_revisions_and_replaces_none(world):
    repo, run = world.repo, world.folder / "run"
    first = world.push(run, "user/other")
    assert (first.returncode, first.stderr) == (0, "")
    other = world.hub.repos["models/user/other"]
    # A line for each push as it happens, and the table at the end; no output of a library.
    pushed = {**other.tags, "main": other.at("main").oid}
    lines = first.stdout.splitlines()
    assert sorted(lines[:5]) == sorted(f"{name}: commit {oid}" for name, oid in pushed.items())
    assert lines[5:] == ["on the Hub, user/other:", *(f"  {name:<16} commit {oid}" for name, oid in pushed.items())]
    assert other.at(STEPS[1]).files["model.safetensors"] == repo.at(STEPS[1]).files["model.safetensors"]
    # As if pushes were killed before the tag or before the branch; and a branch with somebody else's commit.
    del other.tags[STEPS[0]], other.tags[STEPS[1]], other.branches[STEPS[1]], other.tags[STEPS[3]]
    other.commit(STEPS[3], "mine", {"a": b""})
    other.commits[:] = [
        commit._replace(title="Step 6 (run 00000000, ledger 00000000)")
        if commit.oid == other.tags[STEPS[2]]
        else commit
        for commit in other.commits
    ]
    before = dict(other.branches)
    again = world.push(run, "user/other")
    assert again.returncode == 1
    assert f"{STEPS[2]:<16} not pushed: user/other has another {STEPS[2]}" in again.stdout
    assert f"{STEPS[3]:<16} not pushed: user/other has another {STEPS[3]} ('mine')" in again.stdout
    assert {name: other.branches[name] for name in before} == before and other.tags[STEPS[0]] == before[STEPS[0]]
    del other.at(STEPS[1]).files["state/manifest.json"]
    assert (
        f"{STEPS[1]:<16} not pushed: user/other has {STEPS[1]} without state/manifest.json"
        in world.push(run, "user/other").stdout
    )
    assert other.at(STEPS[1]).files["model.safetensors"] == repo.at(STEPS[1]).files["model.safetensors"]


def test_a_damaged_checkpoint_does_not_stop_the_push_of_others(world):
    run = world.folder / "damaged"
    shutil.copytree(
        world.folder / "run", run, ignore=shutil.ignore_patterns("outbox", "model")
    )  # as a killed run leaves it
    for step in (STEPS[0], STEPS[2]):
        (file,) = (run / "checkpoints" / step).glob("__0_*.distcp")
        file.write_bytes(bytes(reversed(file.read_bytes())))
    (run / "checkpoints" / STEPS[1] / "notes").mkdir()  # a person's
    for step in STEPS[:3]:
        assert outbox.add_checkpoint(run / "checkpoints" / step, run / "outbox") is None
    (run / "outbox" / STEPS[1] / "train_state.json").unlink()
    outbox.record_published(run / "outbox", "user/damaged", "step-00000099", "of a repo that was deleted")
    found = world.push(run, "user/damaged")
    assert found.returncode == 1 and "Traceback" not in found.stderr
    for step in (STEPS[0], STEPS[2]):
        assert f"{step:<16} not pushed: not exported: " in found.stdout and "has another checksum" in found.stdout
    assert sorted(world.hub.repos["models/user/damaged"].tags) == [STEPS[1], STEPS[3]]
    assert "step-00000099" not in found.stdout
    # The copy in the outbox is damaged, and its checkpoint was rotated away.
    for step in STEPS[:3]:
        shutil.rmtree(run / "checkpoints" / step)
    shutil.rmtree(run / "outbox" / STEPS[3])
    (run / "checkpoints" / STEPS[3] / "train_state.json").unlink()
    (run / "outbox" / STEPS[0] / "train_state.json").write_text("[]")
    again = world.push(run, "user/damaged")
    assert again.returncode == 1 and "Traceback" not in again.stderr
    for path in (run / "outbox" / STEPS[0], run / "checkpoints" / STEPS[3]):
        assert f"{path.name:<16} not pushed: the checkpoint in {path} can't be read" in again.stdout
    shutil.copytree(world.folder / "run" / "model", run / "model")
    os.truncate(run / "model" / "model.safetensors", 100)
    (run / "outbox" / "published.json").write_text("[]")
    last = world.push(run, "user/damaged")
    assert last.returncode == 1 and "Traceback" not in last.stderr
    assert f"main             not pushed: {run / 'model' / 'model.safetensors'} has another checksum" in last.stdout
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "outbox")
    shutil.rmtree(run / "checkpoints" / STEPS[3])
    (run / "checkpoints").mkdir(exist_ok=True)
    empty = world.push(run, "user/empty")
    assert empty.returncode == 2 and "nor a run folder with checkpoints" in empty.stderr
    assert "models/user/empty" not in world.hub.repos


# The other faults take several seconds of waiting each, so they run in `make proofs`. These are their short form.
QUICK = ("403", "answer to a commit lost, once")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in FAULTS
        if name not in ("none", "401", "slow: 1 s a request")
    ],
)
def test_a_push_through_a_fault_ends_with_one_commit_one_tag_and_the_same_bytes(world, tmp_path, fault):
    run, repo_id = tmp_path / "run", f"user/fault-{list(FAULTS).index(fault)}"
    shutil.copytree(world.folder / "run", run, ignore=shutil.ignore_patterns("outbox", *STEPS[1:]))
    world.hub.lfs.clear()  # a file that the server has is not uploaded again
    world.hub.fault = FAULTS[fault]()
    result = world.push(run, repo_id)
    world.hub.fault = None
    if fault == "403":
        assert result.returncode == 2 and "You have read access only" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    repo = world.hub.repos[f"models/{repo_id}"]
    assert list(repo.tags) == [STEPS[0]] and repo.branches[STEPS[0]] == repo.tags[STEPS[0]]
    assert len(repo.history(STEPS[0])) == 2, "a commit whose answer was lost is not made again"
    for revision in (STEPS[0], "main"):
        assert repo.at(revision).files["model.safetensors"] == world.repo.at(revision).files["model.safetensors"], (
            revision
        )


def recipe_that_resumes(world, run, resume_from):
    return world.recipe(
        output_dir=str(run),
        checkpoint__resume_from=resume_from,
        hub={"repo_id": f"user/{run.name}", "license": "apache-2.0"},
        evaluation__every_steps=4,
        checkpoint__keep_last=1,
    )


@pytest.mark.slow
def test_a_run_ends_with_the_same_weights_although_its_uploads_hang(world):
    run, weights = world.folder / "hanging", "model/model.safetensors"
    path = recipe_that_resumes(world, run, f"hub://user/tiny@{STEPS[1]}")
    world.hub.lfs.clear()
    world.hub.fault = always(lambda: 300.0, "^PUT")
    command = [sys.executable, "-m", "hfpretrain.train", str(path)]
    with subprocess.Popen(command, env=world.env, cwd=ROOT, text=True, stdout=-1, stderr=-1) as training:
        while len(outbox.waiting_checkpoints(run / "outbox")) < 2 or not (run / "model" / "README.md").exists():
            assert training.poll() is None, training.communicate()
            time.sleep(0.1)
        children = psutil.Process(training.pid).children()
        training.send_signal(signal.SIGTERM)
        stdout, stderr = training.communicate(timeout=60)
    world.hub.fault = None
    assert training.returncode == 0 and "main             not pushed: " in stdout, stderr
    assert children and not any(child.is_running() for child in children)
    assert f"resumed from {run / 'checkpoints' / STEPS[1]}" in stderr
    assert (run / weights).read_bytes() == (world.folder / "run" / weights).read_bytes()
    # Both checkpoints wait, although rotation deleted the older one.
    assert [path.name for path in outbox.waiting_checkpoints(run / "outbox")] == STEPS[2:]
    assert [path.name for path in (run / "checkpoints").iterdir()] == STEPS[3:]
    pushed = world.push(run, "user/hanging")
    assert pushed.returncode == 0, pushed.stderr
    assert list(world.hub.repos["models/user/hanging"].tags) == STEPS[2:] and not outbox.waiting_checkpoints(
        run / "outbox"
    )


@pytest.mark.slow  # the test above is its short form
def test_a_run_without_a_hub_ends_with_the_same_weights_and_is_pushed_later(world):
    run, weights = world.folder / "gone", "model/model.safetensors"
    path = recipe_that_resumes(world, run, str(world.folder / "run" / "checkpoints" / STEPS[1]))
    with world.hub.down():
        result = world.train(path, "--hub.max_wait_seconds=0")
        assert result.returncode == 0, result.stderr
        assert "main             not pushed: ConnectError" in result.stdout
        refused = world.push(run, "user/gone")
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert (run / weights).read_bytes() == (world.folder / "run" / weights).read_bytes()
    pushed = world.push(run, "user/gone")
    assert pushed.returncode == 0, pushed.stderr
    assert list(world.hub.repos["models/user/gone"].tags) == STEPS[2:] and not outbox.waiting_checkpoints(
        run / "outbox"
    )


def test_the_publishing_process_ends_with_its_run(world):
    """Its standard input is closed when the run is killed. The standard input of `warm` is empty."""
    code = "import sys, pathlib, hfpretrain.publishing.publisher as p; p.main(pathlib.Path(sys.argv[1]))"
    assert world.warm.run("-c", code, world.folder / "run", timeout=60).returncode == 0


class Attack:
    def __reduce__(self):
        return print, ("this was run",)


# Tries `checkpoint.resume_from` with several revisions.
FETCHES = """
import sys
from hfpretrain import load_recipe
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.checkpoints.resume import fetch_initial_checkpoint
for name in sys.argv[2:]:
    changes = ["--optimizer.lr=0.1"] if name == "step-00000004" else []
    try:
        address = f"--checkpoint.resume_from=hub://user/tiny@{name}"
        fetch_initial_checkpoint(load_recipe(sys.argv[1], [address, *changes]))
    except RecipeError as error:
        print(name, str(error).replace("\\n", " "))
"""


def test_a_damaged_or_malicious_state_is_refused_before_it_is_used(world):
    whole = world.repo.at(STEPS[3]).files
    weights, index, stateless = dict(whole), dict(whole), {}
    weights["state/__0_0.distcp"] = bytes(reversed(whole["state/__0_0.distcp"]))
    index["state/.metadata"] = pickle.dumps(Attack())
    manifest = json.loads(whole["state/manifest.json"])
    digest = hashlib.sha256(index["state/.metadata"]).hexdigest()
    manifest["files"][".metadata"] = {"size": len(index["state/.metadata"]), "sha256": digest}
    del manifest["manifest_sha256"]
    index["state/manifest.json"] = json.dumps(manifest).encode()
    stateless = {name: content for name, content in whole.items() if not name.startswith("state/")}
    escaping = {**whole, "state/../../../../escaped": b"this must not be written"}
    contents = {"weights": weights, "index": index, "stateless": stateless, "escaping": escaping}
    for name, content in contents.items():
        world.repo.commit(name, name, content)
    path = world.recipe(output_dir=str(world.folder / "fresh"))
    names = ["weights", "index", "stateless", "escaping", STEPS[1], "nowhere"]
    result = world.warm.run("-c", FETCHES, path, *names)
    assert result.returncode == 0, result.stderr
    errors = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert "__0_0.distcp has another checksum" in errors["weights"]
    assert "builtins.print" in errors["index"]
    assert "hub.push_state: true" in errors["stateless"]
    assert "recipe" in errors[STEPS[1]] and "optimizer.lr: is 0.1" in errors[STEPS[1]]
    assert "404" in errors["nowhere"]
    assert "ValueError" in errors["escaping"]
    assert not [path for path in world.folder.parent.rglob("escaped") if path.is_file()]
    assert not list((world.folder / "fresh" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("key", ["branch_from", "resume_from"])
def test_a_checkpoint_from_the_hub_is_read_at_one_commit_although_its_revision_moves(world, key):
    hub, repo, run, given = world.hub, world.repo, world.folder / key, f"hub://user/tiny@{STEPS[1]}"
    before = repo.at(STEPS[1])
    oid, hub.requests[:] = before.oid, []
    moved = []

    def push_after_the_first_request(method, path):
        if not moved and any("/api/models/user/tiny/revision/" in request for request in hub.requests[:-1]):
            moved.append(repo.commit(STEPS[1], "moved", dict(repo.at(STEPS[3]).files)))

    path = world.recipe(
        **{f"checkpoint__{key}": given}, output_dir=str(run), training__max_steps=4 if key == "branch_from" else 8
    )
    hub.fault = push_after_the_first_request
    result = world.train(path)
    hub.fault = None
    assert result.returncode == 0 and moved, result.stderr
    repo.branches[STEPS[1]], repo.commits[:] = before.oid, [one for one in repo.commits if one != moved[0]]
    read = {request.partition("/resolve/")[2].split("/")[0] for request in hub.requests if "/resolve/" in request}
    assert read == {oid}
    events = [row.get("event") for row in map(json.loads, (run / "metrics.jsonl").open())]
    assert f"checkpoint.{key}: {given} is read at commit {oid}" in events
    if key == "branch_from":
        (found,) = json.loads((run / "branch.json").read_text())
        assert (found["commit"], found["step"], found["given"]) == (oid, 4, given)
        assert ModelCard((run / "model" / "README.md").read_text()).data.base_model == "user/tiny"
    weights = "model/model.safetensors"
    # The cosine schedule of 8 steps continues, so this is the uninterrupted run.
    assert (run / weights).read_bytes() == repo.at(STEPS[3]).files["model.safetensors"]


def test_a_model_and_its_tokenizer_from_the_hub_are_trained_further(world):
    path = world.recipe(
        output_dir=str(world.folder / "continued"),
        model={"pretrained": "user/tiny", "revision": STEPS[1]},
        tokenizer={"pretrained": "user/tiny"},
        data__sources=[{"path": "user/data"}],
        training__max_steps=2,
        scheduler__num_warmup_steps=1,
    )
    result = world.train(path)
    assert result.returncode == 0, result.stderr
    before = rows(world.folder / "run", "eval/loss")[4]
    assert rows(world.folder / "continued", "eval/loss")[0]["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-6)
    found = ModelCard((world.folder / "continued" / "model" / "README.md").read_text())
    assert found.data.base_model == "user/tiny" and found.data.datasets == ["user/data"]
    oid = world.hub.repos["datasets/user/data"].commits[-1].oid
    assert f"- `user/data`: split `train`, revision `{oid}`" in found.text


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_and_its_resume_read_one_commit_although_the_repo_changes(world, processes):
    hub, run = world.hub, world.folder / f"based-{processes}"
    base = hub.repos["models/user/base"] = Repo("user/base", private=False)
    oid = base.commit("main", "first", dict(world.repo.at(STEPS[1]).files)).oid
    first_request = "GET /api/models/user/base"

    def push_after_the_first_request(method, path):
        if first_request in hub.requests[:-1] and len(base.commits) == 1:
            base.commit("main", "second", dict(world.repo.at(STEPS[3]).files))

    path = world.recipe(
        output_dir=str(run),
        model={"pretrained": "user/base"},
        tokenizer={"pretrained": "user/base"},
        training__max_steps=2,
        scheduler__num_warmup_steps=1,
    )
    hub.requests.clear()
    hub.fault = push_after_the_first_request
    if processes == 1:
        result = world.train(path)
    else:
        command = small.command(path, engine="ddp", processes=processes)
        result = world.warm.run("accelerate.commands.launch", *command[3:])
    hub.fault = None
    assert result.returncode == 0, result.stderr
    assert len(base.commits) == 2
    read = {path.partition("/resolve/")[2].split("/")[0] for path in hub.requests if "user/base/resolve/" in path}
    assert read == {oid}
    message = f"model.pretrained: user/base is loaded at commit {oid}"
    events = [row.get("event") for row in map(json.loads, (run / "metrics.jsonl").open())]
    assert message in result.stderr and message in events
    recorded = json.loads((run / "environment.json").read_text())["hub_commits"]
    assert recorded == {"model.pretrained": oid, "tokenizer.pretrained": oid}
    hub.requests.clear()
    result = world.train(path, "--training.max_steps=3")
    assert result.returncode == 0 and message in result.stderr, result.stderr
    assert not [path for path in hub.requests if "user/base/resolve/" in path and oid not in path]
    assert json.loads((run / "environment.json").read_text())["hub_commits"] == recorded


def test_a_hub_model_is_evaluated(world):
    result = world.cli("evaluate", "user/tiny", "--data", world.folder / "corpus.jsonl", "--block-size", 32)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["documents"] == 200


def test_wrong_names_and_folders_give_a_message(world):
    missing = world.push(world.folder / "nowhere", "user/tiny")
    assert missing.returncode == 2 and "nor a run folder with checkpoints" in missing.stderr
    refused = world.push(world.folder / "run", "not a name!")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "not a name!" in refused.stderr
    with pytest.raises(RecipeError, match="hub: `repo_id`: 'a--b' is not a valid repo id"):
        load_recipe(world.recipe(), ["--hub.repo_id=a--b"])
    with pytest.raises(RecipeError, match="is not of the form hub://USER/NAME@step-00001000"):
        load_recipe(world.recipe(), ["--checkpoint.resume_from=hub://user/tiny"])


def test_the_card_has_the_measured_figures_and_keeps_edits(world):
    run = world.folder / "run"
    path = run / "model" / "README.md"
    text = path.read_text()
    found = ModelCard(text)
    assert found.data.datasets is None and found.data.license == "apache-2.0"
    last = rows(run, "eval/loss")[8]
    results = {result.metric_type: result for result in found.data.eval_results}
    assert results["loss"].metric_value == round(last["eval/loss"], 4)
    assert results["loss"].metric_args == {"interval_95": [round(end, 4) for end in last["eval/loss_interval"]]}
    for part in ("tokens/s", "FLOP", "hardware", "from 'the river', at step 8", "--num_processes 1", "recipe.yaml"):
        assert part in text, part
    assert "CO2" not in text, "it was not measured"
    # Results that a tracker or an evaluation adds later, and a person's edits.
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "tasks/pairs/acc": 0.5, "tasks/pairs/acc_stderr": 0.0625}) + "\n")
    (run / "emissions.csv").write_text("emissions,country_name\n0.0012,Iceland\n")
    edited = text.replace("license: apache-2.0", "license: mit\nmine: 1").replace(
        "- hfpretrain\n", "- hfpretrain\n- small\n"
    )
    begin = "<!-- hfpretrain: generated data,"
    edited = edited.replace(begin, f"Do **not** use it for poems.\n\n{begin}").replace("## Data", "## Dated")
    path.write_text(edited + "\nThe end.\n")
    result = world.cli("card", run)
    assert result.returncode == 0, result.stderr
    after = ModelCard(path.read_text())
    assert "Do **not** use it for poems." in after.text and "\nThe end.\n" in after.text
    assert "## Data" in after.text and "## Dated" not in after.text
    metadata = after.data.to_dict()
    assert metadata["mine"] == 1 and metadata["tags"] == ["hfpretrain", "small"] and metadata["license"] == "apache-2.0"
    assert "| pairs | acc | 0.5000 | 0.0625 |" in after.text and "1.2 g CO2 (codecarbon)" in after.text
    assert metadata["co2_eq_emissions"]["emissions"] == 1.2
    task = next(result for result in after.data.eval_results if result.dataset_type == "pairs")
    assert (task.metric_value, task.metric_args) == (0.5, {"stderr": 0.0625})
    # A person may also edit the card on the Hub.
    world.repo.commit("main", "edit", {**world.repo.at("main").files, "README.md": path.read_bytes()})
    path.write_text(text)
    card.copy_hub_edits(path, world.repo.at("main").files["README.md"].decode())
    assert "Do **not** use it for poems." in path.read_text() and "mine: 1" in path.read_text()
    # If both cards were edited, no edit is lost.
    card.copy_hub_edits(path, text + "Words on the Hub.\n")
    assert "Do **not** use it for poems." in path.read_text()
    kept = path.with_name("README.hub.md")
    assert kept.read_text().endswith("Words on the Hub.\n")
    kept.unlink()


def test_a_push_to_main_deletes_only_files_of_an_earlier_export(world):
    model, repo = world.folder / "run" / "model", world.repo
    stored = repo.at("main").files
    assert stored["SHA256SUMS"] == (model / "SHA256SUMS").read_bytes()
    revision = repo.at(STEPS[1]).files
    sums = dict(line.split("  ")[::-1] for line in revision["SHA256SUMS"].decode().splitlines()[1:])
    assert sums.keys() == {name for name in revision if "/" not in name} - {"README.md", "SHA256SUMS", ".gitattributes"}
    assert all(hashlib.sha256(revision[name]).hexdigest() == checksum for name, checksum in sums.items())
    copy = world.folder / "pushed-copy"
    shutil.copytree(model, copy)
    assert world.push(copy, "user/kept").returncode == 0
    kept = world.hub.repos["models/user/kept"]
    theirs = {"lora/adapter_model.safetensors": b"lora", "mine.safetensors": b"mine"}
    kept.commit("main", "theirs", {**kept.at("main").files, **theirs})
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    files.add_sums(copy, [copy / "chat_template.jinja"])
    assert world.push(copy, "user/kept").returncode == 0 and "chat_template.jinja" in kept.at("main").files
    shutil.copy(model / "SHA256SUMS", copy)
    (copy / "chat_template.jinja").unlink()
    assert world.push(copy, "user/kept").returncode == 0
    assert "chat_template.jinja" not in kept.at("main").files and kept.at("main").files.items() >= theirs.items()
    (copy / "config.json").write_text("{}")
    damaged = world.push(copy, "user/kept")
    assert damaged.returncode == 2 and "config.json has another checksum" in damaged.stderr
