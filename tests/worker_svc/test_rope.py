"""Rotary tables agree with those of transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from albireo.model_spec import RopeSpec
from worker_svc.rope import inverse_frequencies, rope_tables

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RopeSpec(10000.0), None),
        (RopeSpec(1e6), None),
        (RopeSpec(10000.0, "linear", 2.5), {"rope_type": "linear", "factor": 2.5}),
        (RopeSpec(500000.0, "llama3", 8.0, 1.0, 4.0, 8192), {"rope_type": "llama3", "factor": 8.0, **LLAMA3}),
        (RopeSpec(500000.0, "llama3", 32.0, 1.0, 4.0, 8192), {"rope_type": "llama3", "factor": 32.0, **LLAMA3}),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_and_tables(ours: RopeSpec, theirs: dict[str, Any] | None, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_theta=ours.theta,
        rope_scaling=theirs,
    )
    embedding = LlamaRotaryEmbedding(config)
    # Powers of numpy and torch may differ in the last place.
    frequencies = torch.from_numpy(inverse_frequencies(ours, head_dim))
    torch.testing.assert_close(frequencies, embedding.inv_freq, rtol=2**-23, atol=0)
    cos, sin = map(torch.from_numpy, rope_tables(ours, head_dim, 300))
    their_cos, their_sin = embedding(torch.zeros(1), torch.arange(300)[None])
    torch.testing.assert_close(torch.cat((cos, cos), -1), their_cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat((sin, sin), -1), their_sin[0], rtol=0, atol=1e-6)
