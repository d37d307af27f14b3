"""What a sampler in plain torch takes for whole rows: it sorts them where there is a filter."""

import statistics
import time

import numpy as np
import torch
from torch import Tensor

from albireo_kernels.bench.sampling.ranks import Effort
from albireo_kernels.bench.steps import Sampling


class InTorch:
    """Samples a batch of random logits."""

    def __init__(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(False)
        self.num_threads = num_threads

    def measure(self, vocab_size: int, batch: int, sampling: Sampling, effort: Effort) -> float:
        """Seconds, a median."""
        logits = torch.from_numpy(3 * np.random.default_rng(0).standard_normal((batch, vocab_size), dtype=np.float32))
        sample(logits, sampling)
        seconds: list[float] = []
        begin_s = time.perf_counter()
        while effort.goes_on(len(seconds), begin_s):
            start_s = time.perf_counter()
            sample(logits, sampling)
            seconds.append(time.perf_counter() - start_s)
        return statistics.median(seconds)


def sample(logits: Tensor, sampling: Sampling) -> Tensor:
    """Token ids [batch] of logits [batch, vocab_size]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = (logits / sampling.temperature).softmax(-1)
    if not sampling.top_k and sampling.top_p >= 1:
        return torch.multinomial(probs, 1)[:, 0]
    ordered, ids = probs.sort(-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0
    before = ordered.cumsum(-1) - ordered
    ordered[before >= sampling.top_p * ordered.sum(-1, keepdim=True)] = 0
    return ids.gather(-1, torch.multinomial(ordered, 1))[:, 0]
