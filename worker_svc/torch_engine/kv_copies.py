"""The blocks of a cache in torch, for transfers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from albireo.kv.part import Piece
from worker_svc.kv_parts import HostCopies, KvCopies, KvShape
from worker_svc.torch_engine.kv_cache import KvCache

_HEAD_AXIS = 3


def make_copies(shape: KvShape, cache: KvCache) -> KvCopies:
    return GpuCopies(shape, cache) if cache.keys.is_cuda else _host_copies(shape, cache.keys, cache.values)


class GpuCopies:
    """Of a cache on a GPU: one block at a time passes through pinned memory, on a stream beside the steps.

    A transfer begins when the step before it is over, and no step touches its blocks until it has ended, so that the
    stream waits for none.
    """

    def __init__(self, shape: KvShape, cache: KvCache) -> None:
        self._cache = cache.keys, cache.values
        self._staging = tuple(torch.empty_like(of[:, :1], device="cpu", pin_memory=True) for of in self._cache)
        self._stream = torch.cuda.Stream(cache.keys.device)  # type: ignore[no-untyped-call]  # of torch
        self._host = _host_copies(shape, *self._staging)

    def pieces(self, block: int, part: int) -> Sequence[Piece]:
        return self._host.pieces(0, part)

    def fetch(self, block: int) -> None:
        self._copy([(staged[:, 0], of[:, block]) for staged, of in zip(self._staging, self._cache, strict=True)])

    def put(self, block: int) -> None:
        self._copy([(of[:, block], staged[:, 0]) for staged, of in zip(self._staging, self._cache, strict=True)])

    @torch.inference_mode()
    def _copy(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Waits until each second tensor is in the first."""
        with torch.cuda.stream(self._stream):
            for to, of in copies:
                to.copy_(of, non_blocking=True)
        self._stream.synchronize()


@torch.inference_mode()
def _host_copies(shape: KvShape, keys: Tensor, values: Tensor) -> HostCopies:
    # As bytes: numpy has no bfloat16.
    return HostCopies(shape, [of.view(torch.uint8).numpy() for of in (keys, values)], _HEAD_AXIS)
