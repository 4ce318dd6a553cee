"""Your own training loop on hfpretrain's data: python examples/own_loop.py [RECIPE] [--section.key=value ...]

The text, its order and the document boundaries are those of `hfpretrain.train` with this recipe. Everything else is
yours.
"""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain import load_recipe, prepare, training_batches

recipe = load_recipe(*(sys.argv[1:2] or ["quickstart"]), sys.argv[2:])
prepared = prepare(recipe)
config = AutoConfig.for_model(**{"vocab_size": prepared.manifest["vocab_size"], **recipe.model.config})
model = AutoModelForCausalLM.from_config(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr)

for step, batches in enumerate(training_batches(recipe, prepared), start=1):
    num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    loss = 0.0
    for batch in batches:
        part = model(**batch, use_cache=False, num_items_in_batch=num_items).loss
        part.backward()
        loss += part.item()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss:.4f}")
model.save_pretrained(recipe.output_dir)
