"""The parts of sampling. What a draw means is defined in `albireo_kernels.reference.sampling`.

`records` and `draws` hold what a rank does on its shard and with what all ranks found; `edits` and `state` what is done
to logits before; `exchange` moves whole rows to one rank each; `logprobs` tells what the model makes of the tokens.
"""
