"""How a run that publishes behaves while the Hub fails, as a table: `python benchmarks/hub_trials.py`.

For each fault, a run of 8 steps pushes 4 checkpoints and its export with the real client to a server on localhost
(`tests/hub_server.py`). The table shows the state of the server at the end of the run, and after the fault is over and
`hfpretrain push` was called. Another run gets SIGTERM while an upload hangs.
"""

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import small

sys.path.insert(0, str(small.ROOT / "tests"))

from hub_server import Cut, HubError, HubServer

Fault = Callable[[str, str], Exception | float | None]


def always(outcome: Callable[[], Exception | float], pattern: str = "") -> Fault:
    """A fault of every request whose "METHOD PATH" matches."""
    return lambda method, path: outcome() if re.search(pattern, f"{method} {path}") else None


def first(number: int, outcome: Callable[[], Exception | float], pattern: str) -> Fault:
    """A fault of the first matching requests; later ones are answered."""
    left = [number]

    def fault(method: str, path: str) -> Exception | float | None:
        if left[0] and re.search(pattern, f"{method} {path}"):
            left[0] -= 1
            return outcome()
        return None

    return fault


_WRITES = r"^(POST|PUT) .*(create|commit|lfs/)"
FAULTS: dict[str, Callable[[], Fault]] = {
    "none": lambda: always(lambda: 0.0, "^$"),
    "slow: 1 s a request": lambda: always(lambda: 1.0),
    "401": lambda: always(lambda: HubError(401, "Invalid username or password."), _WRITES),
    "403": lambda: always(lambda: HubError(403, "You have read access only."), _WRITES),
    "409 at a commit, once": lambda: first(1, lambda: HubError(409, "Another commit is in progress."), "commit/step"),
    "429 at a commit, Retry-After 3": lambda: first(
        1, lambda: HubError(429, "Too many requests.", **{"Retry-After": "3"}), "commit/step"
    ),
    "500 at a commit, twice": lambda: first(2, lambda: HubError(500, "Internal error."), "commit/step"),
    "503 at an upload, twice": lambda: first(2, lambda: HubError(503, "Busy."), "^PUT"),
    "cut in the middle of an upload, twice": lambda: first(2, Cut, "^PUT"),
    "answer to a commit lost, once": lambda: first(1, lambda: Cut(done=True), "commit/step"),
    "answer to a tag lost, once": lambda: first(1, lambda: Cut(done=True), "/tag/"),
}
DOWN = ("down until the end of training", "gone for the whole run")


def pushed_so_far(hub: HubServer) -> str:
    """What is on the server: the number of revisions with branch and tag, and whether `main` has the export."""
    repo = hub.repos.get("models/user/tiny")
    if repo is None:
        return "no repo"
    whole = sum(repo.branches.get(name) == oid for name, oid in repo.tags.items())
    main = "main" if "model.safetensors" in repo.at("main").files else "no main"
    return f"{whole} of 4 revisions, {main}"


def trial(folder: Path, fault: str) -> list[str]:
    """Train with one fault; returns a row of the table."""
    folder.mkdir()
    small.write_jsonl(folder / "corpus.jsonl", small.small_text(200))
    keys = {"checkpoint__every_steps": 2, "hub__repo_id": "user/tiny", "hub__max_wait_seconds": 15}
    recipe = small.write_recipe(folder, **keys)
    with HubServer() as hub:
        env = hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(small.ROOT)}
        if fault in DOWN:
            hub.stop()
        else:
            hub.fault = FAULTS[fault]()
        start = time.monotonic()
        training = subprocess.Popen(
            [sys.executable, "-m", "hfpretrain.train", str(recipe)],
            cwd=small.ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        trained: list[float] = []

        def watch() -> None:
            assert training.stderr is not None
            for line in training.stderr:
                if line.startswith("step 8/8"):
                    trained.append(time.monotonic() - start)
                    if fault == DOWN[0]:
                        hub.start()

        reader = threading.Thread(target=watch)
        reader.start()
        assert training.stdout is not None
        output = training.stdout.read()
        code, seconds = training.wait(), time.monotonic() - start
        reader.join()
        at_end = pushed_so_far(hub) if fault != DOWN[1] else "nothing"
        if fault == DOWN[1]:
            hub.start()
        hub.fault = None
        push = [sys.executable, "-m", "hfpretrain.cli", "push", str(folder / "run"), "user/tiny"]
        pushed = subprocess.run(push, cwd=small.ROOT, env=env, capture_output=True, text=True)
        loss = small.rows(folder / "run", "export/loss_export")[8]["export/loss_export"]
        reasons = "; ".join(dict.fromkeys(re.findall(r"not pushed: (.*)", output))) or "everything is pushed"
        row = [fault, f"exit {code}, loss {loss:.6f}, step 8 after {trained[0]:.0f} s", f"{seconds - trained[0]:.0f} s"]
        return [*row, reasons, at_end, f"{pushed_so_far(hub)} (exit {pushed.returncode})"]


def stop_while_uploading(folder: Path) -> list[str]:
    """Train, and send SIGTERM while the upload of the first checkpoint hangs; returns a row of the table."""
    folder.mkdir()
    small.write_jsonl(folder / "corpus.jsonl", small.small_text(200))
    keys = {"checkpoint__every_steps": 50, "hub__repo_id": "user/tiny", "training__max_steps": 100_000}
    recipe = small.write_recipe(folder, **keys, logging__every_steps=50)
    with HubServer() as hub:
        env = hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(small.ROOT)}
        hub.fault = always(lambda: 600.0, "^PUT")
        command = [sys.executable, "-m", "hfpretrain.train", str(recipe)]
        with subprocess.Popen(command, cwd=small.ROOT, env=env, stdout=-1, stderr=-1) as training:
            while not any(request.startswith("PUT") for request in hub.requests):
                time.sleep(0.1)
            start = time.monotonic()
            training.send_signal(signal.SIGTERM)
            training.communicate()
            seconds = time.monotonic() - start
        hub.fault = None
        push = [sys.executable, "-m", "hfpretrain.cli", "push", str(folder / "run"), "user/tiny"]
        pushed = subprocess.run(push, cwd=small.ROOT, env=env, capture_output=True, text=True)
        repo = hub.repos["models/user/tiny"]
        saved = len(list((folder / "run" / "checkpoints").glob("step-*")))
        row = [
            "an upload hangs; SIGTERM",
            f"exit {training.returncode}, {saved} checkpoints",
            f"{seconds:.0f} s (to stop)",
        ]
        return [*row, "-", "no revision", f"{len(repo.tags)} revisions (exit {pushed.returncode})"]


def main() -> None:
    """Print the table."""
    header = ["fault", "training", "from step 8 to the end", "reported at its end"]
    print("|", " | ".join([*header, "on the server at its end", "after `hfpretrain push`"]), "|")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as root:
        for number, fault in enumerate([*FAULTS, *DOWN]):
            print("|", " | ".join(trial(Path(root) / str(number), fault)), "|", flush=True)
        print("|", " | ".join(stop_while_uploading(Path(root) / "stopped")), "|")


if __name__ == "__main__":
    main()
