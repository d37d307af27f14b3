"""Steps on the device: the arrays of an input batch as the kernels read them, and what became of a step."""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import Int32Array, Int64Array
from albireo_kernels.cpu import Device, Status, StepData, make_step
from albireo_kernels.noise import row_keys
from worker_svc.batch import InputBatch
from worker_svc.engine import StepOutput, StepTimes
from worker_svc.row_sampling import RowSampling

_LOOK_AGAIN_S = 60.0


def step_data(batch: InputBatch, last_tokens: Int32Array) -> StepData:
    """The step of a batch, whose arrays it reads in place.

    Args:
        last_tokens: [max_num_seqs], the token last sampled in each slot; read and written by the device.
    """
    sampling = batch.sampling
    num_samples = len(batch.sample_rows)
    suppressed_starts, suppressed_ids = _suppressed(sampling, num_samples)
    draws = sampling.temperature.any()  # else all rows are greedy, and need no noise
    return make_step(
        token_ids=batch.token_ids,
        from_last_token=batch.from_last_token,
        token_slots=batch.token_slots,
        positions=batch.positions,
        slot_mapping=batch.slot_mapping,
        query_starts=batch.query_starts,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
        sample_rows=batch.sample_rows,
        sample_slots=batch.sample_slots,
        temperature=np.ascontiguousarray(sampling.temperature),
        top_p=np.ascontiguousarray(sampling.top_p),
        top_k=np.ascontiguousarray(sampling.top_k),
        noise_keys=row_keys(sampling.seed, batch.output_positions) if draws else np.zeros(num_samples, np.uint64),
        suppressed_starts=suppressed_starts,
        suppressed_ids=suppressed_ids,
        last_tokens=last_tokens,
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
        return StepOutput(self.data.tokens, times)


def _suppressed(sampling: RowSampling, num_samples: int) -> tuple[Int64Array, Int32Array]:
    """Where each row's ids begin, [S + 1], and the ids."""
    starts = np.zeros(num_samples + 1, dtype=np.int64)
    if not sampling.suppressed:
        return starts, np.zeros(0, dtype=np.int32)
    for row, ids in sampling.suppressed:
        starts[row + 1] = len(ids)
    return np.cumsum(starts), np.concatenate([ids for _, ids in sampling.suppressed])
