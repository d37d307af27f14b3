"""Programs: operations over buffers, each made by one function.

What an operation computes is told in src/albireo_cpu.h. N is the number of a step's tokens, R that of its rows, S that
of the rows it samples from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from albireo.arrays import Float32Array
from albireo_kernels.cpu.buffers import AnyArray, KvBlocks, Matrix, Rows, address
from albireo_kernels.cpu.structs import (
    MAX_RANKS,
    PANEL,
    AddNormStruct,
    AttentionStruct,
    Dtype,
    EmbedStruct,
    Epilogue,
    Extent,
    GemmStruct,
    OpKind,
    OpStruct,
    OpUnion,
    ProgramStruct,
    QuantizeStruct,
    RopeStruct,
)

MAX_GROUP = 32  # query heads that read one KV head, in attention
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Op:
    """An operation and the buffers that it points to."""

    c: OpStruct
    buffers: tuple[object, ...]


class Program:
    """Operations in order; keeps alive what they point to."""

    def __init__(self, ops: Sequence[Op] = ()) -> None:
        self.ops = tuple(ops)
        self._array = (OpStruct * len(self.ops))(*(op.c for op in self.ops))
        self.c = ProgramStruct(ops=self._array, num_ops=len(self.ops))


def embed(table: Matrix, out: Rows, first_id: int = 0) -> Op:
    """out[token] = the table's row of its id, zeros where that is another rank's.

    Args:
        table: [ids of this rank, hidden], float32 or bfloat16.
        out: [N, hidden] float32.
        first_id: of this rank.
    """
    _require(table.dtype in _FLOATS and out.dtype is Dtype.FLOAT32, "embed: table or out has the wrong type")
    _require(out.size == table.num_in, f"embed: {table.num_in} elements of a row, out has {out.size}")
    struct = EmbedStruct(table=table.c, first_id=first_id, out=out.c)
    return _op(OpKind.EMBED, Extent.EACH_TOKEN, OpUnion(embed=struct), table, out)


def add_norm(
    residual: Rows,
    partials: Sequence[AnyArray],
    weight: Float32Array,
    out: Rows,
    *,
    eps: float,
    sets_residual: bool = False,
    rounds: bool = False,
    extent: Extent = Extent.EACH_TOKEN,
) -> Op:
    """residual += partials; out = rms_norm(residual) * weight.

    Args:
        residual: [N, size] float32.
        partials: [N, size] float32 of each rank, all of one row stride; none: nothing to add and nobody to meet.
        weight: [size].
        out: [N or S, size], float32 or bfloat16.
        sets_residual: residual = sum of partials.
        rounds: rounds to bfloat16 before the multiplication.
    """
    size = residual.size
    _require(residual.dtype is Dtype.FLOAT32 and out.dtype in _FLOATS, "add_norm: residual or out has the wrong type")
    _require(out.size == size, f"add_norm: {size} elements of a row, out has {out.size}")
    _require(len(partials) <= MAX_RANKS, f"add_norm: {len(partials)} partials, {MAX_RANKS} at most")
    _require(
        all(x.dtype == np.float32 and x.strides == partials[0].strides and x.strides[1] == 4 for x in partials),
        "add_norm: partials differ in their strides, or are not float32",
    )
    struct = AddNormStruct(
        residual=residual.c,
        num_partials=len(partials),
        sets_residual=sets_residual,
        partial_stride=partials[0].strides[0] // 4 if partials else 0,
        weight=_floats(weight, size),
        eps=eps,
        rounds=rounds,
        out=out.c,
    )
    for index, partial in enumerate(partials):
        struct.partials[index] = address(partial)
    return _op(OpKind.ADD_NORM, extent, OpUnion(add_norm=struct), residual, tuple(partials), weight, out)


def gemm(
    x: Rows,
    weight: Matrix,
    out: Rows,
    *,
    bias: Float32Array | None = None,
    epilogue: Epilogue = Epilogue.STORE,
    extent: Extent = Extent.EACH_TOKEN,
) -> Op:
    """out = x weight^T + bias, stored, added, or through silu(gate) * up.

    Args:
        x: [N or S, num_in] of the type that `Library.input_dtype` tells for the weight's.
        weight: [num_out, num_in]. SILU_MUL: panels alternate between gate and up, all of them whole.
        out: [N or S, num_out], float32 or bfloat16; ADD: float32; SILU_MUL: [N or S, gate outputs].
        bias: [num_out], in the order of the weight's outputs.
    """
    num_needed = silu_mul_outputs(out.size) if epilogue is Epilogue.SILU_MUL else out.size
    _require(x.size == weight.num_in, f"gemm: x has {x.size} elements, weight {weight.num_in} inputs")
    _require(weight.num_out == num_needed, f"gemm: {weight.num_out} outputs, out of {out.size} needs {num_needed}")
    _require(out.dtype in _FLOATS, "gemm: out has the wrong type")
    _require(epilogue is not Epilogue.ADD or out.dtype is Dtype.FLOAT32, "gemm: adds to float32 only")
    struct = GemmStruct(
        x=x.c,
        weight=weight.c,
        bias=None if bias is None else _floats(bias, weight.num_out),
        out=out.c,
        epilogue=epilogue,
    )
    return _op(OpKind.GEMM, extent, OpUnion(gemm=struct), x, weight, out, bias)


def silu_mul_outputs(size: int) -> int:
    """Outputs of a weight whose panels alternate between gate and up, of ``size`` outputs each."""
    return 2 * PANEL * -(-size // PANEL)


def rope(
    qkv: Rows,
    q: Rows,
    kv: KvBlocks,
    cos: Float32Array,
    sin: Float32Array,
    *,
    num_heads: int,
    q_norm: Float32Array | None = None,
    k_norm: Float32Array | None = None,
    eps: float = 0.0,
    rounds: bool = False,
) -> Op:
    """Norms (where there are weights) and rotates queries and keys; writes keys and values to their blocks.

    Args:
        qkv: [N, (num_heads + 2 * num_kv_heads) * head_dim] float32.
        q: [N, num_heads * head_dim], float32 or bfloat16; written.
        kv: written.
        cos, sin: [positions, head_dim / 2].
        q_norm, k_norm: [head_dim].
        rounds: as of `add_norm`.
    """
    width = (num_heads + 2 * kv.num_kv_heads) * kv.head_dim
    _require(qkv.dtype is Dtype.FLOAT32 and qkv.size == width, f"rope: qkv is not [N, {width}] float32")
    _require(q.size == num_heads * kv.head_dim, f"rope: {num_heads} heads of {kv.head_dim}, q has {q.size} elements")
    _require(cos.shape[1:] == sin.shape[1:] == (kv.head_dim // 2,), "rope: cos or sin has the wrong width")
    struct = RopeStruct(
        qkv=qkv.c,
        q=q.c,
        q_norm=None if q_norm is None else _floats(q_norm, kv.head_dim),
        k_norm=None if k_norm is None else _floats(k_norm, kv.head_dim),
        cos=_floats(cos, cos.size),
        sin=_floats(sin, sin.size),
        keys=address(kv.keys),
        values=address(kv.values),
        kv_dtype=kv.dtype,
        num_heads=num_heads,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        eps=eps,
        rounds=rounds,
    )
    return _op(OpKind.ROPE, Extent.EACH_TOKEN, OpUnion(rope=struct), qkv, q, kv, cos, sin, q_norm, k_norm)


def attention(q: Rows, kv: KvBlocks, out: Rows, *, num_heads: int, sliding_window: int | None = None) -> Op:
    """Causal attention of every row's tokens over its blocks.

    Args:
        q: [N, num_heads * head_dim] of the type that `Library.input_dtype` tells for the blocks'.
        out: [N, num_heads * head_dim], float32 or bfloat16.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None: all before it.
    """
    width = num_heads * kv.head_dim
    _require(q.size == width and out.size == width, f"attention: q or out has no {width} elements")
    _require(num_heads <= MAX_GROUP * kv.num_kv_heads, f"attention: more than {MAX_GROUP} heads read one KV head")
    _require(kv.head_dim <= MAX_HEAD_DIM, f"attention: heads of {kv.head_dim}, {MAX_HEAD_DIM} at most")
    _require(sliding_window is None or sliding_window > 0, f"attention: sliding_window {sliding_window}")
    struct = AttentionStruct(
        q=q.c,
        out=out.c,
        keys=address(kv.keys),
        values=address(kv.values),
        kv_dtype=kv.dtype,
        num_heads=num_heads,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        sliding_window=sliding_window or 0,
    )
    return _op(OpKind.ATTENTION, Extent.EACH_TOKEN, OpUnion(attention=struct), q, kv, out)


def quantize(x: Rows, out: Rows, extent: Extent = Extent.EACH_TOKEN) -> Op:
    """out = round(x / scale), scale = max |x| / 127 of the row.

    Args:
        x: [N or S, size] float32.
        out: [N or S, size] int8.
    """
    _require(x.dtype is Dtype.FLOAT32 and out.dtype is Dtype.INT8, "quantize: x or out has the wrong type")
    _require(x.size == out.size, f"quantize: x has {x.size} elements, out {out.size}")
    return _op(OpKind.QUANTIZE, extent, OpUnion(quantize=QuantizeStruct(x=x.c, out=out.c)), x, out)


_FLOATS = (Dtype.FLOAT32, Dtype.BFLOAT16)


def _op(kind: OpKind, extent: Extent, of: OpUnion, *buffers: object) -> Op:
    return Op(OpStruct(kind=kind, extent=extent, of=of), buffers)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _floats(array: AnyArray, size: int) -> int:
    """The address of ``size`` float32 in one piece."""
    is_whole = array.dtype == np.float32 and array.size == size and array.flags.c_contiguous
    _require(is_whole, f"{array.dtype} {array.shape} where {size} float32 in one piece are needed")
    return address(array)
