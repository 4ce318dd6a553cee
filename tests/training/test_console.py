"""A closed or full standard output does not end a process."""

import os
import subprocess
import sys

import pytest
import small
from conftest import ROOT, environment, rows, write_recipe

WRITE = """
import logging, os, sys, warnings
import tqdm
before = logging.StreamHandler()  # as libraries make them when they are imported
logging.getLogger("library").addHandler(before)
from hfpretrain.training import console
console.keep_from_failing("stdout", "stderr")
logging.basicConfig(format="%(message)s")
for number in range(3000):
    print("a line on standard output, flushed", flush=True)
    print("a line that is buffered", number)
    tqdm.tqdm.write("a line above the bar", file=sys.stderr)
    logging.warning("logged")
    logging.getLogger("library").warning("a library's")
bar = tqdm.tqdm(total=3)
bar.update()
bar.close()
warnings.warn("a warning", stacklevel=1)
print("the last line, \u6f22", end="")
with open(sys.argv[1], "w") as file:
    file.write(repr(console.write_errors))
"""


def run_writer(folder, **streams):
    """Exit code of a process that writes many lines, and its write errors by stream."""
    out = folder / "lost"
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(out)], cwd=ROOT, env=environment(), **streams)
    if process.stdout is not None:
        assert process.stdout.readline()
        process.stdout.close()
    return process.wait(timeout=60), eval(out.read_text())


def test_a_closed_pipe_does_not_end_a_process(folder):
    code, lost = run_writer(folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert code == 0 and lost == dict.fromkeys(("stdout", "stderr"), "Broken pipe")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_does_not_end_a_process(folder):
    with open("/dev/full", "w") as full:
        code, lost = run_writer(folder, stdout=full, stderr=full)
    assert code == 0 and lost == dict.fromkeys(("stdout", "stderr"), "No space left on device")


def test_closed_descriptors_do_not_end_a_process(folder):
    command = f'exec "{sys.executable}" -c "$WRITE" "{folder / "lost"}" >&- 2>&-'
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment(WRITE=WRITE), timeout=60)
    assert result.returncode == 0 and (folder / "lost").read_text() == "{}"


def test_an_ascii_terminal_gets_all_lines_with_escapes(folder):
    env = environment(PYTHONIOENCODING="ascii")
    command = [sys.executable, "-c", WRITE, str(folder / "lost")]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 6001 and lines[-1] == r"the last line, \u6f22" and lines[-2] == "a line that is buffered 2999"
    for text in ("a line above the bar", "logged", "a library's", "UserWarning: a warning", "1/3"):
        assert text in result.stderr


@pytest.mark.parametrize("engine", [None, pytest.param("ddp", marks=pytest.mark.slow)])
def test_training_continues_when_nobody_reads_its_output(folder, engine):
    """`... 2>&1 | head -1`"""
    code = folder / "code"
    process = subprocess.Popen(
        small.command(write_recipe(folder), engine=engine),
        cwd=ROOT,
        env=environment(HFPRETRAIN_EXIT_CODE_FILE=str(code)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0 and code.read_text() == "0\n"
    assert (folder / "run" / "model" / "model.safetensors").exists()
    assert any(
        "stderr can no longer be written to (Broken pipe)" in row["event"]
        for row in rows(folder / "run", "event").values()
    )


def command(text):
    return subprocess.run(
        ["bash", "-c", text], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )


def test_a_command_fails_if_its_output_is_lost_but_prepare_finishes_its_work(folder):
    python, recipe = f"{sys.executable} -m hfpretrain.cli", write_recipe(folder)
    assert command(f"{python} schema | true; exit ${{PIPESTATUS[0]}}").returncode == 0  # nobody reads it
    full = command(f"{python} schema > /dev/full")
    assert full.returncode == 1 and "No space left on device" in full.stderr, full
    assert command(f"{python} schema >&-").returncode == 0
    assert command(f"PYTHONIOENCODING=ascii {python} check {recipe}").returncode == 0
    result = command(f"{python} prepare {recipe} 2>&1 | true; exit ${{PIPESTATUS[0]}}")
    assert result.returncode == 0 and list((folder / "prepared").glob("*/manifest.json")), result


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="the system has no terminals")
def test_train_returns_the_exit_code_of_the_run_although_its_terminal_is_closed(folder):
    (folder / "command.py").write_text(
        "import sys; from hfpretrain import cli; from hfpretrain.engines import start; "
        "start.run_to_end = lambda command: input() or 75; raise SystemExit(cli.main(sys.argv[1:]))"
    )
    ours, terminal = os.openpty()
    words = [sys.executable, folder / "command.py", "train", write_recipe(folder)]
    streams = {"stdin": subprocess.PIPE, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), **streams)
    assert b"starting accelerate launch" in os.read(ours, 1000)
    os.close(terminal)
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 75
