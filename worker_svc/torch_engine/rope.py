"""Rotary position embedding: inverse frequencies of each kind, and the tables of cosines and sines."""

import math

import torch
from torch import Tensor

from albireo.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[head_dim / 2] float32: radians per position of each pair of elements, as transformers computes them."""
    frequencies: Tensor = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _stretch_low_frequencies(frequencies, rope)
    return frequencies


def rope_tables(rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [num_positions, head_dim / 2] float32."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)
    return angles.cos().to(device), angles.sin().to(device)


def _stretch_low_frequencies(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    kept = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept) * frequencies / rope.factor + kept * frequencies
    stretched = torch.where(wavelengths > original / rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(wavelengths < original / rope.high_freq_factor, frequencies, stretched)
