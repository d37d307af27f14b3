"""How long a step would take on a given device and model: a roofline, as a lower bound that no real kernel beats.

    T3 = max(FLOPs / (t F), bytes / (t BW)) + 2 L allreduce + launch      forward, LM head included
    T4 = passes * logits bytes / (t BW) + gather + launch                 sampling, sharded over the t ranks

F is the device's peak, BW its memory's bandwidth, t the TP degree, L the number of layers. KV is replicated once there
are more ranks than KV heads. What comes out is *modelled*, and must be called so wherever it is shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from albireo.errors import ConfigError
from worker_svc.batch import InputBatch

# Assumptions of ours, not of any data sheet: what a captured program costs to start, and a small message between
# devices of one NVLink domain. Sampling writes noisy, scaled scores and reads them for the best one.
_LAUNCH_S = 20e-6
_COLLECTIVE_LATENCY_S = 6e-6
_SAMPLING_PASSES = 3
_LOGIT_BYTES = 4
_CANDIDATE_BYTES = 16  # a rank's best score and its token, per row


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks of one accelerator: FLOP/s of dense bfloat16, bytes/s of its memory, bytes/s of its links one way."""

    flops: float
    memory_bandwidth: float
    link_bandwidth: float


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        # NVIDIA H100 SXM data sheet: 989 TFLOP/s (half of "1,979 with sparsity"), 80 GB at 3.35 TB/s, NVLink 900 GB/s
        # both ways together.
        "h100": Device(989e12, 3.35e12, 450e9),
        # NVIDIA H200 SXM data sheet: the same chip, 141 GB at 4.8 TB/s.
        "h200": Device(989e12, 4.8e12, 450e9),
        # NVIDIA HGX B200 data sheet, an eighth of it: 2.25 PFLOP/s (half of that with sparsity), 8 TB/s, NVLink 5 with
        # 1.8 TB/s both ways together.
        "b200": Device(2250e12, 8e12, 900e9),
    }
)


@dataclass(frozen=True, slots=True)
class Model:
    """Dimensions of a dense decoder-only transformer with a gated MLP, as its config.json has them."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    dtype_bytes: int = 2

    @property
    def layer_params(self) -> int:
        """Weights of all layers that multiply each token: attention's four projections, the MLP's three."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_params(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all heads and layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes


# From the config.json of each model on the Hugging Face Hub.
MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "qwen2.5-7b": Model(28, 3584, 28, 4, 128, 18944, 152064),
        "qwen2.5-14b": Model(48, 5120, 40, 8, 128, 13824, 152064),
        "qwen2.5-32b": Model(64, 5120, 40, 8, 128, 27648, 152064),
        "llama-3.1-70b": Model(80, 8192, 64, 8, 128, 28672, 128256),
    }
)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's length depends on.

    Attributes:
        num_tokens: computed.
        num_samples: rows that sample.
        num_context_tokens: whose KV is read, summed over the rows.
        num_attended: pairs of a computed token and one that it attends to.
    """

    num_tokens: int
    num_samples: int
    num_context_tokens: int
    num_attended: int


def shape_of(batch: InputBatch) -> StepShape:
    """The shape of a step; a computed token attends to itself and all before it."""
    num_tokens, num_rows = len(batch.positions), len(batch.slots)
    num_context_tokens = int(batch.context_lens.sum(dtype=np.int64))
    num_attended = num_context_tokens if num_tokens == num_rows else int((batch.positions + 1).sum())
    return StepShape(num_tokens, len(batch.sample_tokens), num_context_tokens, num_attended)


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """A step's modelled parts; ``collective_s`` is a part of ``forward_s``."""

    forward_s: float
    sample_s: float = 0.0
    collective_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.forward_s + self.sample_s


def step_seconds(shape: StepShape, model: Model, device: Device, tp_size: int) -> StepSeconds:
    """How long a step takes on each of ``tp_size`` devices."""
    if not shape.num_tokens:
        return StepSeconds(_LAUNCH_S)
    head_params = model.head_params if shape.num_samples else 0
    flops = 2 * (shape.num_tokens * model.layer_params + shape.num_samples * head_params)
    flops += 4 * model.num_layers * model.num_heads * model.head_dim * shape.num_attended
    weight_bytes = (model.layer_params + head_params) * model.dtype_bytes
    kv_replicas = max(1.0, tp_size / model.num_kv_heads)
    kv_bytes = shape.num_context_tokens * model.kv_bytes_per_token * kv_replicas
    compute_s = flops / (tp_size * device.flops)
    memory_s = (weight_bytes + kv_bytes) / (tp_size * device.memory_bandwidth)
    message_bytes = shape.num_tokens * model.hidden_size * model.dtype_bytes
    collective_s = 2 * model.num_layers * all_reduce_seconds(message_bytes, device, tp_size)
    return StepSeconds(
        max(compute_s, memory_s) + collective_s + _LAUNCH_S,
        _sample_seconds(shape.num_samples, model, device, tp_size),
        collective_s,
    )


def all_reduce_seconds(num_bytes: float, device: Device, tp_size: int) -> float:
    """Of a ring: each rank sends and receives 2 (t - 1) / t of the message."""
    if tp_size == 1:
        return 0.0
    return _COLLECTIVE_LATENCY_S + 2 * (tp_size - 1) / tp_size * num_bytes / device.link_bandwidth


def _sample_seconds(num_samples: int, model: Model, device: Device, tp_size: int) -> float:
    if not num_samples:
        return 0.0
    logits_bytes = num_samples * model.vocab_size * _LOGIT_BYTES
    gather_s = 0.0
    if tp_size > 1:
        gather_s = _COLLECTIVE_LATENCY_S + (tp_size - 1) * num_samples * _CANDIDATE_BYTES / device.link_bandwidth
    return _SAMPLING_PASSES * logits_bytes / (tp_size * device.memory_bandwidth) + gather_s + _LAUNCH_S


@dataclass(frozen=True, slots=True)
class StepModel:
    """How long the stub's steps last: always the same time, or what a roofline says."""

    fixed_s: float = 0.0
    device: Device | None = None
    model: Model | None = None
    tp_size: int = 1

    def seconds(self, batch: InputBatch) -> StepSeconds:
        if self.device is None or self.model is None:
            return StepSeconds(self.fixed_s)
        return step_seconds(shape_of(batch), self.model, self.device, self.tp_size)


def make_step_model(step_ms: float, device: str, model: str, tp_size: int) -> StepModel | None:
    """None when steps take no modelled time. Raises ConfigError when the flags do not go together."""
    if (device == "none") != (model == "none"):
        raise ConfigError("--stub-device and --stub-model go together")
    if device != "none":
        if step_ms:
            raise ConfigError("--stub-step-ms: with --stub-device the step's shape says how long it lasts")
        return StepModel(device=DEVICES[device], model=MODELS[model], tp_size=tp_size)
    return StepModel(fixed_s=step_ms / 1e3) if step_ms else None
