"""Continue training with plain Trainer, as transformers' run_clm.py does: texts are joined and cut into blocks.

    python examples/run_clm.py MODEL DATA.jsonl OUTPUT [--block-size 1024] [--steps 100]

Each line of DATA has `text`. As in pretraining, every text ends with EOS. Unlike there, attention crosses texts.
"""

import argparse
from itertools import chain

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    size = min(args.block_size, getattr(model.config, "max_position_embeddings", args.block_size))

    def blocks(rows: dict) -> dict:
        ids = list(chain.from_iterable(tokenizer([text + tokenizer.eos_token for text in rows["text"]])["input_ids"]))
        cut = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        return {"input_ids": cut, "labels": cut}

    data = load_dataset("json", data_files=args.data, split="train")
    data = data.map(blocks, batched=True, batch_size=len(data), remove_columns=data.column_names)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{args.output}-trainer",
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"{len(data)} blocks of {size} tokens; step 0: loss {losses[0]:.7f}; last step: {losses[-1]:.4f}")
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
