"""The torch engine: runs each step eagerly, op by op. Portable, and the oracle of compiled engines.

A step goes through four stages: the batch moves to the device (T2), the decoder runs (T3), rows that sample draw their
token (T4), and the tokens travel to the host when the step is resolved. On a GPU the host only queues this work.
"""

import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from albireo.errors import ConfigError
from albireo.model_spec import load_model_spec
from worker_svc.batch import InputBatch
from worker_svc.engine import EngineConfig, EngineInfo, Progress, StepOutput, StepTimes
from worker_svc.kv_budget import choose_num_blocks
from worker_svc.kv_parts import KvCopies, KvShape, cut_model
from worker_svc.rope import rope_tables
from worker_svc.row_sampling import RowSampling
from worker_svc.sharding import shard_model
from worker_svc.torch_engine.collectives import Collectives, Rendezvous, SingleRank
from worker_svc.torch_engine.inputs import StepInputs, prepare_inputs
from worker_svc.torch_engine.kv_cache import KvCache, allocate_kv_cache, block_bytes
from worker_svc.torch_engine.kv_copies import make_copies
from worker_svc.torch_engine.loader import load_weights
from worker_svc.torch_engine.model import Decoder, forward
from worker_svc.torch_engine.sampler import Sampled, Sampler
from worker_svc.torch_engine.sampling.logprobs import unpack


class TorchEngine:
    """One rank of a model in eager torch, on a CPU or a GPU."""

    name = "eager"
    is_asynchronous = False  # launching op by op takes as long as a small step

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._device = _device_of_rank(config)
        self._rendezvous = Rendezvous(config.rank, config.tp_size, config.run_dir, self._device)
        self._group: Collectives | None = None
        self._decoder: Decoder | None = None
        self._sampler: Sampler | None = None
        self._kv_cache: KvCache | None = None
        self._kv: KvShape | None = None
        self._dtype = torch.float32
        self._last_tokens = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def load(self, report: Progress) -> EngineInfo:
        config = self._config
        spec = load_model_spec(config.model_path)
        shard = shard_model(spec, config.rank, config.tp_size)
        max_model_len = config.length_for(spec)
        dtype = config.dtype_for(spec)
        self._dtype = getattr(torch, dtype)
        if self._device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.tp_size))
        else:
            torch.cuda.set_device(self._device)
        weights = load_weights(spec, shard, self._dtype, self._device, report)
        cos, sin = map(torch.from_numpy, rope_tables(spec.rope, spec.head_dim, max_model_len))
        rope = cos.to(self._device), sin.to(self._device)
        self._decoder = Decoder(spec, shard, weights, *rope, SingleRank())  # `join` puts the real group in
        self._sampler = Sampler(config.sampler, config.max_num_seqs, shard, self._device)
        bytes_per_block = block_bytes(spec, shard, self._dtype)
        head_bytes = bytes_per_block // (spec.num_layers * len(shard.kv_heads))
        self._kv = cut_model("rows 1", spec, shard, head_bytes)
        return EngineInfo(
            device=self._device.type,
            dtype=dtype,
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
            max_model_len=max_model_len,
            num_blocks=choose_num_blocks(
                bytes_per_block,
                config.max_num_seqs,
                max_model_len,
                config.kv_cache_gib,
                torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None,
                config.tp_size,
            ),
            kv=self._kv,
        )

    def join(self, meeting: int) -> None:
        self._group = self._rendezvous.join(meeting)
        self._decoder = replace(self._loaded(), group=self._group)

    @torch.inference_mode()
    def allocate(self, num_blocks: int) -> None:
        decoder = self._loaded()
        if self._kv_cache is not None and self._kv_cache.keys.shape[1] == num_blocks:
            return
        self._kv_cache = None  # frees the memory for the next
        self._kv_cache = allocate_kv_cache(decoder.spec, decoder.shard, num_blocks, self._dtype, self._device)

    def copies(self) -> KvCopies:
        assert self._kv is not None, "not loaded"
        assert self._kv_cache is not None, "copies before allocate"
        return make_copies(self._kv, self._kv_cache)

    @torch.inference_mode()
    def launch(self, batch: InputBatch) -> "TorchStep":
        decoder = self._loaded()
        assert self._group is not None, "launch before join"
        inputs = prepare_inputs(batch, self._last_tokens, decoder.spec.sliding_window, self._device)
        collectives_ns = self._group.elapsed_ns
        before_forward = _mark(self._device)
        logits_shard = self._forward(inputs)
        after_forward = _mark(self._device)
        sampled = self._sample(logits_shard, batch)
        self._last_tokens[inputs.sample_slots] = sampled.tokens[: len(inputs.sample_slots)]
        after_sample = _mark(self._device)
        return TorchStep(
            tokens=_to_host(sampled.tokens.to(torch.int32)),
            logprobs=None if sampled.logprobs is None else _to_host(sampled.logprobs),
            sampling=batch.sampling,
            collective_ns=self._group.elapsed_ns - collectives_ns,
            marks=(before_forward, after_forward, after_sample),
            done=_mark(self._device),
        )

    def abort(self) -> None:
        self._rendezvous.abort()

    def leave(self) -> None:
        self._group = None
        if self._decoder is not None:
            self._decoder = replace(self._decoder, group=SingleRank())
        self._rendezvous.leave()

    def close(self) -> None:
        self.leave()
        self._decoder = self._sampler = self._kv_cache = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, inputs: StepInputs) -> Tensor:
        """The step's logits, [S, ids of the shard]."""
        decoder = self._loaded()
        assert self._kv_cache is not None, "launch before allocate"
        if not len(inputs.token_ids):
            return torch.zeros((0, len(decoder.shard.vocab)), device=self._device)
        return forward(decoder, inputs, self._kv_cache)

    def _sample(self, logits_shard: Tensor, batch: InputBatch) -> Sampled:
        """The tokens of the step's sampling rows."""
        assert self._sampler is not None, "not loaded"
        return self._sampler.sample(logits_shard, batch, self._loaded().group)

    def _loaded(self) -> Decoder:
        assert self._decoder is not None, "not loaded"
        return self._decoder


_Mark = int | torch.cuda.Event


@dataclass(frozen=True, slots=True)
class TorchStep:
    """A launched step. ``marks`` are the times before forward, between it and sampling, and after sampling."""

    # On the host, and valid once ``done`` has passed: [S] int32, and what `unpack` makes logprobs of.
    tokens: Tensor
    logprobs: Tensor | None
    sampling: RowSampling
    collective_ns: int
    marks: tuple[_Mark, _Mark, _Mark]
    done: _Mark

    def resolve(self) -> StepOutput:
        if isinstance(self.done, torch.cuda.Event):
            self.done.synchronize()
        before_forward, after_forward, after_sample = self.marks
        # A GPU's events have no time of day; the last of them has just passed.
        end_at_ns = after_sample if isinstance(after_sample, int) else time.monotonic_ns()
        times = StepTimes(
            start_at_ns=end_at_ns - _elapsed_ns(before_forward, after_sample),
            end_at_ns=end_at_ns,
            forward_ns=_elapsed_ns(before_forward, after_forward),
            sample_ns=_elapsed_ns(after_forward, after_sample),
            collective_ns=self.collective_ns,
        )
        logprobs = None if self.logprobs is None else unpack(self.logprobs.numpy(), self.sampling)
        return StepOutput(np.asarray(self.tokens.numpy(), dtype=np.int32), times, logprobs)


def _mark(device: torch.device) -> _Mark:
    """Now, on the device's own time line."""
    if device.type != "cuda":
        return time.monotonic_ns()
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # of torch
    event.record()
    return event


def _elapsed_ns(start: _Mark, end: _Mark) -> int:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return int(start.elapsed_time(end) * 1e6)
    assert isinstance(start, int)
    assert isinstance(end, int)
    return end - start


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def choose_device(wanted: str) -> str:
    """The device that ``--device`` names: cpu or cuda; auto takes a GPU where torch sees one."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("--device cuda: torch sees no GPU")
    if wanted == "auto":
        return "cuda" if has_gpu else "cpu"
    return wanted


def _device_of_rank(config: EngineConfig) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if config.rank >= count:
        raise ConfigError(f"--device {config.device}: rank {config.rank} has no GPU of its own; torch sees {count}")
    return torch.device("cuda", config.rank)
