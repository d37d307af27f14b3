"""The compiled engine of one rank: its threads are a device that replays captured programs, step after step.

`launch` only queues a step over the batch's own arrays, as on a GPU: the I/O thread prepares and queues a step while
the device runs the one before, and no Python code stands between the two.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from albireo.arrays import Float32Array
from albireo.errors import ConfigError
from albireo.model_spec import ModelSpec, load_model_spec
from albireo_kernels.cpu import (
    MAX_GROUP,
    MAX_HEAD_DIM,
    UNPINNED,
    Device,
    Dtype,
    KvBlocks,
    Library,
    SlotTokens,
    allocate,
)
from worker_svc.batch import InputBatch
from worker_svc.cpu_engine.activations import Activations, make_activations
from worker_svc.cpu_engine.capture import Model, Programs, capture
from worker_svc.cpu_engine.sampling import SamplingMaker
from worker_svc.cpu_engine.shared import GroupBuffers, GroupSizes, Rendezvous
from worker_svc.cpu_engine.step import CpuStep, step_data
from worker_svc.cpu_engine.weights import load_weights
from worker_svc.engine import EngineConfig, EngineInfo, Progress
from worker_svc.kv_budget import choose_num_blocks
from worker_svc.kv_parts import HostCopies, KvCopies, KvShape, cut_model
from worker_svc.rope import rope_tables
from worker_svc.sharding import shard_model

_MEETING_TIMEOUT_S = 60.0
_DTYPES = {"float32": Dtype.FLOAT32, "bfloat16": Dtype.BFLOAT16}


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What is there from `load` to `close`, whatever group the rank is in."""

    model: Model
    activations: Activations
    slot_tokens: SlotTokens
    kv: KvShape


class CpuEngine:
    """One rank of a model in compiled kernels, on this rank's share of the cores."""

    name = "compiled"
    is_asynchronous = True

    def __init__(self, config: EngineConfig, library: Library) -> None:
        self._config = config
        self._library = library
        cores = sorted(os.sched_getaffinity(0))
        self._device = Device(library, cores_of_rank(cores, config.rank, config.tp_size))
        self._rendezvous = Rendezvous(config.rank, config.run_dir, library)
        self._loaded: _Loaded | None = None
        self._kv: list[KvBlocks] = []
        self._copies: KvCopies | None = None
        self._num_blocks = 0
        self._group: GroupBuffers | None = None  # as the programs, of one group: from `join` to `leave`
        self._programs: Programs | None = None
        self._last_tokens = allocate(config.max_num_seqs, np.int32)
        self._sampling = SamplingMaker()
        self._is_closed = False

    def load(self, report: Progress) -> EngineInfo:
        config, library = self._config, self._library
        spec = load_model_spec(config.model_path)
        shard = shard_model(spec, config.rank, config.tp_size)
        _check_heads(spec)
        max_model_len, dtype_name = config.length_for(spec), config.dtype_for(spec)
        dtype = _DTYPES[dtype_name]
        linear_dtype = Dtype.INT8 if config.quantize == "w8a8" else dtype
        weights = load_weights(spec, shard, library, dtype, linear_dtype, report)
        self._loaded = _Loaded(
            Model(spec, shard, weights, rope_tables(spec.rope, spec.head_dim, max_model_len), dtype),
            make_activations(
                library,
                spec,
                shard,
                dtype,
                linear_dtype,
                config.max_num_batched_tokens,
                config.max_num_seqs,
                self._device.num_threads,
            ),
            SlotTokens(config.max_num_seqs, min(max_model_len, spec.vocab_size)),
            cut_model("panels 1", spec, shard, KvBlocks.block_bytes(library, dtype, 1, spec.head_dim)),
        )
        block_bytes = spec.num_layers * KvBlocks.block_bytes(library, dtype, len(shard.kv_heads), spec.head_dim)
        return EngineInfo(
            device="cpu",
            dtype=dtype_name,
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
            max_model_len=max_model_len,
            num_blocks=choose_num_blocks(
                block_bytes, config.max_num_seqs, max_model_len, config.kv_cache_gib, tp_size=config.tp_size
            ),
            kv=self._loaded.kv,
        )

    def join(self, meeting: int) -> None:
        config = self._config
        self._group = self._rendezvous.find(meeting, self._group_sizes(self._model.spec))
        self._device.join(self._group.meeting, config.rank, config.tp_size, _MEETING_TIMEOUT_S)
        self._rendezvous.has_met()

    def allocate(self, num_blocks: int) -> None:
        assert self._loaded is not None, "not loaded"
        assert self._group is not None, "allocate before join"
        model = self._model
        if num_blocks != self._num_blocks:
            self._free_cache()  # for the next
            num_kv_heads, head_dim = len(model.shard.kv_heads), model.spec.head_dim
            keys, values = KvBlocks.allocate(
                self._library, model.dtype, model.spec.num_layers, num_blocks, num_kv_heads, head_dim
            )
            self._kv += (
                KvBlocks.of(self._library, model.dtype, head_dim, *layer) for layer in zip(keys, values, strict=True)
            )
            self._copies = HostCopies(self._loaded.kv, [keys, values], head_axis=2)
            self._num_blocks = num_blocks
        self._programs = capture(
            model, self._kv, self._loaded.activations, self._group, self._loaded.slot_tokens, self._config.sampler
        )

    def copies(self) -> KvCopies:
        assert self._copies is not None, "copies before allocate"
        return self._copies

    def launch(self, batch: InputBatch) -> CpuStep:
        assert self._programs is not None, "launch before allocate"
        data = step_data(batch, self._sampling.of_step(batch), self._last_tokens)
        self._device.submit(self._programs.forward, self._programs.sample, data)
        return CpuStep(self._device, data)

    def logits(self, batch: InputBatch) -> Float32Array:
        """[S, vocab_size] of a step that samples nothing; of a rank alone, for measuring what a model makes of a text.

        Raises GroupError when the step was aborted.
        """
        assert self._programs is not None, "logits before allocate"
        assert self._group is not None
        assert self._config.tp_size == 1, "other ranks may still write theirs"
        self._device.run(self._programs.forward, step_data(batch, self._sampling.of_step(batch), self._last_tokens))
        return self._group.sampling.logits[: len(batch.sample_tokens)].copy()

    def abort(self) -> None:
        self._rendezvous.abort()
        self._device.abort()

    def leave(self) -> None:
        self._device.leave()  # before what it works on is given up
        self._programs = self._group = None
        self._rendezvous.leave()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self.leave()
        self._device.close()
        self._loaded = None
        self._free_cache()

    def _free_cache(self) -> None:
        self._kv.clear()
        self._copies = None
        self._num_blocks = 0

    @property
    def _model(self) -> Model:
        assert self._loaded is not None, "not loaded"
        return self._loaded.model

    def _group_sizes(self, spec: ModelSpec) -> GroupSizes:
        config = self._config
        return GroupSizes(
            tp_size=config.tp_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
        )


def _check_heads(spec: ModelSpec) -> None:
    """Raises ConfigError for attention that the kernels have no room for."""
    group = spec.num_heads // spec.num_kv_heads
    if group > MAX_GROUP or spec.head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"{spec.name}: {group} query heads of {spec.head_dim} elements read one KV head; compiled kernels have "
            f"room for {MAX_GROUP} of {MAX_HEAD_DIM}: use --eager"
        )


def cores_of_rank(cores: Sequence[int], rank: int, tp_size: int) -> Sequence[int]:
    """The cores that a rank's threads are pinned to, one each. With fewer cores than ranks, one thread that is not."""
    share = cores[rank * len(cores) // tp_size : (rank + 1) * len(cores) // tp_size]
    return share if len(cores) >= tp_size else [UNPINNED]
