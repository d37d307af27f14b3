"""A rank's part of the model."""

from pathlib import Path

import torch

from albireo.model_spec import load_model_spec
from checkpoints import make_checkpoint
from worker_svc.rope import rope_tables
from worker_svc.sharding import shard_model
from worker_svc.torch_engine.collectives import SingleRank
from worker_svc.torch_engine.loader import load_weights
from worker_svc.torch_engine.model import Decoder, embed


class _LastOfSixteen(SingleRank):
    rank, size = 15, 16


def test_a_rank_without_ids_takes_part(tmp_path: Path) -> None:
    """Of 67 tiles of ids, the last of 16 ranks has none: it adds nothing to embeddings and holds no logits."""
    spec = load_model_spec(make_checkpoint(tmp_path, "llama", vocab_size=268, num_heads=16, num_kv_heads=16))
    shard, cpu = shard_model(spec, 15, 16), torch.device("cpu")
    weights = load_weights(spec, shard, torch.float32, cpu, lambda _stage, _progress: None)
    cos, sin = map(torch.from_numpy, rope_tables(spec.rope, spec.head_dim, 8))
    decoder = Decoder(spec, shard, weights, cos, sin, _LastOfSixteen())
    assert embed(decoder, torch.tensor([0, 267])).equal(torch.zeros(2, 64))
    assert weights.lm_head(torch.ones(3, 64)).shape == (3, 0)
