"""Messages of vllm.grpc.engine: how busy the server is, as the planner last told."""

import time
from datetime import UTC, datetime
from typing import Any

from smg_grpc_proto import vllm_engine_pb2
from smg_grpc_proto.generated import common_pb2

import albireo
from albireo.v1 import frontend_pb2, plan_pb2

_RANK = 0  # of data parallelism, which there is none of


def loads_response(group: plan_pb2.GroupInfo, load: frontend_pb2.Load, request: Any) -> Any:
    """A GetLoadsResponse. There are core figures only, whatever else is to be included."""
    is_asked = not request.HasField("dp_rank") or request.dp_rank == _RANK
    loads = [_scheduler_load(group, load)] if is_asked else []
    return vllm_engine_pb2.GetLoadsResponse(
        timestamp=datetime.now(UTC).isoformat(), version=albireo.__version__, dp_rank_count=len(loads), loads=loads
    )


class LoadRecords:
    """The load records of one stream of KvEventBatches.

    Args:
        before_first_batch: whether they may come before any other batch.
    """

    def __init__(self, group: plan_pb2.GroupInfo, before_first_batch: bool) -> None:
        self._group = group
        self._may_be_alone = before_first_batch
        self._told: frontend_pb2.Load | None = None
        self._num_told = 0
        self._last_number = 0

    def beside(self, batch: Any, load: frontend_pb2.Load) -> Any:
        """The batch, which is sent next, with a record."""
        batch.load.CopyFrom(self._record(load, in_full=not self._num_told))
        self._may_be_alone = True
        self._last_number = batch.sequence_number
        return batch

    def alone(self, load: frontend_pb2.Load) -> Any:
        """A batch of nothing but a record; None when it would tell nothing new, or comes too early."""
        if not self._may_be_alone or load is self._told:
            return None
        record = self._record(load, in_full=True)
        record.load_only = True
        return common_pb2.KvEventBatch(sequence_number=self._last_number, timestamp=time.time(), load=record)

    def repeat(self) -> None:
        """What has been told may be told again."""
        self._told = None

    def _record(self, load: frontend_pb2.Load, in_full: bool) -> Any:
        """An EngineLoad; ``in_full``: with figures that routing does not read."""
        self._told = load
        self._num_told += 1
        group, usage = self._group, _usage(self._group, load)
        record = common_pb2.EngineLoad(
            running_requests=load.num_running,
            waiting_requests=load.num_waiting,
            waiting_uncached_tokens=load.num_waiting_tokens,
            token_usage=usage,
            active_token_usage=usage,  # what is cached and unused is free
            gen_throughput=load.tokens_per_s,
            max_running_requests=group.max_num_seqs,
            sample=self._num_told,
        )
        if in_full:
            record.cache_hit_rate = load.cache_hit_rate
            record.num_used_tokens = load.num_used_blocks * group.block_size
            record.max_total_num_tokens = group.num_blocks * group.block_size
        return record


def _scheduler_load(group: plan_pb2.GroupInfo, load: frontend_pb2.Load) -> Any:
    usage = _usage(group, load)
    return vllm_engine_pb2.SchedulerLoad(
        dp_rank=_RANK,
        num_running_reqs=load.num_running,
        num_waiting_reqs=load.num_waiting,
        num_total_reqs=load.num_running + load.num_waiting,
        num_used_tokens=load.num_used_blocks * group.block_size,
        max_total_num_tokens=group.num_blocks * group.block_size,
        token_usage=usage,
        gen_throughput=load.tokens_per_s,
        cache_hit_rate=load.cache_hit_rate,
        utilization=max(usage, load.num_running / group.max_num_seqs),  # of what runs out first
        max_running_requests=group.max_num_seqs,
        num_waiting_uncached_tokens=load.num_waiting_tokens,  # at most: what the cache has is known at their start
    )


def _usage(group: plan_pb2.GroupInfo, load: frontend_pb2.Load) -> float:
    return load.num_used_blocks / group.num_blocks
