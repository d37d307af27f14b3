"""Rotary position embedding: inverse frequencies of each kind, and the tables of cosines and sines."""

import numpy as np

from albireo.arrays import Float32Array
from albireo.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Float32Array:
    """[head_dim / 2]: radians per position of each pair of elements, in float32 throughout, as transformers does."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Float32Array = np.float32(1) / np.float32(rope.theta) ** exponents
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _stretch_low_frequencies(frequencies, rope)
    return frequencies


def rope_tables(rope: RopeSpec, head_dim: int, num_positions: int) -> tuple[Float32Array, Float32Array]:
    """Cosines and sines, each [num_positions, head_dim / 2]."""
    positions = np.arange(num_positions, dtype=np.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)
    return np.cos(angles), np.sin(angles)


def _stretch_low_frequencies(frequencies: Float32Array, rope: RopeSpec) -> Float32Array:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    factor, low, high = np.float32(rope.factor), np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    original = np.float32(rope.original_max_position_embeddings)
    wavelengths = np.float32(2 * np.pi) / frequencies
    kept = (original / wavelengths - low) / (high - low)
    blended = (1 - kept) * frequencies / factor + kept * frequencies
    stretched = np.where(wavelengths > original / low, frequencies / factor, blended)
    return np.where(wavelengths < original / high, frequencies, stretched)
