"""A process ends with its exit code while a thread runs native code."""

import subprocess
import sys

import pytest

ENDING = """
import atexit, itertools, os, signal, sys, time
from tokenizers import Tokenizer, models, trainers
from hfpretrain.data import threads

def train():
    if sys.argv[1] == "starting":
        os.kill(os.getpid(), signal.SIGTERM)
    if sys.argv[1] != "finished":
        Tokenizer(models.BPE()).train_from_iterator(("word" for _ in itertools.count()), trainers.BpeTrainer())

class Global:
    def __del__(self, write=os.write):
        write(1, b"shut down")

def stop(*_):
    raise KeyboardInterrupt

kept = Global()
atexit.register(print, "atexit ran")
signal.signal(signal.SIGTERM, stop)
try:
    threads.start_daemon(train, "tokenizer")
    time.sleep(0.5)
except KeyboardInterrupt:
    time.sleep(0.2)
threads.exit_process(75)
"""


@pytest.mark.parametrize("thread, shut_down", [("running", ""), ("starting", ""), ("finished", "shut down")])
def test_the_interpreter_is_shut_down_only_if_no_native_thread_runs(thread, shut_down):
    ended = subprocess.run([sys.executable, "-c", ENDING, thread], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (75, f"atexit ran\n{shut_down}"), ended
