"""The same work in torch: on the same memory, with as many threads."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from albireo.arrays import Float32Array, Int32Array
from albireo_kernels import reference
from albireo_kernels.bench.steps import RowInputs, Sampling
from albireo_kernels.cpu import BLOCK, Dtype, Epilogue, KvBlocks, Matrix

_Array = npt.NDArray[Any]
Run = Callable[[int], object]

_DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.BFLOAT16: torch.bfloat16}
_EPS = 1e-6


class InTorch:
    """Functions that do one kernel's work on the copy of an index. Weights are the bytes of packed ones, which torch
    takes for rows: the time does not depend on the values."""

    def __init__(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(False)
        self.version = torch.__version__

    def linear(self, weights: Sequence[Matrix], num_rows: int, epilogue: Epilogue) -> Run | None:
        """None: torch has no such product."""
        first = weights[0]
        if first.dtype not in _DTYPES:
            return None
        shape = (first.num_out, first.num_in)
        tensors = [_view(weight.data, first.dtype, shape) for weight in weights]
        x = torch.randn(num_rows, first.num_in).to(_DTYPES[first.dtype])
        residual = torch.zeros(num_rows, first.num_out)

        def run(index: int) -> object:
            product = F.linear(x, tensors[index])
            if epilogue is Epilogue.SILU_MUL:
                return reference.silu_mul(product)
            return residual.add_(product) if epilogue is Epilogue.ADD else product

        return run

    def add_norm(self, num_rows: int, weights: Sequence[Float32Array]) -> Run:
        x = torch.randn(num_rows, weights[0].size).bfloat16()
        tensors = [torch.from_numpy(weight).bfloat16() for weight in weights]
        return lambda index: reference.rms_norm(x, tensors[index], _EPS)

    def embed(self, tables: Sequence[Matrix], token_ids: Int32Array) -> Run:
        tensors = [_view(table.data, table.dtype, (table.num_out, table.num_in)) for table in tables]
        ids = torch.from_numpy(token_ids)
        return lambda index: F.embedding(ids, tensors[index])

    def rope(self, caches: Sequence[KvBlocks], num_heads: int, cos: Float32Array, slot_mapping: _Array) -> Run:
        """
        Args:
            cos: [num_tokens, head_dim / 2], for the sines as well.
        """
        num_kv_heads, head_dim = caches[0].num_kv_heads, caches[0].head_dim
        keys, values = _caches(caches)
        qkv = torch.randn(len(cos), num_heads + 2 * num_kv_heads, head_dim).bfloat16()
        weight = torch.ones(head_dim).bfloat16()
        turn, slots = torch.from_numpy(cos), torch.from_numpy(slot_mapping)

        def run(index: int) -> object:
            q, k = (
                reference.apply_rope(reference.rms_norm(part, weight, _EPS), turn, turn)
                for part in (qkv[:, :num_heads], qkv[:, num_heads:-num_kv_heads])
            )
            reference.write_kv(k, qkv[:, -num_kv_heads:], keys[index], values[index], slots)
            return q

        return run

    def attention(self, caches: Sequence[KvBlocks], num_heads: int, rows: RowInputs) -> Run:
        groups = reference.group_rows(
            rows.query_starts, rows.context_lens, rows.block_tables, BLOCK, None, torch.device("cpu")
        )
        keys, values = _caches(caches)
        q = torch.randn(len(rows.token_rows), num_heads, caches[0].head_dim).bfloat16()
        return lambda index: reference.attend_groups(q, keys[index], values[index], groups)

    def sample(self, logits: Sequence[Float32Array], sampling: Sampling) -> Run:
        tensors = [torch.from_numpy(each) for each in logits]
        return lambda index: _sample(tensors[index], sampling)


def _sample(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits / sampling.temperature
    if not sampling.top_k:
        return torch.multinomial(scaled.softmax(-1), 1)
    values, ids = scaled.topk(sampling.top_k)
    weights = values.softmax(-1)
    weights[weights.cumsum(-1) - weights >= sampling.top_p] = 0
    return ids.gather(-1, torch.multinomial(weights, 1))


def _view(data: _Array, dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over memory; numpy's bfloat16 means nothing to torch."""
    bits = np.int32 if dtype is Dtype.FLOAT32 else np.int16
    count = int(np.prod(shape))
    return torch.from_numpy(data.reshape(-1).view(bits)[:count]).view(_DTYPES[dtype]).view(shape)


def _caches(caches: Sequence[KvBlocks]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each, [num_blocks, block_size, num_kv_heads, head_dim]."""
    shape = (len(caches[0].keys), BLOCK, caches[0].num_kv_heads, caches[0].head_dim)
    keys = [_view(cache.keys, cache.dtype, shape) for cache in caches]
    return keys, [_view(cache.values, cache.dtype, shape) for cache in caches]
