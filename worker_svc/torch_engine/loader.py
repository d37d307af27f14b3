"""Reads one rank's weights from safetensors files: only the slices it holds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from albireo.errors import ConfigError
from albireo.model_spec import ModelSpec
from worker_svc.engine import Progress
from worker_svc.torch_engine.model import LayerWeights, Linear, ModelWeights
from worker_svc.torch_engine.sharding import ModelShard

_FILE_DTYPES = ("F32", "F16", "BF16")
# Tensors that checkpoints may hold and the model does not read: rope tables of old exports; the copy of tied weights.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
_LM_HEAD = "lm_head.weight"


def load_weights(
    spec: ModelSpec, shard: ModelShard, dtype: torch.dtype, device: torch.device, report: Progress
) -> ModelWeights:
    """Loads the weights of one rank.

    Raises:
        ConfigError: a file is missing or damaged, or a tensor is missing, superfluous, or of another shape or type than
            the model's configuration asks for. All tensors are checked before the first is read.
    """
    shapes = tensor_shapes(spec)
    reader = _Reader(_open_tensors(spec.path, shapes), dtype, device, report)
    embedding = reader.read("model.embed_tokens.weight", rows=shard.vocab)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_load_layer(reader, spec, shard, f"model.layers.{index}.") for index in range(spec.num_layers)),
        final_norm=reader.read("model.norm.weight"),
        lm_head=Linear(embedding if spec.tie_word_embeddings else reader.read(_LM_HEAD, rows=shard.vocab)),
    )


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the whole model, in Hugging Face's naming."""
    hidden, columns = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = (
        ("self_attn.q_proj", q_size, hidden, spec.qkv_bias),
        ("self_attn.k_proj", kv_size, hidden, spec.qkv_bias),
        ("self_attn.v_proj", kv_size, hidden, spec.qkv_bias),
        ("self_attn.o_proj", hidden, q_size, spec.output_bias),
        ("mlp.gate_proj", columns, hidden, spec.mlp_bias),
        ("mlp.up_proj", columns, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, columns, spec.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tie_word_embeddings:
        shapes[_LM_HEAD] = (spec.vocab_size, hidden)
    for index in range(spec.num_layers):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if spec.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (spec.head_dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (spec.head_dim,)
        for name, size, inputs, has_bias in linears:
            shapes[f"{layer}{name}.weight"] = (size, inputs)
            if has_bias:
                shapes[f"{layer}{name}.bias"] = (size,)
    return shapes


def _load_layer(reader: "_Reader", spec: ModelSpec, shard: ModelShard, layer: str) -> LayerWeights:
    heads, kv_heads = _rows_of(shard.heads, spec.head_dim), _rows_of(shard.kv_heads, spec.head_dim)
    attention, mlp = layer + "self_attn.", layer + "mlp."
    qkv = ((attention + "q_proj", heads), (attention + "k_proj", kv_heads), (attention + "v_proj", kv_heads))
    gate_up = ((mlp + "gate_proj", shard.intermediate), (mlp + "up_proj", shard.intermediate))
    return LayerWeights(
        attention_norm=reader.read(layer + "input_layernorm.weight"),
        qkv=reader.read_column_parallel(qkv, has_bias=spec.qkv_bias),
        q_norm=reader.read(attention + "q_norm.weight") if spec.qk_norm else None,
        k_norm=reader.read(attention + "k_norm.weight") if spec.qk_norm else None,
        output=reader.read_row_parallel(attention + "o_proj", heads, has_bias=spec.output_bias and shard.rank == 0),
        mlp_norm=reader.read(layer + "post_attention_layernorm.weight"),
        gate_up=reader.read_column_parallel(gate_up, has_bias=spec.mlp_bias),
        down=reader.read_row_parallel(
            mlp + "down_proj", shard.intermediate, has_bias=spec.mlp_bias and shard.rank == 0
        ),
    )


def _rows_of(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in a file, not read yet."""

    file: Path
    slices: Any  # safetensors' PySafeSlice
    shape: tuple[int, ...]


class _Reader:
    """Reads slices of a checkpoint's tensors into memory of their own, and reports how far it is."""

    def __init__(
        self, entries: Mapping[str, _Entry], dtype: torch.dtype, device: torch.device, report: Progress
    ) -> None:
        self._entries = entries
        self._dtype = dtype
        self._device = device
        self._report = report
        self._num_read = 0

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """All of a tensor, or some of its rows."""
        shape = self._entries[name].shape
        return self._read_stacked([(name, range(shape[0]) if rows is None else rows)])

    def read_column_parallel(self, parts: Sequence[tuple[str, range]], *, has_bias: bool) -> Linear:
        """Several layers' rows (outputs), stacked to one layer."""
        weight = self._read_stacked([(name + ".weight", rows) for name, rows in parts])
        bias = self._read_stacked([(name + ".bias", rows) for name, rows in parts]) if has_bias else None
        return Linear(weight, bias)

    def read_row_parallel(self, name: str, columns: range, *, has_bias: bool) -> Linear:
        """A layer's columns (inputs), with its whole bias where that is wanted."""
        entry = self._entries[name + ".weight"]
        weight = torch.empty((entry.shape[0], len(columns)), dtype=self._dtype, device=self._device)
        self._copy(weight, name + ".weight", (slice(None), slice(columns.start, columns.stop)))
        return Linear(weight, self.read(name + ".bias") if has_bias else None)

    def _read_stacked(self, parts: Sequence[tuple[str, range]]) -> Tensor:
        num_rows = sum(len(rows) for _, rows in parts)
        shape = (num_rows, *self._entries[parts[0][0]].shape[1:])
        stacked = torch.empty(shape, dtype=self._dtype, device=self._device)
        start = 0
        for name, rows in parts:
            self._copy(stacked[start : start + len(rows)], name, (slice(rows.start, rows.stop),))
            start += len(rows)
        return stacked

    def _copy(self, target: Tensor, name: str, where: tuple[slice, ...]) -> None:
        entry = self._entries[name]
        if target.numel():
            try:
                target.copy_(entry.slices[where])
            except SafetensorError as error:
                raise ConfigError(f"{entry.file}: tensor {name} cannot be read: {error}") from error
        self._num_read += 1
        self._report("reading weights", self._num_read / len(self._entries))


def _open_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Entry]:
    """The entries of all tensors of a model. Files stay open for as long as an entry lives."""
    entries = {}
    for file, names in _tensor_files(path).items():
        for name, slices in _open_file(file, names):
            if name in shapes:
                entries[name] = _check(_Entry(file, slices, tuple(slices.get_shape())), name, shapes[name])
            elif name != _LM_HEAD and not name.endswith(_IGNORED_SUFFIX):
                # Left out, it would make another model than the one that was trained.
                raise ConfigError(f"{file}: tensor {name} has no place in the model that config.json describes")
    for name in shapes:
        if name not in entries:
            raise ConfigError(f"{path}: tensor {name} is in none of the model's safetensors files")
    return entries


def _tensor_files(path: Path) -> dict[Path, list[str] | None]:
    """Safetensors files of a model, with the tensors that the index says are in each; None without an index."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise ConfigError(f"{path}: neither {single.name} nor {index.name} is there")
        return {single: None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ConfigError(
                    f"{index}: tensor {name} is in {file!r}, which is not a file of the model's directory"
                )
            names = files.setdefault(path / file, [])
            assert names is not None
            names.append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not an index of safetensors files: {error!r}") from error
    return files


def _open_file(file: Path, names: list[str] | None) -> Iterator[tuple[str, Any]]:
    try:
        opened: Any = safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be opened as safetensors: {error}") from error
    held = set(opened.keys())
    for name in held if names is None else names:
        if name not in held:
            raise ConfigError(f"{file}: tensor {name} is missing, though the index says that it is here")
        yield name, opened.get_slice(name)


def _check(entry: _Entry, name: str, shape: tuple[int, ...]) -> _Entry:
    if entry.shape != shape:
        raise ConfigError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}"
        )
    dtype = entry.slices.get_dtype()
    if dtype not in _FILE_DTYPES:
        raise ConfigError(f"{entry.file}: tensor {name} is of type {dtype}; served are {', '.join(_FILE_DTYPES)}")
    return entry
