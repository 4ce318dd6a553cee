"""A process that has imported hfpretrain, with its own environment, and forks a child for each command.

    with WarmProcess(hub.environment(tmp_path)) as warm:
        result = warm.run("hfpretrain.cli", "push", run, "user/tiny")

Most of the time of a short command is spent on imports. `conftest.train` forks as well, but huggingface_hub reads its
environment when it is imported, so commands that use another Hub need another process to fork from. A training run
verifies its export in the same process here, since starting another interpreter would take longer than the training.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent


class WarmProcess:
    """Runs `python -m MODULE ARGUMENTS` or `python -c CODE ARGUMENTS` as forks of one process.

    The process lives within a `with` block.
    """

    def __init__(self, env: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(
        self, module: str, *arguments: object, max_file_size: int | None = None, timeout: int = 300, **env: str
    ) -> subprocess.CompletedProcess:
        """Run a command and return it when it is finished.

        `max_file_size`: bytes beyond which a write to a file fails. `env`: further environment variables, for code
        that reads them after the imports.
        """
        with tempfile.TemporaryDirectory() as output:
            request = [module, list(map(str, arguments)), output, max_file_size, timeout, env]
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            texts = [Path(output, name).read_text() for name in ("stdout", "stderr")]
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired([module, *arguments], timeout, *texts)
        return subprocess.CompletedProcess([module, *arguments], code, *texts)


def _run(module: str, arguments: list[str], output: str, max_file_size: int | None, timeout: int, env: dict) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    gc.freeze()
    os.environ.update(env)
    signal.alarm(timeout)
    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    from hfpretrain.checkpoints import verify

    verify.verify_in_fresh_process = lambda run, trust_remote_code=False, _=None: verify.verify_export(
        run / "model", run / verify.REFERENCE, trust_remote_code
    )
    if module == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<code>", "exec"), {"__name__": "__main__"})
        sys.exit(0)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main())


def _serve() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as an export sets it before it imports DeepSpeed
    modules = ("hfpretrain.train", "hfpretrain.cli", "hfpretrain.publishing.publisher", "hfpretrain.evaluation.score")
    libraries = ("matplotlib.figure", "matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama")
    for name in (*modules, *libraries, *(["deepspeed"] if find_spec("deepspeed") else [])):
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which is not on the path of users
    _serve()
