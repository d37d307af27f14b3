"""The model as a front end knows it: its names, its tokeniser, its sampling defaults."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from tokenizers import Tokenizer

from albireo.errors import ConfigError, InvalidRequest
from albireo.model_spec import ModelSpec, load_model_spec, read_generation_config, resolve_model
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.text import Detokenizer
from scheduler_svc.frontend.validation import SamplingDefaults, check_defaults

log = structlog.get_logger()

# Values of generation_config.json that change nothing.
_NEUTRAL = {"typical_p": 1.0, "no_repeat_ngram_size": 0}
_SERVED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ServedModel:
    name: str  # what clients call it
    spec: ModelSpec
    tokenizer: Tokenizer
    detokenizer: Detokenizer
    defaults: SamplingDefaults
    stated_defaults: dict[str, float] = field(default_factory=dict)  # those that the model itself states


def load_served_model(config: FrontendConfig) -> ServedModel:
    """Reads what ``--model`` names. Raises ConfigError for what cannot be served."""
    path = resolve_model(config.model)
    spec = load_model_spec(path)
    tokenizer = _load_tokenizer(path / "tokenizer.json")
    stated = _stated_defaults(path)
    name = path.name if config.model == "demo" or Path(config.model).is_dir() else config.model
    return ServedModel(
        name=config.served_model_name or name,
        spec=spec,
        tokenizer=tokenizer,
        detokenizer=Detokenizer(tokenizer),
        defaults=_defaults(path, stated),
        stated_defaults=stated,
    )


def _load_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; models are served with a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{file}: not a tokenizer: {error}") from error
    # Settings of a training pipeline that some files carry; a prompt is never cut or filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _stated_defaults(path: Path) -> dict[str, float]:
    config = read_generation_config(path)
    for key, neutral in _NEUTRAL.items():
        if config.get(key, neutral) not in (None, neutral):
            log.warning("a default of the model is not served, requests run without it", key=key, value=config[key])
    stated = {key: config[key] for key in _SERVED if config.get(key) is not None}
    for key, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{path / 'generation_config.json'}: {key} is {value!r}, not a number")
    if "top_k" in stated:
        stated["top_k"] = max(0, int(stated["top_k"]))  # some files say -1 for all
    return stated


def _defaults(path: Path, stated: dict[str, float]) -> SamplingDefaults:
    defaults = SamplingDefaults(
        temperature=float(stated.get("temperature", 1.0)),
        top_p=float(stated.get("top_p", 1.0)),
        top_k=int(stated.get("top_k", 0)),
        min_p=float(stated.get("min_p", 0.0)),
        repetition_penalty=float(stated.get("repetition_penalty", 1.0)),
    )
    try:
        check_defaults(defaults)
    except InvalidRequest as error:
        raise ConfigError(f"{path / 'generation_config.json'}: {error}") from error
    return defaults
