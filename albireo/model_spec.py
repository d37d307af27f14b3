"""What a model directory says about its model, read without torch: `ModelSpec` from ``config.json``.

Families: Llama 2 and 3, Mistral, Qwen2 / Qwen2.5, Qwen3 (dense), in Hugging Face format.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from albireo.errors import ConfigError

DEMO_MODEL = Path(__file__).parent / "demo"
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding. ``factor`` stretches low frequencies (llama3, of Llama 3.1) or all (linear)."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder-only transformer. Sizes are counts of elements of the whole, unsharded model."""

    path: Path
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def name(self) -> str:
        return self.path.name

    def check_tp(self, tp_size: int) -> None:
        """Raises ConfigError when the model cannot be split over ``tp_size`` ranks."""
        for what, value in (("attention heads", self.num_heads), ("intermediate size", self.intermediate_size)):
            if value % tp_size:
                raise ConfigError(f"--tp {tp_size}: {value} {what} of {self.name} do not divide by it")
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            raise ConfigError(f"--tp {tp_size}: neither multiple nor divisor of {self.num_kv_heads} KV heads")


def resolve_model(model: str) -> Path:
    """The directory of ``demo``, of a local directory, or of a Hugging Face Hub id (downloaded when needed)."""
    if model == "demo":
        return DEMO_MODEL
    if model and Path(model).is_dir():
        return Path(model).resolve()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"model {model!r}: no such directory, not a Hub id (owner/name) and not 'demo'")
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model {model!r}: no such directory, and the Hub did not give it: {reason}") from error


def load_model_spec(path: Path) -> ModelSpec:
    """Reads ``config.json`` (and the end-of-sequence ids of ``generation_config.json``).

    Raises ConfigError for a missing file, an architecture or a feature that is not served.
    """
    config = _read_json(path / "config.json")
    generation = read_generation_config(path)
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in _ARCHITECTURES:
        raise ConfigError(f"{path}: architecture {architecture} is not served; served are {', '.join(_ARCHITECTURES)}")
    if config.get("quantization_config"):
        raise ConfigError(f"{path}: quantised checkpoints are not served")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{path}: hidden_act {config['hidden_act']} is not served; silu is")
    try:
        return _spec(path, architecture, config, generation)
    except KeyError as error:
        raise ConfigError(f"{path / 'config.json'}: {error.args[0]} is missing") from error


def read_generation_config(path: Path) -> dict[str, Any]:
    """``generation_config.json``, empty where there is none."""
    file = path / "generation_config.json"
    return _read_json(file) if file.exists() else {}


def _spec(path: Path, architecture: str, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelSpec:
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    attention_bias = bool(config.get("attention_bias", False))
    num_heads = int(config["num_attention_heads"])
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelSpec(
        path=path,
        architecture=architecture,
        model_type=config.get("model_type", ""),
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope=_rope(path, config),
        max_position_embeddings=int(config["max_position_embeddings"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=is_qwen2 or attention_bias,
        output_bias=attention_bias and not is_qwen2,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(path, architecture, config),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        bos_token_id=config.get("bos_token_id"),
    )


def _rope(path: Path, config: Mapping[str, Any]) -> RopeSpec:
    # transformers 5 writes rope_parameters; before it, rope_theta and rope_scaling.
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, "linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeSpec(
            theta,
            "llama3",
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
    raise ConfigError(f"{path}: rope type {kind} is not served; served are default, linear, llama3")


def _sliding_window(path: Path, architecture: str, config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    if architecture == "MistralForCausalLM":
        return None if window is None else int(window)
    if architecture.startswith("Qwen") and config.get("use_sliding_window") and window is not None:
        raise ConfigError(f"{path}: use_sliding_window of {architecture} is not served")
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return content


def shard_vocab(vocab_size: int, rank: int, tp_size: int) -> range:
    """The token ids whose embedding and logits ``rank`` holds.

    Shards end on tile edges: a tile is the largest power of two <= 1024 that gives at least 64 tiles, whatever
    ``tp_size`` is, so that sums over tiles do not depend on it. The last shards may be short or empty.
    """
    tile = 1
    while tile < 1024 and math.ceil(vocab_size / (2 * tile)) >= 64:
        tile *= 2
    width = math.ceil(math.ceil(vocab_size / tile) / tp_size) * tile
    return range(min(rank * width, vocab_size), min((rank + 1) * width, vocab_size))
