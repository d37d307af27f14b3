"""Keys and values of real engines, stored and loaded: a sequence goes on with them as with its own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from arena_server import ArenaServer, places, transfer
from engine_story import Kind, Story, engine_config
from transfer_ranks import TransferRank, run_all

from albireo.plan import NewSequence
from albireo.transfers import TransferKind
from checkpoints import make_checkpoint


@pytest.fixture(params=["eager", "compiled"])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    torch.set_num_threads(1)
    yield request.param
    while Story.untold:
        Story.untold.pop().engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_computed_is_used_elsewhere(kind: Kind, dtype: str, tmp_path: Path):
    """The first of two blocks comes back into another one, and the rest of the prompt is computed behind it."""
    checkpoint = make_checkpoint(tmp_path, "qwen3", dtype=getattr(torch, dtype))
    story = Story(kind, engine_config(checkpoint, tmp_path))
    first = story.new_sequence(0, 50)
    story.step([(0, 50, True)], (first,))
    stored, elsewhere = int(first.block_table[0]), story.new_sequence(1, 50).block_table
    with ArenaServer(tmp_path / "arena.sock") as arena:
        shape, lease = story.info.kv, arena.open_lease()
        rank = TransferRank(shape, story.engine.copies(), 32, arena.address)
        offsets = places(0, 1, shape.num_parts, shape.part_bytes)
        assert run_all([rank], transfer(TransferKind.STORE, [stored], [7], offsets, lease)).succeeded.all()
        loaded = transfer(TransferKind.LOAD, [int(elsewhere[0])], [7], offsets, lease)
        assert run_all([rank], loaded).succeeded.all()
        rank.close()
    again = NewSequence(1, first.token_ids, 50, 32, elsewhere, first.sampling)
    story.step([(1, 18, True)], (again,))
    (expected,), (got,) = story.sequences[0].logits, story.sequences[1].logits
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 if dtype == "float32" else 0.15)
