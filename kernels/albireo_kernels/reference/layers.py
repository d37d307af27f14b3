"""The kernels of a decoder layer other than attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Without bfloat16 instructions, torch multiplies token by token, each time over the whole weight (see `linear`).
_HAS_FAST_BFLOAT16_ON_CPU = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
_MIN_TOKENS_TO_WIDEN = 8
_ROWS_WIDENED_AT_ONCE = 512  # of a weight: small enough for a core's cache


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, statistics in float32.

    Rounds to ``x.dtype`` before it multiplies by the weight, as Hugging Face's models do.

    Args:
        x: [..., size].
        weight: [size].
    Returns:
        [..., size] in ``x.dtype``.
    Source: Zhang and Sennrich 2019.
    """
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse_rms).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head by its token's position. Element i is paired with i + head_dim / 2; computed in float32.

    Args:
        x: [num_tokens, num_heads, head_dim].
        cos, sin: [num_tokens, head_dim / 2] float32, the table rows of the tokens' positions.
    Returns:
        [num_tokens, num_heads, head_dim] in ``x.dtype``.
    Source: Su et al. 2021, in the half-split form of GPT-NeoX.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [num_tokens, 2 * size], gate first.
    Returns:
        [num_tokens, size].
    Source: Shazeer 2020 (SwiGLU).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, accumulated in float32.

    Args:
        x: [num_tokens, inputs].
        weight: [outputs, inputs].
        bias: [outputs].
    Returns:
        [num_tokens, outputs] in ``x.dtype``.
    """
    is_slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _HAS_FAST_BFLOAT16_ON_CPU
    if not is_slow or len(x) < _MIN_TOKENS_TO_WIDEN:
        return F.linear(x, weight, bias)
    # In float32, a few rows of the weight at a time: 2 to 8 times faster on AVX2, for 8 to 256 tokens.
    wide = x.float()
    parts = torch.split(weight, _ROWS_WIDENED_AT_ONCE)
    product = torch.cat([F.linear(wide, rows.float()) for rows in parts], dim=-1)
    return (product if bias is None else product.add_(bias)).to(x.dtype)
