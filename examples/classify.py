"""Fine-tune for sequence classification with Trainer.

    python examples/classify.py MODEL DATA.jsonl OUTPUT [--steps 100]

Each line of DATA has `text` and `label`, an integer of at least 0. Every fifth line is held out. The classifier reads
the last token that is not padding, so the model needs a `pad_token_id`.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=args.data, split="train")
    num_labels = max(data["label"]) + 1
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    length = min(1024, getattr(model.config, "max_position_embeddings", 1024))
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=length))
    held_out = range(0, len(data), 5)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{args.output}-trainer",
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data.select(sorted(set(range(len(data))) - set(held_out))),
        eval_dataset=data.select(held_out),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(f"accuracy on {len(held_out)} held-out texts: {before:.3f} before, {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
