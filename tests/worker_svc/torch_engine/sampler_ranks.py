"""Ranks as threads of one process, for tests of the sampler."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from albireo.logprobs import Logprobs
from albireo.model_spec import shard_vocab
from sampling_rows import NUM_SLOTS, assert_same_logprobs
from worker_svc.batch import InputBatch
from worker_svc.sharding import ModelShard
from worker_svc.torch_engine.collectives import Collectives
from worker_svc.torch_engine.sampler import Sampler
from worker_svc.torch_engine.sampling.logprobs import unpack

CPU = torch.device("cpu")


@dataclass
class SharedMemory:
    """What the threads of a group have in common. Counts collectives, as rank 0 sees them."""

    size: int
    places: list[object] = field(init=False)
    barrier: threading.Barrier = field(init=False)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=30)


class ThreadGroup:
    """The `Collectives` of one thread."""

    elapsed_ns = 0

    def __init__(self, rank: int, memory: SharedMemory) -> None:
        self.rank = rank
        self.size = memory.size
        self._memory = memory

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self._exchange("all-reduce", tensor.clone())).sum(0))

    def all_gather(self, shard: Tensor, widths: Sequence[int]) -> Tensor:
        shards = self._exchange("all-gather", shard.clone())
        assert [part.shape[-1] for part in shards] == list(widths)
        assert all(part.shape[:-1] == shard.shape[:-1] for part in shards)
        return torch.cat(shards, dim=-1)

    def all_to_all(self, sent: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        parts = [of_rank[self.rank] for of_rank in self._exchange("all-to-all", sent.clone().split(list(send_sizes)))]
        assert [len(part) for part in parts] == list(receive_sizes)
        return torch.cat(parts)

    def barrier(self) -> None:
        self._exchange("barrier", None)

    def _exchange(self, name: str, mine: object) -> list:
        memory = self._memory
        memory.places[self.rank] = (name, mine)
        memory.barrier.wait()
        everything = list(memory.places)
        if self.rank == 0:
            memory.calls.append(name)
        memory.barrier.wait()
        assert {called for called, _ in everything} == {name}, "ranks call different collectives"
        return [of_rank for _, of_rank in everything]


def vocab_shard(rank: int, tp_size: int, vocab_size: int) -> ModelShard:
    ids = [shard_vocab(vocab_size, other, tp_size) for other in range(tp_size)]
    one = range(1)
    return ModelShard(rank, tp_size, one, one, one, ids[rank], tuple(map(len, ids)))


class Ranks:
    """The samplers of a group, whose ranks are threads."""

    def __init__(self, scheme: str, tp_size: int, vocab_size: int) -> None:
        self.memory = SharedMemory(tp_size)
        self.shards = [vocab_shard(rank, tp_size, vocab_size) for rank in range(tp_size)]
        self.samplers = [Sampler(scheme, NUM_SLOTS, shard, CPU) for shard in self.shards]

    def sample(self, logits: Tensor, batch: InputBatch) -> tuple[list[int], Logprobs | None]:
        """Of one step, identical on all ranks."""
        groups = [ThreadGroup(rank, self.memory) for rank in range(len(self.shards))]
        with ThreadPoolExecutor(len(groups)) as pool:
            results = list(pool.map(lambda group: self._of_rank(group, logits, batch), groups))
        for tokens, logprobs in results[1:]:
            assert tokens == results[0][0]
            assert_same_logprobs(logprobs, results[0][1])
        return results[0]

    def _of_rank(self, group: Collectives, logits: Tensor, batch: InputBatch) -> tuple[list[int], Logprobs | None]:
        torch.set_num_threads(1)
        ids = self.shards[group.rank].vocab
        with torch.inference_mode():
            sampled = self.samplers[group.rank].sample(logits[:, ids.start : ids.stop].clone(), batch, group)
        logprobs = sampled.logprobs
        return sampled.tokens.tolist(), None if logprobs is None else unpack(logprobs.numpy(), batch.sampling)
