"""Training on two hosts: two network namespaces, joined by a virtual cable, with one process each.

The short form, two launchers on one host, is in `tests/test_slurm.py`.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment, rows, train, write_recipe

pytestmark = pytest.mark.slow
ADDRESSES = ("10.213.71.1", "10.213.71.2")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts():
    """Names of two network namespaces that reach each other and nothing else."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("two hosts need root and `ip` of iproute2")
    names = [f"hf{os.getpid()}-{number}" for number in (1, 2)]
    devices = [f"v{os.getpid()}-{number}" for number in (1, 2)]
    try:
        try:
            ip("netns", "add", names[0])
            ip("netns", "add", names[1])
            ip(
                "link",
                "add",
                devices[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                devices[1],
                "netns",
                names[1],
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces joined by veth: {error.stderr.strip()}")
        for name, device, address in zip(names, devices, ADDRESSES, strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        yield list(zip(names, devices, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(hosts, engine, recipe, *overrides, num_processes=2):
    """Start the same training on each host, as `recipes/launch.slurm` does."""
    processes = []
    for rank, (name, device) in enumerate(hosts):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.launch", "-q"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / f"{engine}_multinode.yaml")]
        command += ["--num_machines", "2", "--machine_rank", str(rank), "--num_processes", str(num_processes)]
        command += ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29500"]
        env = environment(GLOO_SOCKET_IFNAME=device, TP_SOCKET_IFNAME=device)
        pipe = subprocess.PIPE
        command += ["-m", "hfpretrain.train", str(recipe), *overrides]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True))
    return processes


def finish(processes):
    """Wait for the processes; returns the exit code and stderr of each."""
    try:
        return [(process.returncode, err) for process, (_, err) in [(p, p.communicate(timeout=300)) for p in processes]]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # the launcher then ends its workers, which have sessions of their own
                process.wait()


def received(hosts):
    """Bytes that each host has received over the cable."""
    lines = [subprocess.check_output(["ip", "-n", name, "-s", "-j", "link", "show", device]) for name, device in hosts]
    return [json.loads(line)[0]["stats64"]["rx"]["bytes"] for line in lines]


@pytest.fixture(scope="module")
def single(hosts, tmp_path_factory):
    """A recipe, and its run by one process."""
    from conftest import small_text, write_jsonl

    folder = tmp_path_factory.mktemp("hosts")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    recipe = write_recipe(folder, training__max_steps=5)
    assert train(recipe, f"--output_dir={folder / 'single'}").returncode == 0
    return recipe


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_hosts_train_the_same_as_one_process(hosts, single, engine):
    folder, before = single.parent, received(hosts)
    for code, stderr in finish(start(hosts, engine, single, f"--output_dir={folder / engine}")):
        assert code == 0, stderr
    alone, apart = (rows(folder / run, "loss") for run in ("single", engine))
    assert list(apart) == list(alone) == [1, 2, 3, 4, 5]
    for step, row in apart.items():
        assert row["loss"] == pytest.approx(alone[step]["loss"], rel=1e-5)
    # The two share memory and a disk, over which DeepSpeed could reduce. So check that gradients went over the cable.
    parameters = json.loads((folder / engine / "environment.json").read_text())["num_parameters"]
    for bytes_before, bytes_after in zip(before, received(hosts), strict=True):
        assert bytes_after - bytes_before > 5 * 4 * parameters
    perplexity = [rows(folder / run, "eval/perplexity")[5]["eval/perplexity"] for run in ("single", engine)]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-6)


def test_a_machine_that_starts_fewer_processes_is_refused(hosts, single):
    for code, stderr in finish(start(hosts, "ddp", single, num_processes=3)):
        assert code != 0 and "3 processes were requested, but 2 started" in stderr
