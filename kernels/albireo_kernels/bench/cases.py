"""The kernels that are measured, each with its operations on many copies of its weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from albireo_kernels import cpu
from albireo_kernels.bench.limits import Cost
from albireo_kernels.bench.measure import Case
from albireo_kernels.bench.settings import Settings
from albireo_kernels.bench.steps import RowInputs, Sampling, step_of
from albireo_kernels.cpu import PANEL, Dtype, Epilogue, KvBlocks, Library, Matrix, Rows, allocate

if TYPE_CHECKING:
    from albireo_kernels.bench.in_torch import InTorch

_EPS = 1e-6
_PACKED_AT_ONCE = 64 * PANEL
_NUM_PARTIALS = 2  # ranks of an all-reduce
_KV_DTYPE = Dtype.BFLOAT16
_SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.8),
    "top-k 50, top-p 0.95": Sampling(temperature=0.8, top_k=50, top_p=0.95),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that share their weights, which are there while they are gone through."""

    num_cases: int
    cases: Callable[[], Iterator[Case]]


@dataclass(frozen=True, slots=True)
class _Linear:
    name: str
    num_out: int
    num_in: int
    epilogue: Epilogue = Epilogue.STORE


def all_groups(library: Library, settings: Settings, num_threads: int, in_torch: "InTorch | None") -> list[Group]:
    cases = _Cases(library, settings, num_threads, in_torch)
    groups = [
        Group(len(rows), partial(cases.gemm, linear, rows, dtype))
        for dtype in (Dtype.BFLOAT16, Dtype.FLOAT32, Dtype.INT8)
        for linear, rows in cases.linears()
        if rows
    ]
    groups += [Group(len(settings.rows), make) for make in (cases.quantize, cases.add_norm, cases.embed)]
    shapes = [(batch, 1, context) for batch, context in settings.decode]
    shapes += [(1, tokens, tokens) for tokens in settings.prefill]
    groups += [Group(2, partial(cases.rope_and_attention, *shape)) for shape in shapes]
    groups += [Group(len(_SAMPLINGS), partial(cases.sample, num_rows)) for num_rows in settings.sampled]
    if num_threads >= _NUM_PARTIALS:
        groups.append(Group(len(settings.rows), cases.all_reduce))
    return groups


class _Cases:
    def __init__(self, library: Library, settings: Settings, num_threads: int, in_torch: "InTorch | None") -> None:
        self._library, self._settings, self._num_threads, self._torch = library, settings, num_threads, in_torch
        self._rng = np.random.default_rng(0)

    def linears(self) -> list[tuple[_Linear, tuple[int, ...]]]:
        """Each product of a model, and of how many rows."""
        of = self._settings
        query, kv = of.num_heads * of.head_dim, of.num_kv_heads * of.head_dim
        return [
            (_Linear("qkv", query + 2 * kv, of.hidden), of.rows),
            (_Linear("output", of.hidden, query, Epilogue.ADD), of.rows),
            (_Linear("gate_up", 2 * of.intermediate, of.hidden, Epilogue.SILU_MUL), of.rows),
            (_Linear("down", of.hidden, of.intermediate, Epilogue.ADD), of.rows),
            (_Linear("lm_head", of.vocab_size, of.hidden), of.sampled),
        ]

    def gemm(self, linear: _Linear, rows: Sequence[int], dtype: Dtype) -> Iterator[Case]:
        torch = self._torch
        weights = self._weights(dtype, linear.num_out, linear.num_in)
        input_dtype = self._library.input_dtype(dtype)
        stored_dtype = Dtype.FLOAT32
        num_columns = linear.num_out
        if linear.epilogue is Epilogue.SILU_MUL:
            num_columns //= 2
            stored_dtype = Dtype.FLOAT32 if dtype is Dtype.INT8 else input_dtype
        num_bytes = linear.num_out * linear.num_in * dtype.numpy.itemsize + 8 * linear.num_out * (dtype is Dtype.INT8)
        for num_rows in rows:
            x = self._rows(num_rows, linear.num_in, input_dtype)
            out = Rows(num_rows, num_columns, stored_dtype)
            touches = 2 if linear.epilogue is Epilogue.ADD else 1
            out_bytes = touches * num_columns * stored_dtype.numpy.itemsize
            yield Case(
                kernel=f"{linear.name} {dtype.name.lower()}",
                shape=f"{num_rows} x {linear.num_in} -> {linear.num_out}",
                cost=Cost(
                    num_bytes,
                    num_rows * (linear.num_in * input_dtype.numpy.itemsize + out_bytes),
                    2 * num_rows * linear.num_in * linear.num_out,
                    dtype,
                ),
                ops=[[cpu.gemm(x, weight, out, epilogue=linear.epilogue) for weight in weights]],
                steps=[step_of(RowInputs.of(num_rows))],
                in_torch=torch.linear(weights, num_rows, linear.epilogue) if torch else None,
            )

    def quantize(self) -> Iterator[Case]:
        size = self._settings.hidden
        for num_rows in self._settings.rows:
            x, out = self._rows(num_rows, size, Dtype.FLOAT32), Rows(num_rows, size, Dtype.INT8)
            yield Case(
                kernel="quantize",
                shape=f"{num_rows} x {size}",
                cost=Cost(0, num_rows * size * 5),
                ops=[[cpu.quantize(x, out)] * self._settings.max_copies],
                steps=[step_of(RowInputs.of(num_rows))],
            )

    def add_norm(self) -> Iterator[Case]:
        torch, size, weights = self._torch, self._settings.hidden, self._norm_weights()
        for num_rows in self._settings.rows:
            residual, out = self._rows(num_rows, size, Dtype.FLOAT32), self._normed(num_rows)
            yield Case(
                kernel="add_norm",
                shape=f"{num_rows} x {size}",
                cost=Cost(weights[0].nbytes, num_rows * size * (4 + out.dtype.numpy.itemsize)),
                ops=[[cpu.add_norm(residual, [], weight, out, eps=_EPS, rounds=True) for weight in weights]],
                steps=[step_of(RowInputs.of(num_rows))],
                in_torch=torch.add_norm(num_rows, weights) if torch else None,
            )

    def all_reduce(self) -> Iterator[Case]:
        """Ranks meet, and each adds up what all of them have."""
        size, weights = self._settings.hidden, self._norm_weights()
        for num_rows in self._settings.rows:
            partials = [self._rows(num_rows, size, Dtype.FLOAT32).array for _ in range(_NUM_PARTIALS)]
            ops = []
            for _ in range(_NUM_PARTIALS):
                residual, out = Rows(num_rows, size, Dtype.FLOAT32), self._normed(num_rows)
                ops.append([cpu.add_norm(residual, partials, weight, out, eps=_EPS, rounds=True) for weight in weights])
            element_bytes = 4 * _NUM_PARTIALS + 8 + self._normed(1).dtype.numpy.itemsize
            yield Case(
                kernel=f"all-reduce of {_NUM_PARTIALS}",
                shape=f"{num_rows} x {size}",
                cost=Cost(weights[0].nbytes, _NUM_PARTIALS * num_rows * size * element_bytes),
                ops=ops,
                steps=[step_of(RowInputs.of(num_rows)) for _ in range(_NUM_PARTIALS)],
            )

    def embed(self) -> Iterator[Case]:
        """Every copy is a part of the vocabulary."""
        torch, settings = self._torch, self._settings
        (whole, *_) = self._weights(_KV_DTYPE, settings.vocab_size, settings.hidden, max_copies=1)
        num_ids = settings.vocab_size // settings.max_copies // PANEL * PANEL
        part_bytes, _ = self._library.matrix_bytes(_KV_DTYPE, num_ids, settings.hidden)
        parts = [
            Matrix(self._library, _KV_DTYPE, num_ids, settings.hidden, whole.data[index * part_bytes :][:part_bytes])
            for index in range(settings.max_copies)
        ]
        for num_rows in settings.rows:
            out = Rows(num_rows, settings.hidden, Dtype.FLOAT32)
            token_ids = np.zeros(num_rows, dtype=np.int32)

            def draw(token_ids: npt.NDArray[np.int32] = token_ids) -> None:
                token_ids[...] = self._rng.integers(0, num_ids, len(token_ids))

            yield Case(
                kernel="embed",
                shape=f"{num_rows} x {settings.hidden}",
                cost=Cost(2 * num_rows * settings.hidden, 4 * num_rows * settings.hidden),
                ops=[[cpu.embed(part, out) for part in parts]],
                steps=[step_of(RowInputs.of(num_rows), token_ids=token_ids)],
                prepare=draw,
                in_torch=torch.embed(parts, token_ids) if torch else None,
            )

    def rope_and_attention(self, batch: int, tokens: int, context: int) -> Iterator[Case]:
        """Rows of so many tokens, the last ones of their context."""
        torch, of, library = self._torch, self._settings, self._library
        num_tokens, width = batch * tokens, of.num_heads * of.head_dim
        rows = RowInputs.of(batch, tokens, context)
        caches = self._caches(rows.block_tables.size)
        kv_bytes = 2 * of.num_kv_heads * of.head_dim * _KV_DTYPE.numpy.itemsize  # of a token
        step = step_of(rows)
        shape = f"{batch} x 1, context {context}" if tokens == 1 else f"{tokens} tokens"

        input_dtype = library.input_dtype(_KV_DTYPE)
        qkv = self._rows(num_tokens, width + 2 * of.num_kv_heads * of.head_dim, Dtype.FLOAT32)
        q = self._rows(num_tokens, width, input_dtype)
        cos = np.full((context, of.head_dim // 2), np.sqrt(0.5), dtype=np.float32)
        norm = np.ones(of.head_dim, dtype=np.float32)
        yield Case(
            kernel="rope",
            shape=shape,
            cost=Cost(
                num_tokens * kv_bytes,
                num_tokens * (4 * qkv.size + 4 * of.head_dim + width * input_dtype.numpy.itemsize),
            ),
            ops=[
                [
                    cpu.rope(
                        qkv, q, kv, cos, cos, q_norm=norm, k_norm=norm, eps=_EPS, rounds=True, num_heads=of.num_heads
                    )
                    for kv in caches
                ]
            ],
            steps=[step],
            in_torch=torch.rope(caches, of.num_heads, cos[rows.positions], rows.slot_mapping) if torch else None,
        )
        out = Rows(num_tokens, width, input_dtype)
        num_seen = int((rows.positions + 1).sum())
        yield Case(
            kernel="attention",
            shape=shape,
            cost=Cost(
                batch * context * kv_bytes,
                2 * num_tokens * width * input_dtype.numpy.itemsize,
                4 * width * num_seen,
                _KV_DTYPE,
            ),
            ops=[[cpu.attention(q, kv, out, num_heads=of.num_heads) for kv in caches]],
            steps=[step],
            in_torch=torch.attention(caches, of.num_heads, rows) if torch else None,
        )

    def sample(self, num_rows: int) -> Iterator[Case]:
        torch, of = self._torch, self._settings
        source = 3 * self._rng.standard_normal((num_rows, of.vocab_size), dtype=np.float32)
        copies = [allocate(source.shape, np.float32) for _ in range(self._num_copies(source.nbytes))]
        scratch_bytes = -(-self._library.sample_scratch_bytes(of.vocab_size) // 64) * 64
        scratch = allocate((self._num_threads, scratch_bytes), np.uint8)
        alone = cpu.RankSampling(0, range(of.vocab_size), cpu.SlotTokens(num_rows, 1), scratch)

        def restore() -> None:
            for copy in copies:
                copy[...] = source

        programs = [cpu.sampling_ops("merge", cpu.SharedSampling.alone(copy), alone) for copy in copies]
        for name, sampling in _SAMPLINGS.items():
            yield Case(
                kernel=f"sample, {name}",
                shape=f"{num_rows} x {of.vocab_size}",
                cost=Cost(source.nbytes),
                ops=[list(chain(*programs))],
                num_parts=len(programs[0]),
                steps=[step_of(RowInputs.of(num_rows), sampling=sampling)],
                prepare=restore,
                in_torch=torch.sample(copies, sampling) if torch else None,
            )

    def _num_copies(self, num_bytes: int) -> int:
        return max(1, min(self._settings.max_copies, self._settings.copies_bytes // num_bytes))

    def _weights(self, dtype: Dtype, num_out: int, num_in: int, max_copies: int = 1 << 30) -> list[Matrix]:
        first = Matrix(self._library, dtype, num_out, num_in)
        rows = self._rng.standard_normal((min(_PACKED_AT_ONCE, num_out), num_in), dtype=np.float32)
        for begin in range(0, num_out, _PACKED_AT_ONCE):
            first.pack_into(rows[: num_out - begin], begin // PANEL)
        copies = [first]
        for _ in range(min(max_copies, self._num_copies(first.data.nbytes)) - 1):
            copy = Matrix(self._library, dtype, num_out, num_in)
            copy.data[...] = first.data
            for mine, its in ((copy.scales, first.scales), (copy.sums, first.sums)):
                if mine is not None and its is not None:
                    mine[...] = its
            copies.append(copy)
        return copies

    def _norm_weights(self) -> list[npt.NDArray[np.float32]]:
        weights = allocate((self._settings.max_copies, self._settings.hidden), np.float32)
        weights[...] = 1
        return list(weights)

    def _caches(self, count: int) -> list[KvBlocks]:
        of = self._settings
        block_bytes = KvBlocks.block_bytes(self._library, _KV_DTYPE, of.num_kv_heads, of.head_dim)
        caches = []
        for _ in range(self._num_copies(count * block_bytes)):
            cache = KvBlocks(self._library, _KV_DTYPE, count, of.num_kv_heads, of.head_dim)
            for data in (cache.keys, cache.values):
                elements = data.reshape(-1).view(_KV_DTYPE.numpy)
                elements[...] = np.resize(self._rng.standard_normal(1 << 16).astype(elements.dtype), elements.shape)
            caches.append(cache)
        return caches

    def _rows(self, num_rows: int, size: int, dtype: Dtype) -> Rows:
        rows = Rows(num_rows, size, dtype)
        values = self._rng.standard_normal((num_rows, size), dtype=np.float32)
        if rows.scales is not None:
            values *= 32
            np.clip(values, -127, 127, out=values)
            rows.scales[...] = 1 / 32
        rows.array[...] = values.astype(dtype.numpy)
        return rows

    def _normed(self, num_rows: int) -> Rows:
        return Rows(num_rows, self._settings.hidden, self._library.input_dtype(_KV_DTYPE))
