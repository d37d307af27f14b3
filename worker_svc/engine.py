"""The interface that every engine of a rank serves, and what an engine is told at the start."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from albireo.arrays import Int32Array
from albireo.v1 import plan_pb2
from worker_svc.batch import InputBatch

BLOCK_SIZE = 32  # tokens; the KV store's canonical layout will count on it

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
    stub_step_ms: float = 0.0  # how long a step of the stub lasts (modelled)


@dataclass(frozen=True)
class EngineInfo:
    """What an engine turned out to be; ``num_blocks`` may differ between ranks, the group takes the smallest."""

    device: str
    dtype: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Tokens [S] of a step's sampling rows, identical on every rank, and the step's durations."""

    token_ids: Int32Array
    timings: plan_pb2.StepTimings


class PendingStep(Protocol):
    """A launched step."""

    def resolve(self) -> StepOutput:
        """Waits until the step's tokens are on the host."""


class Engine(Protocol):
    """Runs the steps of one rank, on one thread: load, then join, allocate, launch ..., leave for group after group.

    All ranks of a group make the same calls in the same order from `join` on; `join`, `launch` and the step's `resolve`
    raise GroupError when a peer is lost. No wait for a peer is endless.
    """

    def load(self, report: Progress) -> EngineInfo:
        """Loads weights and finds out how many blocks fit. Needs no other rank."""

    def join(self, meeting: int) -> None:
        """Meets the other ranks that were given the same number, which is of one group alone."""

    def allocate(self, num_blocks: int) -> None:
        """Makes a KV cache of the group's number of blocks; keeps the one that is there when the number is the same."""

    def launch(self, batch: InputBatch) -> PendingStep:
        """Starts forward and sampling of one step. An asynchronous device returns before the step has run."""

    def abort(self) -> None:
        """Gets `join` and `launch` out of a wait for a peer, now or later, until `leave`: they raise GroupError.

        The one method that other threads call. An engine that cannot do this does nothing: its waits end by themselves.
        """

    def leave(self) -> None:
        """Leaves the group, whatever state it is in; weights and cache stay."""

    def close(self) -> None:
        """Leaves the group and frees the device."""
