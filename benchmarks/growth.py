"""How costs grow, as a table and a plot: data of a step with the dataset, start-up with the checkpoint's step, memory
of a loss with the vocabulary and of a micro-batch with its context, preparation with the corpus.

    python benchmarks/growth.py [--output benchmarks/results] [--quick]

The table has the exponent of each cost and the exponent that it should have: the slope of a straight line through the
logarithms, by least squares. Times are medians. Memory is the peak resident memory (`VmHWM`) of a process minus its
resident memory before, with a new process for each point. `--quick` takes seconds, with sizes that are too small to
show growth.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

BLOCK_SIZE, SEQUENCES = 1024, 64  # of a step in the data panels: 65,536 tokens
HIDDEN, TOKENS = 64, 2048  # of the loss
PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "transformers.loss.loss_utils"]
PRELOADED += ["hfpretrain.modeling.loss", "hfpretrain.modeling.build"]


@dataclass
class Curve:
    """Costs `y` at sizes `x`. `expected`: the exponent that the points from `fitted_from` on should have."""

    panel: str
    name: str
    x: list[float]
    y: list[float] = field(default_factory=list)
    expected: str = ""
    fitted_from: float = 0

    @property
    def exponent(self) -> float:
        """Slope of log y over log x by least squares."""
        import numpy as np

        points = [(x, y) for x, y in zip(self.x, self.y, strict=True) if x >= max(self.fitted_from, 1) and y > 0]
        return float(np.polyfit(*np.log(np.array(points)).T, 1)[0]) if len(points) > 1 else float("nan")


@dataclass
class Panel:
    """One panel of the plot: its title and the labels of its axes."""

    title: str
    x: str
    y: str


PANELS = {
    "data": Panel("Data of one training step", "blocks in the dataset", "time, ms"),
    "start": Panel("Start-up at a checkpoint", "its step", "time, s"),
    "loss": Panel(f"Loss, {TOKENS:,} tokens, float32", "vocabulary", "peak MiB"),
    "context": Panel("One micro-batch of one sequence", "context, tokens", "peak MiB"),
    "prepare": Panel("hfpretrain prepare", "corpus, MB", "time, s"),
    "many": Panel("Simulated: 7B llama, H100s, no overlap", "devices, 8,192 tokens a step on each", "efficiency, %"),
}


def timed(call, rounds: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def training_data(num_blocks: int):
    """`TrainingData` on `Blocks` whose chunks are all the same array, so that any number of blocks takes 16 MB."""
    import numpy as np

    from hfpretrain.data.batches import Blocks, TrainingData

    rows = 2**13
    array = np.random.default_rng(0).integers(0, 50_000, (rows, BLOCK_SIZE), dtype=np.uint16)
    array[:, ::500] = 0
    chunks = [array] * (num_blocks // rows) + [array[: num_blocks % rows]] * bool(num_blocks % rows)
    places = {"process_index": 0, "num_processes": 1, "micro_batch_size": 8, "accumulation_steps": SEQUENCES // 8}
    return TrainingData([Blocks(chunks)], [], seed=0, eos_token_id=0, document_masking=True, **places)


def data_of_a_step(quick: bool) -> list[Curve]:
    import numpy as np

    from hfpretrain.data.order import TrainingOrder

    sizes = [10**4, 10**5] if quick else [10**exponent for exponent in range(4, 10)]
    step = Curve("data", "all of it", sizes, expected="0")
    order = Curve("data", "order alone", sizes, expected="0")
    data = {size: training_data(size) for size in sizes}
    steps = {size: iter(range(size // SEQUENCES)) for size in sizes}
    seconds = {size: [] for size in sizes}
    for _ in range(3 if quick else 25):  # the sizes take turns, so that other load affects all of them
        for size in sizes:
            seconds[size].append(timed(lambda size=size: data[size].step(next(steps[size])), 1))
    for size in sizes:
        step.y.append(1e3 * statistics.median(seconds[size]))
        positions = np.arange(size - SEQUENCES, size)
        order.y.append(1e3 * timed(lambda size=size, at=positions: TrainingOrder([size], [], 0)(at), 51))
    return [step, order]


def start_up(quick: bool) -> list[Curve]:
    """The work of a run that finds a checkpoint: read the ledger, compare it with the data, make the first batch."""
    import numpy as np

    from hfpretrain.data.batches import Prefetcher
    from hfpretrain.data.ledger import LEDGER, Consumption, Ledger

    steps = [0, 8, 32] if quick else [0, 10**3, 10**4, 10**5, 10**6, 4 * 10**6]
    tokens_per_step = SEQUENCES * BLOCK_SIZE
    limit = 2**28 // tokens_per_step  # steps whose tokens `Ledger.first_mismatch` reads again
    checked = Curve("start", "tokens read again, 2^28 at most", steps, expected="0", fitted_from=limit)
    ledger = Curve("start", "ledger's checksums", steps, expected="1", fitted_from=8 if quick else 10**5)
    first = Curve("start", "first batch", steps, expected="0")
    data = training_data(10**5 if quick else 10**8)
    for step in steps:
        chosen: list[int] = []
        checksums = np.zeros(step, dtype=np.uint64)
        Ledger(checksums).first_mismatch(lambda step, chosen=chosen: chosen.append(step) or 0, tokens_per_step)
        for number in chosen:  # the other batches are never used
            checksums[number] = data.checksum(number)
        stored = Consumption(1).state()
        with tempfile.TemporaryDirectory() as name:
            np.save(Path(name) / LEDGER, checksums)
            taken = timed(
                lambda s=stored, path=Path(name): Consumption(1).restore({**s}, path), 5 if step > 10**5 else 31
            )

            def batch(step=step):
                coming = Prefetcher(data.step, range(step, step + 1), pin_memory=False)
                coming.next()
                coming.close()

            first.y.append(timed(batch, 5))
        ledger.y.append(taken)
        mismatch = Ledger(checksums).first_mismatch
        checked.y.append(timed(lambda mismatch=mismatch: mismatch(data.checksum, tokens_per_step), 2))
    return [ledger, checked, first]


def peak_of(case, kind: str, size: int) -> float:
    """Peak MiB of a case, measured in a new process, which is forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(case, kind, size).result()


def status(key: str) -> float:
    """A memory figure of this process in MiB, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def memory_of_the_loss(quick: bool) -> list[Curve]:
    sizes = [2048, 4096] if quick else [2**power for power in range(13, 18)]
    # Chunks are of a sixteenth of the tokens, or of 16 MiB of logits if that is more: here up to 32,768.
    limits = {"whole": ("1", 0), "chunked": ("at most 1", 2**22 // (TOKENS // 16))}
    return [
        Curve("loss", kind, sizes, [peak_of(loss_case, kind, size) for size in sizes], claim, 0 if quick else limit)
        for kind, (claim, limit) in limits.items()
    ]


def memory_of_a_context(quick: bool) -> list[Curve]:
    sizes = [64, 128] if quick else [2**power for power in range(9, 14)]
    return [
        Curve("context", name, sizes, [peak_of(context_case, kind, size) for size in sizes], expected, sizes[-3:][0])
        for name, kind, expected in (
            ("one document", "plain", "1"),
            ("documents masked, sdpa on a CPU", "masked", "at most 2"),
        )
    ]


def loss_case(kind: str, vocab_size: int) -> float:
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    from hfpretrain.modeling.loss import head_loss

    def once(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
        if kind == "chunked":
            loss = head_loss(hidden, weight, None, labels.roll(-1)).sum() / TOKENS
        else:
            loss = ForCausalLMLoss(torch.nn.functional.linear(hidden, weight), labels, len(weight))
        loss.backward()

    torch.manual_seed(0)
    hidden = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(vocab_size, HIDDEN).mul_(0.02).requires_grad_()
    labels = torch.randint(vocab_size, (1, TOKENS))
    once(*(torch.randn(shape, requires_grad=True) for shape in ((1, 4, HIDDEN), (8, HIDDEN))), labels[:, :4] % 8)
    before = status("VmRSS")
    once(hidden, weight, labels)
    return status("VmHWM") - before


def context_case(kind: str, num_tokens: int) -> float:
    import torch
    from transformers import AutoConfig

    from hfpretrain.modeling.build import build_model
    from hfpretrain.modeling.checks import use_chunked_loss
    from hfpretrain.recipe.schema import ModelSection

    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 2}
    keywords = {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 4096, **sizes}
    keywords["max_position_embeddings"] = 2**15
    config = AutoConfig.for_model(**keywords, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = build_model(ModelSection(config=keywords), config, "cpu").train()
    assert use_chunked_loss(model, True)

    def micro_step(length: int) -> None:
        ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids}
        if kind == "masked":
            batch["position_ids"] = (torch.arange(length) % 500)[None]
        model(**batch, use_cache=False).loss.backward()

    micro_step(16)
    before = status("VmRSS")
    micro_step(num_tokens)
    return status("VmHWM") - before


def preparation(quick: bool) -> list[Curve]:
    import logging

    import datasets
    from small import recipe_mapping, small_text

    from hfpretrain.data.prepare import prepare
    from hfpretrain.data.tokenizer import train_tokenizer
    from hfpretrain.recipe.schema import Recipe, TokenizerSection

    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    sizes = [0.05, 0.1] if quick else [1, 2, 4, 8, 16]
    curve = Curve("prepare", "time", [], expected="1", fitted_from=0 if quick else 2)
    texts = small_text(100 if quick else 1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), texts).save_pretrained(
            folder / "tokenizer"
        )
        for size in sizes:
            written = copy = 0
            (folder / f"{size}").mkdir()
            with (folder / f"{size}" / "corpus.jsonl").open("w", encoding="utf-8") as file:
                while written < size * 1e6:
                    written += sum(file.write(json.dumps({"text": f"Copy {copy}. {text}"}) + "\n") for text in texts)
                    copy += 1
            curve.x.append(written / 1e6)
        changes = {"tokenizer": {"pretrained": str(folder / "tokenizer")}, "data__block_size": BLOCK_SIZE}
        changes |= {"training__tokens_per_step": BLOCK_SIZE, "training__micro_batch_size": 1}
        changes["model__config__max_position_embeddings"] = BLOCK_SIZE
        seconds: dict[float, list[float]] = {size: [] for size in sizes}
        for number in range(1 if quick else 5):  # the sizes take turns, as above
            for size in sizes:
                output_dir = str(folder / f"{size}" / f"{number}" / "run")
                recipe = Recipe.model_validate(recipe_mapping(folder / f"{size}", **changes, output_dir=output_dir))
                seconds[size].append(timed(lambda recipe=recipe: prepare(recipe), 1))
        curve.y = [statistics.median(seconds[size]) for size in sizes]
    return [curve]


def many_devices(quick: bool) -> list[Curve]:
    """Simulated by `hfpretrain.planning.network`, with one micro-step per step, whether it fits into memory or not."""
    from hfpretrain import load_recipe
    from hfpretrain.modeling.build import build_model
    from hfpretrain.modeling.flops import model_flops_per_token
    from hfpretrain.modeling.structure import decoder_layers
    from hfpretrain.planning import devices, memory, network, plan

    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "llama-7b-fineweb.yaml")
    config = plan.model_config(recipe)
    model = build_model(recipe.model, config)
    model_sizes = memory.model_sizes(model, decoder_layers(model), 0)
    tokens = recipe.training.micro_batch_size * recipe.data.block_size
    flops = tokens * model_flops_per_token(config, plan.count_parameters_of(config), recipe.data.block_size)
    compute = flops / devices.device_by_name("H100-80GB").flops / plan.DEFAULT_MFU
    curves = []
    for engine in network.ENGINES:
        sizes = [2**power for power in range(4 if engine == "hsdp" else 3, 13)]
        curves.append(Curve("many", engine, sizes))
        for size in sizes:
            found = network.exchanges_per_step(engine, model_sizes, size, 1, "bf16", shard_size=8)
            sending = sum(exchange.seconds(network.Cluster()) for exchange in found)
            curves[-1].y.append(100 * compute / (compute + sending))
    return curves


def table(curves: list[Curve]) -> str:
    """A row for each curve: its first and last fitted point, its exponent, and the expected exponent."""
    lines = ["| cost | against | first point | last point | exponent | should be |", "|---|---|---|---|---|---|"]
    for curve in curves:
        panel = PANELS[curve.panel]
        fitted = [point for point in zip(curve.x, curve.y, strict=True) if point[0] >= max(curve.fitted_from, 1)]
        ends = [fitted[0], fitted[-1]] if fitted else [(curve.x[n], curve.y[n]) for n in (0, -1)]
        unit = panel.y.split()[-1]
        points = [f"{format(y, ',.0f' if y >= 100 else '.3g')} {unit} at {x:,.6g}" for x, y in ends]
        cells = [f"{panel.title}: {curve.name}", panel.x.partition(" (")[0], *points, f"{curve.exponent:.2f}"]
        lines.append(f"| {' | '.join([*cells, curve.expected])} |")
    return "\n".join(lines)


def draw(curves: list[Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for axis, (key, panel) in zip(axes.flat, PANELS.items(), strict=True):
        here = [curve for curve in curves if curve.panel == key]
        for curve in here:
            claim = f", should be {curve.expected}" if curve.expected else ""
            label = curve.name if key == "many" else f"{curve.name}: {curve.exponent:.2f}{claim}"
            axis.plot(curve.x, curve.y, "o--" if curve.name == "zero2" else "o-", markersize=4, label=label)
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axis.set_xscale("symlog", linthresh=100) if key == "start" else axis.set_xscale("log")
        axis.grid(alpha=0.3)
        if key == "many":
            axis.set(ylim=(0, 100))
            axis.legend(fontsize=8, loc="lower left", ncols=2)
        else:
            axis.set_yscale("log")
            values = [y for curve in here for y in curve.y if y > 0]
            axis.set_ylim(min(values) / 2, max(values) * (max(values) / min(values)) ** 0.4 * 2)  # space for the legend
            axis.legend(fontsize=8, loc="upper left", title="exponent", title_fontsize=8, alignment="left")
        if key in ("loss", "context", "prepare", "many"):
            axis.set_xticks(here[0].x, [f"{x:,.2g}" if x < 100 else f"{x:,}" for x in here[0].x], fontsize=8)
            axis.minorticks_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    curves = []
    for measure in (memory_of_the_loss, memory_of_a_context, data_of_a_step, start_up, preparation, many_devices):
        start = time.perf_counter()
        curves += measure(args.quick)
        print(f"{measure.__name__}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    curves.sort(key=lambda curve: list(PANELS).index(curve.panel))
    args.output.mkdir(parents=True, exist_ok=True)
    text = table([curve for curve in curves if curve.panel != "many"])
    print(text)
    (args.output / "growth.md").write_text(text + "\n", encoding="utf-8")
    draw(curves, args.output / "growth.png")


if __name__ == "__main__":
    main()
