import json
from dataclasses import replace

import pytest
from conftest import hfpretrain, write_recipe

from hfpretrain.cli import main
from hfpretrain.modeling.muon import MuonSizes
from hfpretrain.planning import memory, network


@pytest.mark.parametrize("flag", ["--shard-size", "--nvlink", "--infiniband", "--devices-per-node"])
def test_a_flag_of_scaling_is_refused_without_it(folder, flag, capsys):
    assert main(["plan", str(write_recipe(folder)), flag, "4"]) == 2
    error = capsys.readouterr().err
    assert f"{flag}: " in error and "--scaling" in error


@pytest.mark.parametrize(
    ("engine", "sent"),
    [
        ("ddp", 2 * 3 / 4 * 4000),
        ("fsdp2", 3 * 3 / 4 * (2 * 1000 + 2 * 800 + 4 * 1000)),  # the output embedding of 200 is gathered once
        ("hsdp", 3 * (1 / 2 * (2 * 1000 + 2 * 800 + 4 * 1000) + 2 * 1 / 2 * 4000 / 2)),
        ("zero1", 2 * 3 / 4 * 2000 + 3 / 4 * 2000),
        ("zero2", 3 * 2 * 3 / 4 * 2000 + 3 / 4 * 2000),
        ("zero3", 3 * 3 / 4 * (2000 + 2000 + 2000)),
    ],
)
def test_an_engine_sends_the_bytes_of_its_collectives(engine, sent):
    """1,000 parameters, 4 devices, 3 micro-steps in bf16; under hsdp two groups of 2."""
    sizes = memory.ModelSizes(1000, num_layers=2, largest_layer=300, output_embedding=200, buffers=0, moments=8000)
    exchanges = network.exchanges_per_step(engine, sizes, 4, 3, "bf16", shard_size=2)
    assert sum(exchange.sent_bytes for exchange in exchanges) == pytest.approx(sent)
    muon = MuonSizes(num_matrices=6, in_matrices=600, in_stacks=200, largest_matrix=100, largest_stack=200)
    with_muon = network.exchanges_per_step(engine, replace(sizes, muon=muon), 4, 3, "bf16", shard_size=2)
    more = {"fsdp2": 3 / 4 * 4 * 600 / 4, "hsdp": 1 / 2 * 4 * 600 / 2, "zero3": 3 / 4 * 4 * 800 / 4}
    more |= {"zero1": 3 / 4 * 4 * 50, "zero2": 3 / 4 * 4 * 50, "ddp": 0}
    assert sum(exchange.sent_bytes for exchange in with_muon) == pytest.approx(sent + more[engine])
    alone = network.exchanges_per_step(engine, sizes, 1, 1, "bf16", shard_size=1)
    assert sum(exchange.sent_bytes for exchange in alone) == 0


def test_an_exchange_takes_the_time_of_bandwidth_and_latency():
    cluster = network.Cluster(devices_per_node=2, nvlink=100.0, infiniband=10.0)

    def seconds(*arguments, **keywords):
        return network.Exchange(*arguments, **keywords).seconds(cluster)

    # In one node: NVLink, and a hop of 3.4 us. In two: each adapter of a node carries half, and one of the 3 hops takes
    # 14 us.
    assert seconds(1, 200.0, 2) == pytest.approx(1 / 2 * 200 / 100 + 3.4e-6, rel=1e-12)
    three_collectives = 3 / 4 * 200 / 20 + 3 * (2 * 3.4e-6 + 14e-6)
    assert seconds(1, 200.0, 4, num_collectives=3, num_repeats=5) == pytest.approx(5 * three_collectives)
    # A group across nodes has one device in each node. With two nodes, ring and tree are equally fast.
    assert seconds(2, 200.0, 2, stride=2) == pytest.approx(2 / 2 * 200 / 10 + 28e-6, rel=1e-12)
    tree = seconds(2, 0.0, 1024)
    assert tree == pytest.approx(2 * (4e-6 + 9 * 14e-6))


def test_a_scaling_table_shows_that_it_is_simulated_and_why_rows_are_missing(folder):
    recipe = str(write_recipe(folder, training__mixed_precision="bf16"))  # 8 sequences per step, 2 per micro-batch
    result = hfpretrain("plan", recipe, "--scaling", "2", "4", "8", "--device", "H100-80GB", "--shard-size", "2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 120 and lines[0].startswith("simulated scaling") and "not measured" in lines[0]
    assert any("hsdp" in line and "groups of --shard-size 2" in line for line in lines)
    assert any(line.split()[:2] == ["8", "all"] and "8 sequences" in line for line in lines)

    arguments = ("--scaling", "4", "--device", "H100-80GB", "--engine", "zero1", "--json")
    (row,) = json.loads(hfpretrain("plan", recipe, *arguments).stdout)["simulated"]
    assert row["sent_bytes"] == pytest.approx(3 * 3 / 4 * 2 * 39_072) and row["micro_steps"] == 1
    for wrong in (["--scaling", "1", "--device", "L4"], ["--scaling", "8", "--device", "cpu"]):
        assert hfpretrain("plan", recipe, *wrong).returncode == 2
