"""The captured programs: which operations, in which order, over which buffers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from albireo.model_spec import load_model_spec
from albireo_kernels.cpu import (
    SCHEMES,
    Dtype,
    Epilogue,
    Extent,
    KvBlocks,
    Library,
    Op,
    SharedSampling,
    SlotTokens,
    address,
)
from albireo_kernels.cpu.structs import OpKind
from checkpoints import make_checkpoint
from worker_svc.cpu_engine.activations import Activations, make_activations
from worker_svc.cpu_engine.capture import Model, Programs, capture
from worker_svc.cpu_engine.shared import GroupBuffers
from worker_svc.cpu_engine.weights import load_weights
from worker_svc.rope import rope_tables
from worker_svc.sharding import shard_model

MAX_TOKENS, MAX_SEQS, NUM_BLOCKS = 20, 4, 3
BIASED = {"attention_bias": True, "mlp_bias": True, "intermediate_size": 88}


class Captured:
    """One rank's programs of a model of two layers, and what they are made of."""

    def __init__(
        self,
        library: Library,
        path: Path,
        rank: int = 0,
        tp_size: int = 1,
        dtype: Dtype = Dtype.BFLOAT16,
        linear_dtype: Dtype = Dtype.BFLOAT16,
        sampler: str = "merge",
    ) -> None:
        spec = load_model_spec(path)
        shard = shard_model(spec, rank, tp_size)
        weights = load_weights(spec, shard, library, dtype, linear_dtype, lambda _stage, _progress: None)
        self.model = Model(spec, shard, weights, rope_tables(spec.rope, spec.head_dim, 64), dtype)
        self.activations: Activations = make_activations(
            library, spec, shard, dtype, linear_dtype, MAX_TOKENS, MAX_SEQS, num_threads=2
        )
        self.kv = [KvBlocks(library, dtype, NUM_BLOCKS, len(shard.kv_heads), spec.head_dim) for _ in range(2)]
        ranks = range(tp_size if tp_size > 1 else 0)
        first, second = (tuple(np.zeros((MAX_TOKENS, 64), np.float32) for _ in ranks) for _ in range(2))
        alone = SharedSampling.alone(np.zeros((MAX_SEQS, spec.vocab_size), np.float32))
        sampling = replace(alone, candidates=list(alone.candidates) * tp_size)
        self.group = GroupBuffers(None, (first, second), sampling)
        slot_tokens = SlotTokens(MAX_SEQS, 64)
        self.programs: Programs = capture(self.model, self.kv, self.activations, self.group, slot_tokens, sampler)

    def of(self, kind: OpKind) -> list[Op]:
        return [op for op in self.programs.forward.ops if op.c.kind == kind]


def kinds(captured: Captured) -> list[OpKind]:
    return [OpKind(op.c.kind) for op in captured.programs.forward.ops]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("biased"), "llama", **BIASED)


LAYER = [
    *(OpKind.ADD_NORM, OpKind.GEMM, OpKind.ROPE, OpKind.ATTENTION, OpKind.GEMM),
    *(OpKind.ADD_NORM, OpKind.GEMM, OpKind.GEMM),
]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_step_s_operations(tp_size: int, library: Library, path: Path) -> None:
    """As many for every step; the last norm and the logits are of sampled tokens alone."""
    captured = Captured(library, path, tp_size - 1, tp_size)
    assert kinds(captured) == [OpKind.EMBED, *LAYER, *LAYER, OpKind.ADD_NORM, OpKind.GEMM]
    extents = [Extent(op.c.extent) for op in captured.programs.forward.ops]
    assert set(extents[:-2]) == {Extent.EACH_TOKEN}
    assert extents[-2:] == [Extent.EACH_SAMPLE] * 2


@pytest.mark.parametrize("tp_size", [1, 2])
def test_schemes_are_programs(tp_size: int, library: Library, path: Path) -> None:
    """Of three operations that every rank alone needs; whole rows are exchanged first, where a scheme wants them."""
    samples = [OpKind.SELECT, OpKind.DRAW, OpKind.PUBLISH]
    for sampler in SCHEMES:
        captured = Captured(library, path, tp_size - 1, tp_size, sampler=sampler)
        has_exchange = tp_size > 1 and sampler != "merge"
        expected = [OpKind.EXCHANGE, *samples] if has_exchange else samples
        assert [op.c.kind for op in captured.programs.sample.ops] == expected


def test_integers_are_made_before_each_product(library: Library, path: Path) -> None:
    captured = Captured(library, path, linear_dtype=Dtype.INT8)
    found = kinds(captured)
    gemms = [index for index, kind in enumerate(found) if kind is OpKind.GEMM]
    assert all(found[index - 1] is OpKind.QUANTIZE for index in gemms)
    assert {op.c.of.gemm.x.dtype for op in captured.of(OpKind.GEMM)} == {Dtype.INT8}
    assert captured.of(OpKind.EMBED)[0].c.of.embed.table.dtype == Dtype.BFLOAT16


def test_a_rank_alone_adds_where_it_multiplies(library: Library, path: Path) -> None:
    captured = Captured(library, path)
    residual = address(captured.activations.residual.array)
    assert captured.of(OpKind.EMBED)[0].c.of.embed.out.data == residual
    epilogues = [Epilogue(op.c.of.gemm.epilogue) for op in captured.of(OpKind.GEMM)]
    layer = [Epilogue.STORE, Epilogue.ADD, Epilogue.SILU_MUL, Epilogue.ADD]
    assert epilogues == [*layer, *layer, Epilogue.STORE]
    added = [op.c.of.gemm.out.data for op in captured.of(OpKind.GEMM) if op.c.of.gemm.epilogue == Epilogue.ADD]
    assert added == [residual] * 4
    for op in captured.of(OpKind.ADD_NORM):
        assert (op.c.of.add_norm.num_partials, op.c.of.add_norm.sets_residual) == (0, 0)
        assert op.c.of.add_norm.residual.data == residual


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_store_their_parts_by_turns_and_add_up_all(rank: int, library: Library, path: Path) -> None:
    """What a norm adds up is what was stored since the norm before, the parts of all ranks in their order."""
    captured = Captured(library, path, rank, 2)
    by_turns = [[address(partial) for partial in partials] for partials in captured.group.partials]
    stored, summed = [], []
    for op in captured.programs.forward.ops:
        if op.c.kind == OpKind.EMBED:
            stored.append(op.c.of.embed.out.data)
        elif op.c.kind == OpKind.GEMM and op.c.of.gemm.out.data in {*by_turns[0], *by_turns[1]}:
            assert op.c.of.gemm.epilogue == Epilogue.STORE
            stored.append(op.c.of.gemm.out.data)
        elif op.c.kind == OpKind.ADD_NORM:
            summed.append([op.c.of.add_norm.partials[index] for index in range(op.c.of.add_norm.num_partials)])
    assert summed == [by_turns[turn % 2] for turn in range(5)]
    assert stored == [partials[rank] for partials in summed]
    sets = [op.c.of.add_norm.sets_residual for op in captured.of(OpKind.ADD_NORM)]
    assert sets == [1, 0, 0, 0, 0]


def test_norms_round_in_bfloat16_alone(library: Library, path: Path) -> None:
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        captured = Captured(library, path, dtype=dtype, linear_dtype=dtype)
        rounds = {op.c.of.add_norm.rounds for op in captured.of(OpKind.ADD_NORM)}
        rounds |= {op.c.of.rope.rounds for op in captured.of(OpKind.ROPE)}
        assert rounds == {int(dtype is Dtype.BFLOAT16)}
        assert {op.c.of.rope.kv_dtype for op in captured.of(OpKind.ROPE)} == {dtype}


def test_each_rank_writes_the_logits_of_its_ids(library: Library, path: Path) -> None:
    starts = []
    for rank in range(4):
        captured = Captured(library, path, rank, 4)
        out = captured.of(OpKind.GEMM)[-1].c.of.gemm.out
        ids = captured.model.shard.vocab
        starts.append(ids.start)
        assert out.data == address(captured.group.sampling.logits) + 4 * ids.start
        assert (out.stride, out.size) == (1003, len(ids))
        assert captured.of(OpKind.EMBED)[0].c.of.embed.first_id == ids.start
    assert starts == sorted(set(starts))


def test_a_rank_without_ids_has_no_logits(library: Library, tmp_path: Path) -> None:
    """But it looks up tokens, all of which are others': its part of the sum is zeros."""
    make_checkpoint(tmp_path, "llama", vocab_size=268, num_heads=16, num_kv_heads=16)
    captured = Captured(library, tmp_path, 15, 16)
    assert kinds(captured) == [OpKind.EMBED, *LAYER, *LAYER, OpKind.ADD_NORM]
    assert captured.of(OpKind.EMBED)[0].c.of.embed.table.num_out == 0


def test_layers_have_their_own_cache_and_window(library: Library, tmp_path: Path) -> None:
    captured = Captured(library, make_checkpoint(tmp_path, "mistral"))
    for kind, of in ((OpKind.ROPE, "rope"), (OpKind.ATTENTION, "attention")):
        structs = [getattr(op.c.of, of) for op in captured.of(kind)]
        assert [struct.keys for struct in structs] == [address(kv.keys) for kv in captured.kv]
        assert [struct.values for struct in structs] == [address(kv.values) for kv in captured.kv]
    assert {op.c.of.attention.sliding_window for op in captured.of(OpKind.ATTENTION)} == {24}
