"""Supervised fine-tuning with TRL: of all weights, or with LoRA (PEFT), which is merged before saving.

    pip install trl peft
    python examples/sft.py MODEL DATA.jsonl OUTPUT [--lora] [--steps 100]

Each line of DATA has `messages` ([{"role": "user", "content": ...}, ...]; the tokenizer needs a chat template, see
`tokenizer.chat_template` of a recipe) or `text`. OUTPUT is a plain folder like MODEL.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    config = SFTConfig(
        output_dir=f"{args.output}-trainer",
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-4 if args.lora else 2e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,  # True on a GPU; in float32 the first loss equals the evaluated loss to 1e-5
        model_init_kwargs={"dtype": torch.float32},
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = SFTTrainer(
        args.model,
        args=config,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"step 0: loss {losses[0]:.7f}; last step: {losses[-1]:.4f}")

    model = trainer.model.merge_and_unload() if args.lora else trainer.model
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
