"""The eager engine with its logits kept."""

import numpy as np
from torch import Tensor

from albireo.arrays import Float32Array
from worker_svc.batch import InputBatch
from worker_svc.engine import EngineConfig
from worker_svc.torch_engine.engine import TorchEngine
from worker_svc.torch_engine.sampler import Sampled


class RecordingTorchEngine(TorchEngine):
    """A `RecordingEngine`."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.recorded: list[Float32Array] = []

    def _sample(self, logits_shard: Tensor, batch: InputBatch) -> Sampled:
        decoder = self._loaded()
        if len(logits_shard):
            gathered = decoder.group.all_gather(logits_shard, decoder.shard.vocab_widths)
            self.recorded.append(gathered.numpy().copy())
        else:
            self.recorded.append(np.zeros((0, decoder.spec.vocab_size), dtype=np.float32))
        return super()._sample(logits_shard, batch)
