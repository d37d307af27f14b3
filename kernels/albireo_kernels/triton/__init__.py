"""Sampling from vocabulary-sharded logits on a GPU, in Triton (3.6 to 3.9); importable only where triton is installed.

Meaning and oracle are `albireo_kernels.reference.sampling`. Modules, in a step's order: `logprobs` (of the raw logits),
`edits`, then by what a row asks for

- nothing but temperature: `draw.best` on each shard, `draw.merge_and_draw` on the gathered records;
- top_k <= 256, with or without top-p and min-p: `candidates` on each shard, `draw.merge_and_draw`;
- any other filter: `filters.draw_filtered`, a fixed number of rounds of sums over ranks, then `draw.merge_and_draw`.

Nothing here waits for the device. Every result is the same bits for every number of shards: maxima and integer sums do
not depend on their order, and probability masses are fixed-point integers. Multiplications and additions are never
fused (`arithmetic.LAUNCH`) and logarithm and exponential are our own polynomials, so the interpreter computes the same
bits as a GPU.
"""
