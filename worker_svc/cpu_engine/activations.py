"""The buffers that a step's activations lie in; all layers use the same ones."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from albireo.model_spec import ModelSpec
from albireo_kernels.cpu import PANEL, Dtype, Library, Rows, allocate
from worker_svc.sharding import ModelShard


@dataclass(frozen=True, slots=True)
class ProductInput:
    """What products read.

    Attributes:
        written: as it is written: maybe some columns wider, which are zero.
        read: the same memory, as it is read.
        integers: what is read in its place where weights are integers.
    """

    written: Rows
    read: Rows
    integers: Rows | None

    @classmethod
    def make(cls, library: Library, weights: Dtype, num_rows: int, size: int, width: int = 0) -> "ProductInput":
        """For products with weights of this type, in ``size`` columns of ``width`` (0: of as many)."""
        integers = Rows(num_rows, size, Dtype.INT8) if weights is Dtype.INT8 else None
        dtype = Dtype.FLOAT32 if integers else library.input_dtype(weights)
        written = Rows(num_rows, width or size, dtype)
        return cls(written, Rows.of(written.array[:, :size]) if width else written, integers)


@dataclass(frozen=True, slots=True)
class Activations:
    """H and KVH count the rank's heads, I its MLP columns; N is the greatest number of tokens, S of samples.

    Attributes:
        residual: [N, hidden] float32.
        normed: [N, hidden].
        qkv: [N, (H + 2 KVH) * head_dim] float32.
        q, attended: [N, H * head_dim].
        gated: [N, I], written in whole panels.
        sampling: [S, hidden].
        sample_scratch: [threads, bytes].
    """

    residual: Rows
    normed: ProductInput
    qkv: Rows
    q: Rows
    attended: ProductInput
    gated: ProductInput
    sampling: ProductInput
    sample_scratch: npt.NDArray[np.uint8]


def make_activations(
    library: Library,
    spec: ModelSpec,
    shard: ModelShard,
    kv_dtype: Dtype,
    linear_dtype: Dtype,
    max_num_tokens: int,
    max_num_samples: int,
    num_threads: int,
) -> Activations:
    def of_tokens(size: int, width: int = 0) -> ProductInput:
        return ProductInput.make(library, linear_dtype, max_num_tokens, size, width)

    query_size, kv_size = len(shard.heads) * spec.head_dim, len(shard.kv_heads) * spec.head_dim
    num_columns = len(shard.intermediate)
    scratch_bytes = -(-library.sample_scratch_bytes(spec.vocab_size) // 64) * 64
    return Activations(
        residual=Rows(max_num_tokens, spec.hidden_size, Dtype.FLOAT32),
        normed=of_tokens(spec.hidden_size),
        qkv=Rows(max_num_tokens, query_size + 2 * kv_size, Dtype.FLOAT32),
        q=Rows(max_num_tokens, query_size, library.input_dtype(kv_dtype)),
        attended=of_tokens(query_size),
        gated=of_tokens(num_columns, -(-num_columns // PANEL) * PANEL),
        sampling=ProductInput.make(library, linear_dtype, max_num_samples, spec.hidden_size),
        sample_scratch=allocate((num_threads, scratch_bytes), np.uint8),
    )
