"""The compiled engine with its logits kept."""

import numpy as np

from albireo.arrays import Float32Array
from albireo_kernels.cpu import Dtype, Library, Program, Rows, add_norm
from worker_svc.batch import InputBatch
from worker_svc.cpu_engine.engine import CpuEngine
from worker_svc.cpu_engine.step import CpuStep, step_data
from worker_svc.engine import EngineConfig


class RecordingCpuEngine(CpuEngine):
    """A `RecordingEngine`: runs the forward program alone, with a meeting at its end, when all ranks' logits are there;
    then sampling, which begins only when all ranks have come."""

    def __init__(self, config: EngineConfig, library: Library) -> None:
        super().__init__(config, library)
        self.recorded: list[Float32Array] = []
        self._config = config

    def allocate(self, num_blocks: int) -> None:
        super().allocate(num_blocks)
        assert self._programs is not None
        nothing = Rows(self._config.max_num_batched_tokens, 16, Dtype.FLOAT32)
        meeting = add_norm(nothing, [nothing.array], np.ones(16, np.float32), nothing, eps=1.0)
        self._forward = Program([*self._programs.forward.ops, meeting])

    def launch(self, batch: InputBatch) -> CpuStep:
        assert self._programs is not None
        assert self._group is not None
        step = step_data(batch, self._sampling.of_step(batch), self._last_tokens)
        self._device.run(self._forward, step)
        self.recorded.append(self._group.sampling.logits[: len(batch.sample_tokens)].copy())
        sampling = step_data(batch, self._sampling.of_step(batch), self._last_tokens)
        self._device.submit(Program(), self._programs.sample, sampling)
        return CpuStep(self._device, sampling)
