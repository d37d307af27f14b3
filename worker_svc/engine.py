"""The interface that every engine of a rank serves, and what an engine is told at the start."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from albireo.arrays import Int32Array
from albireo.errors import ConfigError
from albireo.logprobs import Logprobs
from albireo.model_spec import ModelSpec
from worker_svc.batch import InputBatch
from worker_svc.kv_parts import KvCopies, KvShape

BLOCK_SIZE = 32  # tokens; the KV store's parts count on it

_DTYPES = ("float32", "bfloat16", "float16")

# Reports loading: what is being done, and the fraction done, 0..1.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class EngineConfig:
    """What an engine needs to know of its model, its rank and its limits."""

    model_path: Path
    rank: int
    tp_size: int
    run_dir: Path  # sockets and rendezvous files of this group
    device: str
    dtype: str  # auto, float32, bfloat16
    max_num_seqs: int
    max_model_len: int  # 0: the model's
    max_num_batched_tokens: int
    kv_cache_gib: float  # per rank; 0: chosen by the engine
    block_size: int = BLOCK_SIZE
    quantize: str = "none"  # none, w8a8; of the compiled engine alone
    sampler: str = "merge"  # merge, batch-sharded, gather; see docs/sampling.md
    # Of the stub alone: what it computes, and how long its steps last (modelled).
    stub_mode: str = "truth"
    stub_step_ms: float = 0.0
    stub_device: str = "none"
    stub_model: str = "none"

    def dtype_for(self, spec: ModelSpec) -> str:
        """What a model is computed in; ConfigError: in nothing that is served."""
        name = spec.dtype if self.dtype == "auto" else self.dtype
        if name not in _DTYPES:
            raise ConfigError(f"dtype {name}: models are computed in {', '.join(_DTYPES)}")
        # Few CPUs compute in float16.
        return "bfloat16" if name == "float16" and self.device == "cpu" else name

    def length_for(self, spec: ModelSpec) -> int:
        """The longest sequence of a model; ConfigError: it is asked to be longer than the model's."""
        if self.max_model_len > spec.max_position_embeddings:
            raise ConfigError(
                f"--max-model-len {self.max_model_len}: {spec.name} has {spec.max_position_embeddings} positions"
            )
        return self.max_model_len or spec.max_position_embeddings


@dataclass(frozen=True)
class EngineInfo:
    """What an engine turned out to be; ``num_blocks`` may differ between ranks, the group takes the smallest. ``kv``:
    how its blocks lie in a KV store."""

    device: str
    dtype: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    num_blocks: int
    kv: KvShape


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When the device ran a step (CLOCK_MONOTONIC, ns) and how long its parts took; 0: none, or not known.

    Attributes:
        start_at_ns, end_at_ns: of forward and sampling, by the device's own time line.
        forward_ns: T3, its collectives included.
        sample_ns: T4.
        collective_ns: what of the step was spent in collectives, waiting for peers included.
    """

    start_at_ns: int
    end_at_ns: int
    forward_ns: int
    sample_ns: int
    collective_ns: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Tokens [S] of a step's sampling rows, also of those that score: identical on every rank (an engine whose tokens
    mean nothing may leave them out on all ranks but the first), and the step's times. ``logprobs``: of the rows that
    want them; rank 0 has them, others may."""

    token_ids: Int32Array
    times: StepTimes
    logprobs: Logprobs | None = None


class PendingStep(Protocol):
    """A launched step."""

    def resolve(self) -> StepOutput:
        """Waits until the step's tokens are on the host."""


class Engine(Protocol):
    """Runs the steps of one rank: load, then join, allocate, launch ..., leave for group after group.

    All ranks of a group make the same calls in the same order from `join` on; `join`, `launch` and the step's `resolve`
    raise GroupError when a peer is lost. No wait for a peer is endless. One thread makes all calls, but for `abort`,
    for what `copies` gives, and for `launch` where that is asynchronous.
    """

    name: str
    """What clients and benchmarks are told."""
    is_asynchronous: bool
    """Whether `launch` but queues a step on the device, in microseconds and without waiting for anyone. Then the I/O
    thread launches each step as soon as it is prepared, while the device runs the one before. Else the compute thread
    launches a step when it has resolved the last."""

    def load(self, report: Progress) -> EngineInfo:
        """Loads weights and finds out how many blocks fit. Needs no other rank."""

    def join(self, meeting: int) -> None:
        """Meets the other ranks that were given the same number, which is of one group alone."""

    def allocate(self, num_blocks: int) -> None:
        """Makes a KV cache of the group's number of blocks; keeps the one that is there when the number is the same."""

    def copies(self) -> KvCopies:
        """The blocks of the cache, for transfers; valid from `allocate` to the next `allocate` or `close`."""

    def launch(self, batch: InputBatch) -> PendingStep:
        """Starts forward and sampling of one step."""

    def abort(self) -> None:
        """Gets `join`, `launch` and `resolve` out of their waits, now or later, until `leave`: they raise GroupError.

        Any thread calls this. An engine that cannot do this does nothing: its waits end by themselves.
        """

    def leave(self) -> None:
        """Leaves the group, whatever state it is in; weights and cache stay."""

    def close(self) -> None:
        """Leaves the group and frees the device."""
