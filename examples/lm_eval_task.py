"""Bits per byte of your own text with lm-eval, which needs nothing of hfpretrain to load a checkpoint.

    pip install lm_eval
    python examples/lm_eval_task.py MODEL DATA.jsonl

Each line of DATA has `text`. Published tasks need no script, but they need the network:
`lm_eval --model hf --model_args pretrained=MODEL --tasks hellaswag,arc_easy`.
"""

import argparse

import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    args = parser.parse_args()

    task = {
        "task": "text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": args.data}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}, {"metric": "word_perplexity"}],
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=args.model, dtype="float32", device=device, batch_size=8)
    results = simple_evaluate(model, tasks=[ConfigurableTask(config=task)], bootstrap_iters=0)
    for name, value in results["results"]["text"].items():
        if isinstance(value, float):
            print(f"{name.removesuffix(',none')} {value:.6f}")


if __name__ == "__main__":
    main()
