"""Loading files runs no code in them, and secrets are not written."""

import ast
import hashlib
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import small
import torch
import transformers
from conftest import (
    ROOT,
    launcher_environments,
    recipe_mapping,
    rows,
    run_module,
    script,
    small_text,
    train,
    write_jsonl,
    write_recipe,
)

from hfpretrain import cli, files, load_recipe
from hfpretrain.data import corpus, streaming
from hfpretrain.data.remote_copy import RemoteCopy
from hfpretrain.data.tokenizer import chat_template_problems, load_tokenizer, train_tokenizer
from hfpretrain.engines.start import launch_command
from hfpretrain.evaluation import token_perplexity
from hfpretrain.evaluation.checkpoint import load_checkpoint
from hfpretrain.evaluation.recipe_metrics import RecipeMetrics
from hfpretrain.ladder.rungs import Ladder
from hfpretrain.ladder.started_run import StartedRun
from hfpretrain.modeling.build import build_model
from hfpretrain.modeling.config import load_config
from hfpretrain.publishing import card
from hfpretrain.publishing.publisher import Failed, OutboxPusher, Pushed
from hfpretrain.recipe.redaction import is_redacted, redact, strip_folders
from hfpretrain.recipe.schema import (
    EvaluationSection,
    HubSection,
    ModelSection,
    Recipe,
    RecipeError,
    SourceSection,
    TokenizerSection,
)
from hfpretrain.recipe.yaml import parse_yaml

LLAMA = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TOKEN = "hf_plantedTokenThatNobodyMayEverSee"


def test_no_token_or_environment_variable_reaches_the_run_folder(folder):
    recipe = write_recipe(folder, checkpoint__every_steps=4, logging__trackers=["tensorboard"])
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN, "MY_VARIABLE": TOKEN, "AWS_SECRET_ACCESS_KEY": TOKEN}
    result = run_module("hfpretrain.train", recipe, env=secrets, ranks=launcher_environments("ddp"))
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert len(found) > 20
    assert [path for path in found if TOKEN.encode() in path.read_bytes()] == []


def test_pickles_are_loaded_with_weights_only_and_remote_code_only_if_the_recipe_trusts_it():
    for path in sorted((ROOT / "hfpretrain").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert not name.startswith(("pickle.", "marshal.")) and name not in ("eval", "exec"), (path, name)
            if name == "torch.load":
                assert keywords["weights_only"] == "True", path
            # Without the argument, transformers asks at the terminal.
            loads_code = ".Auto" in f".{name}" and name.endswith(".from_pretrained")
            given = keywords.get("trust_remote_code", "" if loads_code and None not in keywords else "False")
            assert given == "False" or given.endswith("trust_remote_code"), (path, name)


def test_a_failing_tracker_is_retried_while_training_continues(folder):
    recipe = write_recipe(folder, logging__trackers=["tensorboard"])
    code = (
        "import sys; from accelerate.tracking import TensorBoardTracker\n"
        "log = TensorBoardTracker.log\n"
        "def throwing(self, values, step=None, **keywords):\n"
        "    if step == 3: raise ConnectionError('its server is down')\n"
        "    log(self, values, step=step, **keywords)\n"
        "TensorBoardTracker.log = throwing\n"
        "from hfpretrain.train import main; sys.exit(main())\n"
    )
    (folder / "throwing.py").write_text(code)
    result = script(folder / "throwing.py", recipe)
    assert result.returncode == 0, result.stderr
    assert "tensorboard failed" in result.stderr and "ConnectionError: its server is down" in result.stderr
    assert "tensorboard works again" in result.stderr and "except for 1" in result.stderr
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "event" in line] == [3, 8]
    assert list(rows(folder / "run", "loss")) == list(range(1, 9))


def touching(marker, *lines):
    """Python code that creates the file `marker` when it is run."""
    return f"open({str(marker)!r}, 'w').close()\n" + "\n".join(lines) + "\n"


class Payload:
    """Creates a file when its pickle is loaded."""

    def __init__(self, marker):
        self._marker = str(marker)

    def __reduce__(self):
        return open, (self._marker, "w")


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "code-was-run"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a model and a tokenizer, as one would download it."""
    folder = tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(folder)
    section = TokenizerSection(algorithm="byte_level_bpe", vocab_size=300)
    train_tokenizer(section, small_text(20)).save_pretrained(folder)
    return folder


def edited(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_code(plain, folder, marker):
    """A copy whose model and tokenizer are classes of its own files."""
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    classes = {
        "configuration_own.py": ("from transformers import LlamaConfig", "class OwnConfig(LlamaConfig):"),
        "modeling_own.py": ("from transformers import LlamaForCausalLM", "class OwnModel(LlamaForCausalLM):"),
        "tokenization_own.py": ("from transformers import PreTrainedTokenizerFast as Fast", "class OwnFast(Fast):"),
    }
    bodies = {"configuration_own.py": "    model_type = 'own'", "tokenization_own.py": "    pass"}
    bodies["modeling_own.py"] = "    config_class = OwnConfig"
    for name, (imported, head) in classes.items():
        own = "from .configuration_own import OwnConfig" if name == "modeling_own.py" else ""
        (folder / name).write_text(touching(marker, imported, own, head, bodies[name]))
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edited(folder, "config.json", model_type="own", architectures=["OwnModel"], auto_map=auto)
    auto = {"AutoTokenizer": [None, "tokenization_own.OwnFast"]}
    edited(folder, "tokenizer_config.json", tokenizer_class="OwnFast", auto_map=auto)
    return folder


def test_code_beside_a_model_or_tokenizer_is_not_run(plain, tmp_path, marker):
    folder = str(with_code(plain, tmp_path / "own", marker))
    section = ModelSection(pretrained=folder)
    for call in (
        lambda: load_config(section),
        lambda: build_model(section, transformers.LlamaConfig()),
        lambda: load_tokenizer(TokenizerSection(pretrained=folder)),
        lambda: load_checkpoint(folder),
    ):
        with pytest.raises(RecipeError, match="custom code"):
            call()


def test_code_that_the_recipe_trusts_is_run_in_training_and_export(plain, folder, tmp_path):
    own = with_code(plain, tmp_path / "own", tmp_path / "marker")
    section = {"pretrained": str(own), "trust_remote_code": True}
    result = train(write_recipe(folder, model=section, tokenizer={"pretrained": str(plain)}, training__max_steps=3))
    assert result.returncode == 0 and (tmp_path / "marker").exists(), result.stderr
    assert "auto_map" in json.loads((folder / "run" / "model" / "config.json").read_text())
    assert cli.main(["verify", str(folder / "run")]) == 2  # without the flag that trusts it
    assert cli.main(["verify", str(folder / "run"), "--trust-remote-code"]) == 0


def test_pickled_weights_and_adapters_run_no_code(plain, tmp_path, marker):
    shutil.copytree(plain, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(marker)}, tmp_path / "pickled" / "pytorch_model.bin")
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    base = {"peft_type": "LORA", "base_model_name_or_path": str(with_code(plain, tmp_path / "own", marker)), "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(base))
    torch.save({"weight": Payload(marker)}, adapter / "adapter_model.bin")
    for path in (tmp_path / "pickled", adapter):
        section = ModelSection(pretrained=str(path))
        with pytest.raises(RecipeError):
            build_model(section, load_config(section))
        with pytest.raises(RecipeError):
            load_checkpoint(str(path))


def test_loading_the_state_of_a_stream_runs_no_code(tmp_path, marker):
    torch.save({"step": Payload(marker)}, tmp_path / "data-0.pt")
    with pytest.raises(pickle.UnpicklingError):
        streaming.load_lane_states(tmp_path)


def test_dataset_scripts_and_pickled_tables_run_no_code(tmp_path, marker):
    script = tmp_path / "data" / "data.py"
    script.parent.mkdir()
    script.write_text(touching(marker))
    (tmp_path / "table.pkl").write_bytes(pickle.dumps(Payload(marker)))
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(tmp_path / "table.pkl", "1.pyd")
        shard.add(tmp_path / "table.pkl", "../../1.pickle")
        shard.add(tmp_path / "table.pkl", "1.pth")
    for source in (
        {"path": str(script.parent)},
        {"path": str(script)},
        {"path": "pandas", "data_files": str(tmp_path / "table.pkl")},
        {"path": "webdataset", "data_files": str(tmp_path / "shard.tar"), "text_column": "pyd"},
    ):
        with pytest.raises(RecipeError):
            list(corpus.Reader(SourceSection(**source)).read())


@pytest.mark.parametrize("payload", ["''.__class__.__mro__", "cycler.__init__.__globals__.os.system('true')"])
def test_an_unsafe_chat_template_is_refused(payload):
    (problem,) = chat_template_problems({"tokenizer": {"chat_template": "{{ " + payload + " }}"}})
    assert "unsafe" in problem.message


def test_yaml_creates_no_objects(tmp_path, marker):
    text = f"a: !!python/object/apply:builtins.open [{marker}, w]"
    with pytest.raises(RecipeError):
        parse_yaml(text, "a recipe")
    assert card.with_edits(f"---\n{text}\n---\nwords", "---\nb: 1\n---\n").endswith("words\n")


def test_metrics_and_tasks_of_others_are_run_only_where_the_recipe_trusts_them(folder, tmp_path, monkeypatch):
    marker = tmp_path / "code-was-run"
    script = tmp_path / "own" / "own.py"
    script.parent.mkdir()
    script.write_text(touching(marker))
    shutil.copytree(script.parent, tmp_path / "accuracy")
    (tmp_path / "accuracy" / "own.py").rename(tmp_path / "accuracy" / "accuracy.py")
    monkeypatch.chdir(tmp_path)  # with a folder named like a metric that evaluate hosts
    lm_eval = {"tasks": ["river"], "include_path": str(script.parent)}
    for section, key in (
        ({"metrics": [str(script)]}, "evaluation.metrics.0"),
        ({"metrics": ["f1", str(script.parent)]}, "evaluation.metrics.1"),
        ({"metrics": ["accuracy"]}, "evaluation.metrics.0"),
        ({"metrics": ["user/space"]}, "evaluation.metrics.0"),
        ({"metrics": ["user/space"], "trust_remote_code": True}, "metric_revisions"),
        ({"lm_eval": lm_eval}, "evaluation.lm_eval.include_path"),
    ):
        recipe = write_recipe(folder, evaluation=section)
        with pytest.raises(RecipeError, match=key):
            load_recipe(recipe)
        if "metrics" in section:
            with pytest.raises(RecipeError):
                RecipeMetrics(EvaluationSection(**section), is_main=True)
    assert not marker.exists()
    for section in (
        {"metrics": ["f1", "evaluate-metric/f1", token_perplexity.__file__]},
        {"lm_eval": {"tasks": ["arc_easy"]}},
    ):
        load_recipe(write_recipe(folder, evaluation=section))
    load_recipe(write_recipe(folder, evaluation={"lm_eval": lm_eval, "trust_remote_code": True}))


def test_a_metric_of_a_space_is_loaded_at_the_commit_that_was_trusted(tmp_path, monkeypatch):
    downloads = []

    def snapshot_download(repo_id, *, revision, repo_type, allow_patterns):
        downloads.append((repo_id, revision, repo_type))
        (tmp_path / "space.py").write_text(METRIC)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    section = {"metrics": ["user/space"], "trust_remote_code": True, "metric_revisions": {"user/space": "a" * 40}}
    metrics = RecipeMetrics(EvaluationSection(**section), is_main=True)
    metrics.add(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, -100]]))
    assert downloads == [("user/space", "a" * 40, "space")] and metrics.compute() == {"space/count": 2.0}


def test_names_that_lead_out_of_a_folder_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("as it was")
    folder, there = tmp_path / "folder", tmp_path / "there"
    folder.mkdir()
    there.mkdir()
    for name in ("../outside", str(outside), "a/../../outside"):
        entry = {name: {"size": 3, "sha256": "0" * 64}}
        (folder / "manifest.json").write_text(json.dumps({"files": entry}))
        assert "outside of the folder" in files.damage(folder)
        with pytest.raises(RecipeError, match="outside of the folder"):
            RemoteCopy(there.as_uri()).download(folder, entry)
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        lines = f"{'0' * 64}  {name}\n"
        (folder / "SHA256SUMS").write_text(f"# the lines below: {hashlib.sha256(lines.encode()).hexdigest()}\n{lines}")
        assert "outside of the folder" in files.sums_damage(folder)
    assert outside.read_text() == "as it was"


METRIC = """
import datasets
import evaluate


class Space(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"count": len(references)}
"""


S3 = (
    "https://b.s3.amazonaws.com/a.jsonl?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA1%2F20260101&"
    "X-Amz-Date=20260101T000000Z&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Signature=hidden1&versionId=v7"
)
AZURE = "https://a.blob.core.windows.net/c/a.jsonl?sv=2024-11-04&st=2026-01-01&se=2026-02-01&sr=b&sp=r&sig=hidden1%3D"
GOOGLE = "https://storage.googleapis.com/b/a.jsonl?GoogleAccessId=me%40x&Expires=1767225600&Signature=hidden1%2B"


@pytest.mark.parametrize(
    "address, kept",
    [
        ("https://user:hidden1@host:8080/a.jsonl", "https://***@host:8080/a.jsonl"),
        ("https://hidden1@host/a.jsonl", "https://***@host/a.jsonl"),
        ("ftp://user:hid@den1@host/a", "ftp://***@host/a"),
        ("zip://*.txt::https://user:hidden1@host/a.zip", "zip://*.txt::https://***@host/a.zip"),
        ("s3://key:hidden1@bucket/a", "s3://***@bucket/a"),
        ("https://host/a?file=b.jsonl&token=hidden1&part=2", "https://host/a?file=b.jsonl&token=***&part=2"),
        ("https://host/a?api_key=hidden1#access_token=hidden1", "https://host/a?api_key=***#access_token=***"),
        ("https://host/a?AWSAccessKeyId=hidden1&Expires=1&Signature=hidden1&v=1", None),
        ("https://host/a?Policy=hidden1&Key-Pair-Id=hidden1&Signature=hidden1", None),
        (f"cannot read {S3}: 403", None),
        (AZURE, None),
        (GOOGLE, None),
        (f"the token hf_{'hidden1' * 4} is wrong", "the token hf_*** is wrong"),
    ],
)
def test_secrets_in_addresses_are_hidden_and_a_new_signature_changes_nothing(address, kept):
    found = redact(address)
    assert "hidden1" not in found and "user" not in found and redact(found) == found
    assert kept in (None, found) and is_redacted(found) == ("://" in address)
    signed_again = address.replace("hidden1", "hidden2").replace("2026", "2027").replace("17672", "17673")
    assert redact(signed_again) == found


@pytest.mark.parametrize(
    "text",
    [
        "hub://user/name@step-00000010",
        "hub://name@step-00000010",
        "abfs://container@account.dfs.core.windows.net/a.jsonl",
        "hf://datasets/user/name@main/a.jsonl",
        "https://host/a?st=1&se=2&expires=3&tokenizer=gpt2&max_tokens=5&key=a/b.jsonl",
        "data/part-?.jsonl",
        "did you mean lr? token=1",
        "https://host:8080/@user/a",
    ],
)
def test_text_without_secrets_is_unchanged(text):
    assert redact(text) == text


@pytest.fixture(scope="module")
def secret_run(tmp_path_factory):
    """A run with a private umask, whose text came from an address with a password and a signature.

    Returns its folder, its output, and a function that trains it with another signature.
    """
    folder = tmp_path_factory.mktemp("secret")
    write_jsonl(folder / "corpus.jsonl", small_text(200))

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://planted-user:planted-pass@127.0.0.1:{server.server_port}/corpus.jsonl?X-Amz-Date=1&"

    def run(signature, *arguments, start=train):
        source = {"path": "json", "data_files": f"{address}X-Amz-Signature=planted-{signature}"}
        recipe = write_recipe(folder, data__sources=[source], logging__trackers=["tensorboard"])
        os.chmod(recipe, 0o600)
        return start(recipe, *arguments)

    before = os.umask(0o077)
    try:
        result = run("first", "--training.max_steps=3", start=small.train)  # a fork would have the server's umask
    finally:
        os.umask(before)
    assert result.returncode == 0, result.stderr
    (folder / "recipe.yaml").unlink()
    run.address = f"{address}X-Amz-Signature=planted-first"
    yield folder, result, run
    server.shutdown()


def test_secrets_in_addresses_are_neither_written_nor_printed(secret_run):
    folder, result, _ = secret_run
    assert "planted" not in result.stdout + result.stderr
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in found) and any(path.name == "README.md" for path in found)
    assert [path for path in found if b"planted" in path.read_bytes()] == []
    assert "127.0.0.1" in (folder / "run" / "model" / "README.md").read_text()


def test_a_private_umask_leaves_everything_private(secret_run):
    folder, _, _ = secret_run
    written = [path for name in ("run", "prepared") for path in (folder / name).rglob("*")]
    assert len(written) > 30
    assert [path for path in written if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_a_run_resumes_with_a_newly_signed_address(secret_run):
    folder, _, run = secret_run
    prepared = list((folder / "prepared").glob("*/manifest.json"))
    result = run("second", "--training.max_steps=4", "--scheduler.name=cosine")
    assert result.returncode == 0 and "step-00000003" in result.stderr, result.stderr
    assert list((folder / "prepared").glob("*/manifest.json")) == prepared and len(prepared) == 1
    missing = run("third", "--data.sources.0.path=csv", "--data.sources.0.text_column=none")
    assert missing.returncode == 2 and "planted" not in missing.stderr, missing.stderr
    with pytest.raises(RecipeError, match=r"\*\*\*"):
        corpus.Reader(load_recipe(folder / "run" / "recipe.yaml").data.sources[0])


@pytest.mark.slow
def test_a_ladder_trains_from_an_address_with_a_secret_that_it_does_not_write(secret_run):
    folder, _, run = secret_run
    source = {"path": "json", "data_files": run.address}
    changes = {"training__max_steps": 60, "scheduler": {}, "data__sources": [source]}
    made = Ladder(
        Recipe.model_validate(recipe_mapping(folder, **changes)),
        (4000, 10000, 18000, 30000),
        [1.0],
        1,
        folder / "ladder",
    )
    made.write_recipes()
    (rung, *_) = made.rungs
    StartedRun([*launch_command(None, None), str(rung.path)], rung.secrets).finish(rung.run)
    assert rung.read_result()
    found = [path for path in (folder / "ladder").rglob("*") if path.is_file()]
    assert rung.path in found and [path for path in found if b"planted" in path.read_bytes()] == []
    alone = train(rung.path, f"--output_dir={folder / 'alone'}")
    assert alone.returncode == 2 and "***" in alone.stderr


def test_a_state_of_an_older_version_with_a_secret_is_not_published(tmp_path):
    entry = tmp_path / "outbox" / "step-00000001"
    for name, content in {
        "train_state.json": '{"run_id": "a", "ledger": "b"}',
        "model/config.json": "{}",
        "state/recipe.yaml": "data_files: https://user:planted@host/a.jsonl",
    }.items():
        (entry / name).parent.mkdir(parents=True, exist_ok=True)
        (entry / name).write_text(content)

    class Repo:
        pushed = None

        def open(self):
            return "user/a"

        def revision_commit(self, *_):
            return None

        def push_revision(self, name, title, text, content):
            self.pushed = content
            return "commit"

    finish = threading.Event()
    finish.set()
    for push_state in (True, False):
        repo = Repo()
        pusher = OutboxPusher(tmp_path, HubSection(repo_id="user/a", push_state=push_state), repo)
        *_, last = pusher.push_until_finished(finish)
        if push_state:
            assert isinstance(last, Failed) and "secret" in last.reason and repo.pushed is None
        else:
            assert isinstance(last, Pushed) and repo.pushed == {"config.json": entry / "model" / "config.json"}


def test_a_card_contains_no_folder_of_the_machine(secret_run):
    folder, _, _ = secret_run
    text = (folder / "run" / "model" / "README.md").read_text()
    assert str(folder) not in text and "output_dir: run\n" in text
    given = {"a": ["/home/me/x.jsonl", "file:///home/me/y", "data/z", "~/w", "text"], "prompts": ["/imagine"]}
    assert strip_folders(given, texts=("prompts",)) == {
        "a": ["x.jsonl", "y", "data/z", "w", "text"],
        "prompts": ["/imagine"],
    }


def test_logs_and_tracebacks_hide_secrets():
    code = (
        "import logging; from hfpretrain.recipe import redaction; redaction.redact_logs(); logging.basicConfig()\n"
        "logging.getLogger('other').warning('GET %s', 'https://u:planted@h/a?token=planted')\n"
        "try: raise OSError('https://u:planted@h')\n"
        "except OSError: logging.exception('failed')\n"
        "raise RuntimeError('https://u:planted@h')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "planted" not in result.stderr
    assert result.stderr.count("https://***@h") == 3 and "RuntimeError" in result.stderr
