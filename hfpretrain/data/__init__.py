"""From texts to batches: sources, tokenizer, packing, prepared folders, order, streaming, inspection.

Terms of this package:

- piece: a file, or a shard of a Hub dataset. A reader reads one piece after another.
- group: neighboring pieces of one source, which preparation reads one after another.
- part: documents of one group that are packed together. Preparation writes an account for each part, and resumes after
  the last finished one.
- account: the JSON file with the counts and checksums of a part.
- shard: the work of one machine in a preparation (`hfpretrain prepare --shard I/N`).
- split: the blocks with one use in a prepared folder: `train-0`, `train-1`, ..., `validation`, `validation-DOMAIN`. If
  stages change the block size, `train-0-1024` has the documents of `train-0` in blocks of 1,024 tokens.
- validation set: a validation split, as evaluation calls it.
- stream: what training draws sequences from: one source of a mixture, or all sources together. With prepared data, each
  stream is a train split.
- lane: with streaming, pieces that are read one after another, again and again, as an endless series of blocks. A
  stream has one or more lanes, which are read side by side.
"""
