"""From texts to batches: sources, tokenizer, packing, prepared folders, order, streaming, inspection."""
