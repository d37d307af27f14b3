"""Captures a model's forward pass, and sampling, as programs over preallocated buffers.

Every layer has two halves, attention and MLP, and each adds to the residual. A rank alone adds where it multiplies.
Several ranks each store their part of the sum in memory that all of them read; the norm that begins the next half waits
for all of them and adds up the parts. The embedding is such a sum as well: each rank looks up its ids.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from albireo.arrays import Float32Array
from albireo.model_spec import ModelSpec
from albireo_kernels import cpu
from albireo_kernels.cpu import Dtype, Epilogue, Extent, KvBlocks, Op, Program, RankSampling, Rows, SlotTokens
from worker_svc.cpu_engine.activations import Activations, ProductInput
from worker_svc.cpu_engine.shared import GroupBuffers
from worker_svc.cpu_engine.weights import LayerWeights, Linear, ModelWeights
from worker_svc.sharding import ModelShard


@dataclass(frozen=True, slots=True)
class Model:
    """What a forward pass reads and writes on one rank, other than activations.

    Attributes:
        rope: cosines and sines, each [max_model_len, head_dim / 2].
        dtype: what the model is computed in: of embedding and KV cache.
    """

    spec: ModelSpec
    shard: ModelShard
    weights: ModelWeights
    rope: tuple[Float32Array, Float32Array]
    dtype: Dtype

    @property
    def rounds(self) -> bool:
        """Whether norms round as models in bfloat16 do."""
        return self.dtype is Dtype.BFLOAT16


@dataclass(frozen=True, slots=True)
class Programs:
    """Replayed one after the other: T3 and T4 of a step."""

    forward: Program
    sample: Program


def capture(
    model: Model,
    kv: Sequence[KvBlocks],
    activations: Activations,
    group: GroupBuffers,
    slot_tokens: SlotTokens,
    sampler: str,
) -> Programs:
    """The programs of one rank.

    Args:
        kv: the cache of each layer.
        sampler: one of `albireo_kernels.cpu.SCHEMES`.
    """
    own = RankSampling(model.shard.rank, model.shard.vocab, slot_tokens, activations.sample_scratch)
    sample = cpu.sampling_ops(sampler, group.sampling, own)
    return Programs(Program(_Capture(model, kv, activations, group).forward()), Program(sample))


class _Capture:
    """Appends operations in the order of the forward pass."""

    def __init__(self, model: Model, kv: Sequence[KvBlocks], activations: Activations, group: GroupBuffers) -> None:
        self._model = model
        self._kv = kv
        self._activations = activations
        self._group = group
        self._partials = itertools.cycle(group.partials)
        self._summands: Sequence[Float32Array] = ()  # what the next norm adds up
        self._sets_residual = False
        self._ops: list[Op] = []

    def forward(self) -> list[Op]:
        activations, weights = self._activations, self._model.weights
        self._embed()
        for layer, kv in zip(weights.layers, self._kv, strict=True):
            self._norm(layer.attention_norm, activations.normed)
            self._attention(layer, kv)
            self._norm(layer.mlp_norm, activations.normed)
            self._multiply(activations.normed, layer.gate_up, activations.gated.written, Epilogue.SILU_MUL)
            self._multiply_and_add(activations.gated, layer.down)
        self._norm(weights.final_norm, activations.sampling, Extent.EACH_SAMPLE)
        self._lm_head()
        return self._ops

    def _embed(self) -> None:
        ids, table = self._model.shard.vocab, self._model.weights.embedding
        self._ops.append(cpu.embed(table, self._next_partial() or self._activations.residual, ids.start))
        self._sets_residual = True

    def _attention(self, layer: LayerWeights, kv: KvBlocks) -> None:
        model, activations = self._model, self._activations
        num_heads, (cos, sin) = len(model.shard.heads), model.rope
        self._multiply(activations.normed, layer.qkv, activations.qkv)
        self._ops.append(
            cpu.rope(
                activations.qkv,
                activations.q,
                kv,
                cos,
                sin,
                num_heads=num_heads,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=model.spec.rms_norm_eps,
                rounds=model.rounds,
            )
        )
        attended = activations.attended
        self._ops.append(
            cpu.attention(
                activations.q, kv, attended.written, num_heads=num_heads, sliding_window=model.spec.sliding_window
            )
        )
        self._multiply_and_add(attended, layer.output)

    def _lm_head(self) -> None:
        ids = self._model.shard.vocab
        if ids:
            logits = Rows.of(self._group.sampling.logits[:, ids.start : ids.stop])
            head = self._model.weights.lm_head
            self._multiply(self._activations.sampling, head, logits, extent=Extent.EACH_SAMPLE)

    def _norm(self, weight: Float32Array, out: ProductInput, extent: Extent = Extent.EACH_TOKEN) -> None:
        """Ends the sum of the half before."""
        self._ops.append(
            cpu.add_norm(
                self._activations.residual,
                self._summands,
                weight,
                out.written,
                eps=self._model.spec.rms_norm_eps,
                sets_residual=self._sets_residual and bool(self._summands),
                rounds=self._model.rounds,
                extent=extent,
            )
        )
        self._sets_residual = False
        if out.integers is not None:
            self._ops.append(cpu.quantize(out.read, out.integers, extent))

    def _multiply_and_add(self, x: ProductInput, linear: Linear) -> None:
        """The end of a half."""
        if x.integers is not None:
            self._ops.append(cpu.quantize(x.read, x.integers))
        partial = self._next_partial()
        if partial is None:
            self._multiply(x, linear, self._activations.residual, Epilogue.ADD)
        else:
            self._multiply(x, linear, partial)

    def _multiply(
        self,
        x: ProductInput,
        linear: Linear,
        out: Rows,
        epilogue: Epilogue = Epilogue.STORE,
        extent: Extent = Extent.EACH_TOKEN,
    ) -> None:
        read = x.integers or x.read
        self._ops.append(cpu.gemm(read, linear.weight, out, bias=linear.bias, epilogue=epilogue, extent=extent))

    def _next_partial(self) -> Rows | None:
        """Where this rank's part of the next sum goes; None: it is alone, and has no parts."""
        self._summands = next(self._partials)
        return Rows.of(self._summands[self._model.shard.rank]) if self._summands else None
