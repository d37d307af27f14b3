"""Blocks are cut into the same parts whatever the TP degree, and what one group stores another one can load."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from arena_server import ArenaServer, places, transfer
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_ranks import TransferRank, run_all

from albireo.model_spec import ModelSpec, load_model_spec
from albireo.transfers import TransferKind
from albireo_kernels.cpu import Dtype, KvBlocks, load_library
from checkpoints import make_checkpoint
from worker_svc.engine import EngineConfig
from worker_svc.kv_parts import MAX_PART_BYTES, HostCopies, KvShape, cut_blocks, cut_model
from worker_svc.sharding import ModelShard, shard_model
from worker_svc.stub.engine import StubEngine
from worker_svc.torch_engine.kv_cache import allocate_kv_cache, block_bytes
from worker_svc.torch_engine.kv_copies import make_copies

NUM_BLOCKS = 6
DTYPES = {"float32": (Dtype.FLOAT32, torch.float32), "bfloat16": (Dtype.BFLOAT16, torch.bfloat16)}


@given(
    st.integers(1, 130), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 600_000), st.sampled_from([1, 2, 4, 8, 16])
)
def test_parts_are_equal_bounded_and_written_once(num_layers: int, num_heads: int, head_bytes: int, tp_size: int):
    shapes = []
    for rank in range(tp_size):
        width = max(1, num_heads // tp_size)
        ranks_per_head = max(1, tp_size // num_heads)
        first = rank // ranks_per_head if ranks_per_head > 1 else rank * width
        heads = range(first, first + width)
        shapes.append(cut_blocks("x", num_layers, num_heads, head_bytes, heads, rank % ranks_per_head == 0))
    shape = shapes[0]
    assert all(each.num_parts == shape.num_parts and each.part_bytes == shape.part_bytes for each in shapes)
    assert shape.num_parts * shape.part_bytes == num_layers * num_heads * head_bytes
    assert shape.part_bytes <= max(MAX_PART_BYTES, head_bytes)
    assert sorted(part for each in shapes for part in each.writes) == list(range(shape.num_parts))
    for each in shapes:
        assert set(each.writes) <= set(each.reads)
        held = {(head, layer) for head, layers in map(each.place, each.reads) for layer in range(num_layers)[layers]}
        assert held == {(head, layer) for head in range(width) for layer in range(num_layers)}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Two KV heads."""
    return load_model_spec(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3"))


class Kv:
    """What blocks of a model hold, by head of the whole model, and the caches of ranks that have it."""

    def __init__(self, kind: str, dtype: str, spec: ModelSpec, run_dir: Path) -> None:
        self._kind, self._dtype, self._spec, self._run_dir = kind, dtype, spec, run_dir

    def ranks(self, tp_size: int, arena: ArenaServer) -> list[TransferRank]:
        return [TransferRank(*self._rank(rank, tp_size), NUM_BLOCKS, arena.address) for rank in range(tp_size)]

    def _rank(self, rank: int, tp_size: int) -> tuple[KvShape, HostCopies]:
        if self._kind == "stub":
            return self._stub(rank, tp_size)
        shard = shard_model(self._spec, rank, tp_size)
        return self._compiled(shard) if self._kind == "compiled" else self._eager(shard)

    def _stub(self, rank: int, tp_size: int) -> tuple[KvShape, HostCopies]:
        config = EngineConfig(self._spec.path, rank, tp_size, self._run_dir, "cpu", "auto", 2, 64, 64, 0.0)
        engine = StubEngine(config)
        info = engine.load(lambda _stage, _progress: None)
        engine.allocate(NUM_BLOCKS)
        return info.kv, engine.copies()

    def _compiled(self, shard: ModelShard) -> tuple[KvShape, HostCopies]:
        library, dtype, spec = load_library(), DTYPES[self._dtype][0], self._spec
        arrays = KvBlocks.allocate(library, dtype, spec.num_layers, NUM_BLOCKS, len(shard.kv_heads), spec.head_dim)
        shape = cut_model("panels 1", spec, shard, KvBlocks.block_bytes(library, dtype, 1, spec.head_dim))
        return shape, HostCopies(shape, arrays, head_axis=2)

    def _eager(self, shard: ModelShard) -> tuple[KvShape, HostCopies]:
        dtype, spec = DTYPES[self._dtype][1], self._spec
        cache = allocate_kv_cache(spec, shard, NUM_BLOCKS, dtype, torch.device("cpu"))
        shape = cut_model(
            "rows 1", spec, shard, block_bytes(spec, shard, dtype) // (spec.num_layers * len(shard.kv_heads))
        )
        return shape, make_copies(shape, cache)


def fill(ranks: Sequence[TransferRank], block: int, seed: int) -> None:
    """Every rank's parts of a block hold what follows from seed and part."""
    for rank in ranks:
        for part in rank.shape.reads:
            generator = np.random.default_rng((seed, part))
            for piece in rank.copies.pieces(block, part):
                raw = generator.integers(0, 256, piece.nbytes, dtype=np.uint8)
                piece[...] = raw.view(piece.dtype).reshape(piece.shape)


def contents(ranks: Sequence[TransferRank], block: int) -> dict[int, list[bytes]]:
    """By part; ranks that hold the same one hold the same."""
    found: dict[int, list[bytes]] = {}
    for rank in ranks:
        for part in rank.shape.reads:
            data = [piece.tobytes() for piece in rank.copies.pieces(block, part)]
            assert found.setdefault(part, data) == data
    return found


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("stub", ""), ("compiled", "float32"), ("compiled", "bfloat16"), ("eager", "float32"), ("eager", "bfloat16")],
)
def test_what_one_group_stores_any_other_loads(kind: str, dtype: str, spec: ModelSpec, tmp_path: Path):
    """Through a real arena, from TP a to TP b, into other blocks; what is not loaded stays as it is."""
    kv = Kv(kind, dtype, spec, tmp_path)
    with ArenaServer(tmp_path / "arena.sock") as arena:
        lease = arena.open_lease()
        groups = {tp_size: kv.ranks(tp_size, arena) for tp_size in (1, 2, 4)}

        @settings(max_examples=15)
        @given(
            st.sampled_from([1, 2, 4]),
            st.sampled_from([1, 2, 4]),
            st.permutations(range(NUM_BLOCKS)),
            st.permutations(range(NUM_BLOCKS)),
            st.integers(1, NUM_BLOCKS - 1),
            st.integers(0, 2**32),
        )
        def check(writers: int, readers: int, froms: list[int], tos: list[int], num: int, seed: int) -> None:
            stored, loaded = groups[writers], groups[readers]
            shape = stored[0].shape
            names = [seed + index for index in range(num)]
            for block, name in zip(froms, names, strict=False):
                fill(stored, block, name)
            expected = [contents(stored, block) for block in froms[:num]]
            offsets = places(0, num, shape.num_parts, shape.part_bytes)
            store = transfer(TransferKind.STORE, froms[:num], names, offsets, lease)
            assert run_all(stored, store).succeeded.all()
            for block in tos:
                fill(loaded, block, seed - 1 & 0xFFFFFFFF)
            kept = contents(loaded, tos[num])
            load = transfer(TransferKind.LOAD, tos[:num], names, offsets, lease)
            result = run_all(loaded, load)
            assert result.succeeded.all()
            assert [contents(loaded, block) for block in tos[:num]] == expected
            assert contents(loaded, tos[num]) == kept

        check()
        for rank in (rank for ranks in groups.values() for rank in ranks):
            rank.close()
