"""A model's safetensors files, whatever framework reads them: checked as a whole, then read slice by slice.

A rank reads only what it holds. Which slices those are (`layer_slices`) is the same for every engine.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from albireo.errors import ConfigError
from albireo.model_spec import ModelSpec
from worker_svc.engine import Progress
from worker_svc.sharding import ModelShard

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
Framework = Literal["pt", "np"]

_FILE_DTYPES = ("F32", "F16", "BF16")
# Tensors that checkpoints may hold and the model does not read: rope tables of old exports; the copy of tied weights.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
_MAX_ELEMENTS_AT_ONCE = 2**24  # bounds the copy that reading takes


class Checkpoint:
    """The tensors of a model. Its files stay open for as long as it lives.

    Args:
        framework: whose arrays `read` gives: torch's or numpy's (bfloat16 by way of ml_dtypes, imported by the caller).
    Raises:
        ConfigError: a file is missing or damaged, or a tensor is missing, superfluous, or of another shape or type than
            the model's configuration asks for. All tensors are checked before the first is read.
    """

    def __init__(self, spec: ModelSpec, framework: Framework, report: Progress) -> None:
        self._entries = _open_tensors(spec.path, tensor_shapes(spec), framework)
        self._report = report
        self._names_read: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Iterator[tuple[int, Any]]:
        """All of a tensor, or some rows and columns, in parts: how many rows came before, and the next ones."""
        entry = self._entries[name]
        rows = range(entry.shape[0]) if rows is None else rows
        columns = range(entry.shape[-1]) if columns is None else columns
        of_columns = (slice(columns.start, columns.stop),) if len(entry.shape) > 1 else ()
        size = max(1, _MAX_ELEMENTS_AT_ONCE // (len(columns) if of_columns else 1))
        for start in range(rows.start, rows.stop, size):
            of_rows = slice(start, min(start + size, rows.stop))
            try:
                part = entry.slices[of_rows, *of_columns]
            except SafetensorError as error:
                raise ConfigError(f"{entry.file}: tensor {name} cannot be read: {error}") from error
            yield start - rows.start, part
        self._names_read.add(name)
        self._report("reading weights", len(self._names_read) / len(self._entries))


@dataclass(frozen=True, slots=True)
class LinearSlices:
    """What a rank holds of a linear layer: rows (outputs) of several tensors, stacked, or columns (inputs) of one.

    Attributes:
        parts: names without their endings, and rows.
        columns: of every part.
        has_bias: each part's rows of it follow those of the weight.
    """

    parts: tuple[tuple[str, range], ...]
    columns: range
    has_bias: bool

    @property
    def num_outputs(self) -> int:
        return sum(len(rows) for _, rows in self.parts)


@dataclass(frozen=True, slots=True)
class LayerSlices:
    """What a rank holds of one decoder layer; ``prefix`` begins the names of its tensors."""

    prefix: str
    qkv: LinearSlices
    output: LinearSlices
    gate_up: LinearSlices
    down: LinearSlices


def layer_slices(spec: ModelSpec, shard: ModelShard, index: int) -> LayerSlices:
    """Queries, keys and values, and gate and up, are stacked. Where a layer's products are summed over the ranks, the
    first rank alone adds its bias."""
    prefix = f"model.layers.{index}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    hidden, is_first = range(spec.hidden_size), shard.rank == 0
    heads, kv_heads = _elements(shard.heads, spec.head_dim), _elements(shard.kv_heads, spec.head_dim)
    qkv = ((attention + "q_proj", heads), (attention + "k_proj", kv_heads), (attention + "v_proj", kv_heads))
    gate_up = ((mlp + "gate_proj", shard.intermediate), (mlp + "up_proj", shard.intermediate))
    return LayerSlices(
        prefix=prefix,
        qkv=LinearSlices(qkv, hidden, spec.qkv_bias),
        output=LinearSlices(((attention + "o_proj", hidden),), heads, spec.output_bias and is_first),
        gate_up=LinearSlices(gate_up, hidden, spec.mlp_bias),
        down=LinearSlices(((mlp + "down_proj", hidden),), shard.intermediate, spec.mlp_bias and is_first),
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
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not spec.tie_word_embeddings:
        shapes[LM_HEAD] = (spec.vocab_size, hidden)
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


def _elements(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in a file, not read yet."""

    file: Path
    slices: Any  # safetensors' PySafeSlice
    shape: tuple[int, ...]


def _open_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], framework: Framework) -> dict[str, _Entry]:
    """The entries of all tensors of a model."""
    entries = {}
    for file, names in _tensor_files(path).items():
        for name, slices in _open_file(file, names, framework):
            if name in shapes:
                entries[name] = _check(_Entry(file, slices, tuple(slices.get_shape())), name, shapes[name])
            elif name != LM_HEAD and not name.endswith(_IGNORED_SUFFIX):
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


def _open_file(file: Path, names: list[str] | None, framework: Framework) -> Iterator[tuple[str, Any]]:
    try:
        opened: Any = safe_open(file, framework=framework, device="cpu")
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
