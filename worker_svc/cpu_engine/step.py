"""Steps on the device: the arrays of an input batch as the kernels read them, and what became of a step."""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import Int32Array
from albireo.logprobs import Logprobs
from albireo_kernels import cpu
from albireo_kernels.cpu import Device, Status, StepData, make_step
from worker_svc.batch import InputBatch
from worker_svc.engine import StepOutput, StepTimes

_LOOK_AGAIN_S = 60.0


def step_data(batch: InputBatch, sampling: cpu.Sampling, last_tokens: Int32Array) -> StepData:
    """The step of a batch, whose arrays it reads in place.

    Args:
        sampling: of its sampling rows.
        last_tokens: [max_num_seqs], the token last sampled in each slot; read and written by the device.
    """
    return make_step(
        token_ids=batch.token_ids,
        from_last_token=batch.from_last_token,
        token_slots=batch.token_slots,
        positions=batch.positions,
        slot_mapping=batch.slot_mapping,
        query_starts=batch.query_starts,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
        sample_tokens=batch.sample_tokens,
        sample_slots=batch.sample_slots,
        sampling=sampling,
        last_tokens=last_tokens,
        scored_token_ids=batch.scored_token_ids,
    )


@dataclass(frozen=True, slots=True)
class CpuStep:
    """A step that the device has been given."""

    device: Device
    data: StepData

    def resolve(self) -> StepOutput:
        """Raises GroupError when the step was aborted."""
        # Whoever watches over this thread ends a step that takes too long.
        while self.device.wait(self.data, _LOOK_AGAIN_S) is not Status.OK:
            pass
        step = self.data.c
        times = StepTimes(
            start_at_ns=step.start_at_ns,
            end_at_ns=step.end_at_ns,
            forward_ns=step.forward_end_at_ns - step.start_at_ns,
            sample_ns=step.end_at_ns - step.forward_end_at_ns,
            collective_ns=step.collective_ns,
        )
        told = self.data.logprobs
        return StepOutput(self.data.tokens, times, None if told is None else _of_rows(told))


def _of_rows(told: cpu.Logprobs) -> Logprobs:
    """Those of the rows that want them."""
    (rows,) = np.nonzero(told.num_top >= 0)
    num_top = told.num_top[rows]
    is_there = np.arange(told.top_ids.shape[1]) < num_top[:, None]
    return Logprobs(
        indices=rows.astype(np.int32),
        logprobs=told.logprobs[rows],
        ranks=told.ranks[rows],
        num_top=num_top,
        top_token_ids=told.top_ids[rows][is_there],
        top_logprobs=told.top_logprobs[rows][is_there],
    )
