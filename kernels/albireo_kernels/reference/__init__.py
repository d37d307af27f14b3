"""Every kernel in plain torch: the oracle that compiled versions are compared with, and the portable fallback.

Pure functions of tensors on any device; each docstring states shapes, what is written, and where the formula is from.
"""

from albireo_kernels.reference.attention import (
    AttentionGroup,
    attend_groups,
    group_rows,
    paged_attention,
    write_kv,
)
from albireo_kernels.reference.layers import apply_rope, linear, rms_norm, silu_mul
from albireo_kernels.reference.sampling import (
    Params,
    TokenLogprobs,
    edit,
    fmix32,
    gumbel_noise,
    noise_keys,
    sample_row,
    survivors,
    token_logprobs,
)
from albireo_kernels.reference.transfer import to_device

__all__ = [
    "AttentionGroup",
    "Params",
    "TokenLogprobs",
    "apply_rope",
    "attend_groups",
    "edit",
    "fmix32",
    "group_rows",
    "gumbel_noise",
    "linear",
    "noise_keys",
    "paged_attention",
    "rms_norm",
    "sample_row",
    "silu_mul",
    "survivors",
    "to_device",
    "token_logprobs",
    "write_kv",
]
