"""Speed of the data loader: tokens per second of random blocks in one process, and the time to start.

    python benchmarks/loader.py [--rows 200000] [--block-size 1024] [--rounds 7]

Rows: `copy` reads the same random rows with one numpy call into int64, which is the limit; `blocks` is `Blocks`; `step`
is all data of a training step, with order, labels, document positions and the ledger's checksum. Then the time of a
first step at step 0 and at 99% of an index of 10^9 blocks. The order is computed, not stored, so the index needs no
memory.
"""

import argparse
import statistics
import time

import numpy as np

from hfpretrain.data.batches import Blocks, TrainingData
from hfpretrain.data.order import TrainingOrder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    array = draw.integers(0, 50_000, (args.rows, args.block_size), dtype=np.uint16)
    array[draw.random(array.shape) < 0.002] = 0
    blocks = Blocks(np.array_split(array, max(1, args.rows // 512)))
    keywords = {"seed": 0, "micro_batch_size": 64, "process_index": 0, "num_processes": 1, "eos_token_id": 0}
    keywords["document_masking"] = True
    data = TrainingData([blocks], [], accumulation_steps=8, **keywords)
    count = 512
    rates: dict[str, list[float]] = {"copy": [], "blocks": [], "step": []}
    for number in range(args.rounds + 1):
        rows = draw.integers(0, args.rows, count)
        for name, call in (
            ("copy", lambda rows=rows: array[rows].astype(np.int64)),
            ("blocks", lambda rows=rows: blocks[rows]),
            ("step", lambda number=number: data.step(number)),
        ):
            start = time.perf_counter()
            call()
            rates[name].append(count * args.block_size / (time.perf_counter() - start))
    print("| random blocks | million tokens/s, median | of copy, median (min to max) |\n|---|---|---|")
    for name, values in rates.items():
        ratios = sorted(value / limit for value, limit in zip(values[1:], rates["copy"][1:], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {statistics.median(values[1:]) / 1e6:,.0f} | {spread} |")
    size, per_step = 10**9, 512
    for stages, what in (([], "one stream"), ([(0, [0.7, 0.3]), (10**8, [0.2, 0.8])], "mixture with a stage")):
        for position in (0, int(0.99 * size) // per_step * per_step):
            times = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                order = TrainingOrder([size] * (2 if stages else 1), stages, seed=0)
                order(np.arange(position, position + per_step))
                times.append(time.perf_counter() - start)
            milliseconds = statistics.median(times) * 1e3
            print(f"first {per_step} indices of 10^9 blocks, {what}, from {position:,}: {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()
