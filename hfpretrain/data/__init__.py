"""From texts to batches: sources, tokenizer, packing, prepared folders, order, streaming, inspection.

What the words mean here:

- piece: what a reader reads as a unit, a file or a shard of a Hub dataset. With `best_fit` packing, also one of the
  stretches that a document longer than a block is cut into.
- group: neighboring pieces of one source, which preparation reads one after another. When streaming, pieces that
  together make one endless sequence of blocks; several groups are read side by side.
- part: documents of one group that are packed together. Preparation resumes after the last finished part, and writes an
  account for each.
- shard: one machine's share of a preparation (`hfpretrain prepare --shard I/N`).
- split: the blocks of one use in a prepared folder: `train-0`, `train-1`, ..., `validation`, `validation-DOMAIN`.
- stream: what training draws sequences from, one source of a mixture, or all sources together. With prepared data, each
  stream is a train split.
- set: a validation split, as evaluation calls it.
"""
