"""One validator for both client APIs: fields as a client sent them -> `GenerationRequest`, or `InvalidRequest`.

Rules that are not refusals:

- An absent temperature, top_p, top_k, min_p or repetition_penalty is the model's (generation_config.json, as it stands
  there), else 1, 1, 0, 0, 1.
- A temperature below 1e-5 is greedy: dividing by it would overflow.
- top_k of the vocabulary's size or more is all, like 0.
- max_tokens beyond what the context leaves ends at the context, with finish reason "length"; absent, it is what
  is left. min_tokens never exceeds it.
- truncate_prompt_tokens beyond the prompt's length leaves it as it is; -1 leaves what the context takes.
- An absent seed is drawn here. Completion 0 of a request keeps the seed, the others have seeds derived from it.

More of them, for what changes logits, in `logit_params`.
"""

import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from albireo.arrays import Int32Array
from albireo.errors import InvalidRequest
from scheduler_svc.frontend.deadline import NO_DEADLINE
from scheduler_svc.frontend.logit_params import (
    Encode,
    LogitFields,
    LogitParams,
    check_logit_params,
    check_min_p,
    check_repetition_penalty,
)

MAX_COMPLETIONS = 128
MAX_TEMPERATURE = 100.0
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_REQUEST_ID_CHARS = 256
MAX_TENANT_CHARS = 128
MAX_LABELS = 10_000  # of one Abort
# Longer text cannot fit, whatever it says; it is refused before a tokeniser spends seconds on it.
MAX_CHARS_PER_CONTEXT_TOKEN = 64

_GREEDY_BELOW = 1e-5
_WHAT_FITS = -1  # as truncate_prompt_tokens
# They would break a log's lines, or hide what it says.
_CONTROL_CHARS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_UNPRINTABLE = re.compile("[^ -~]")  # or not ASCII
_UINT64 = (1 << 64) - 1


@dataclass(frozen=True)
class Limits:
    """What the worker group can take."""

    vocab_size: int
    max_model_len: int


@dataclass(frozen=True)
class SamplingDefaults:
    """Of absent fields."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SamplingFields(LogitFields):
    """Sampling parameters as a client sent them; None is absent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    truncate_prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class RequestFields:
    """A request as a client sent it."""

    request_id: str
    prompt: str | Sequence[int] | None
    prompt_field: str  # its name in the client's API
    sampling: SamplingFields
    wants_text: bool
    wants_stop_token: bool  # among the token ids, when one ended the sequence
    priority: int = 0
    tenant: str = ""  # the default one
    deadline: float = NO_DEADLINE  # by the monotonic clock


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """A request that can run: every value resolved and within its limits."""

    request_id: str
    tenant: str
    deadline: float
    priority: int
    token_ids: Int32Array
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    n: int
    logits: LogitParams
    wants_text: bool
    wants_stop_token: bool

    def seed_of(self, index: int) -> int:
        """Of the completion with this index."""
        return self.seed if index == 0 else _mix(self.seed, index)


def check_text(fields: RequestFields, limits: Limits) -> str | None:
    """The prompt's text, to be tokenised; None when the prompt is token ids."""
    if fields.prompt is None:
        raise InvalidRequest("the request has no prompt: give text or token ids")
    if not isinstance(fields.prompt, str):
        return None
    if not fields.prompt:
        raise InvalidRequest(f"{fields.prompt_field} is empty; a prompt has at least one token")
    longest = limits.max_model_len * MAX_CHARS_PER_CONTEXT_TOKEN
    if len(fields.prompt) > longest:
        raise InvalidRequest(
            f"{fields.prompt_field} has {len(fields.prompt)} characters;"
            f" the context of {limits.max_model_len} tokens takes {longest} at most"
        )
    return fields.prompt


def validate(
    fields: RequestFields, prompt_ids: Sequence[int], limits: Limits, defaults: SamplingDefaults, encode: Encode
) -> GenerationRequest:
    """The request that ``fields`` ask for; ``prompt_ids`` are the prompt's tokens, whoever made them, and ``encode``
    makes those of bad words."""
    sampling = fields.sampling
    token_ids = _prompt(fields.prompt_field, prompt_ids, sampling.truncate_prompt_tokens, limits)
    max_tokens, min_tokens = _lengths(sampling, limits.max_model_len - len(token_ids))
    _in_range("n", sampling.n, 1, MAX_COMPLETIONS)
    return GenerationRequest(
        request_id=_request_id(fields.request_id),
        tenant=_tenant(fields.tenant),
        deadline=fields.deadline,
        priority=fields.priority,
        token_ids=token_ids,
        temperature=_temperature(sampling.temperature, defaults),
        top_p=_top_p(sampling.top_p, defaults),
        top_k=_top_k(sampling.top_k, defaults, limits),
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed & _UINT64,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=_stop_strings(sampling.stop),
        stop_token_ids=_stop_token_ids(sampling.stop_token_ids, limits),
        ignore_eos=sampling.ignore_eos,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens,
        n=sampling.n,
        logits=check_logit_params(sampling, encode, limits.vocab_size, defaults.min_p, defaults.repetition_penalty),
        wants_text=fields.wants_text,
        wants_stop_token=fields.wants_stop_token,
    )


def check_labels(labels: Sequence[str]) -> list[str]:
    """Of an Abort; empty ones stand for nothing."""
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(f"request_ids has {len(labels)} labels; {MAX_LABELS} at most")
    for i, label in enumerate(labels):
        if len(label) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(f"request_ids[{i}] has {len(label)} characters; {MAX_REQUEST_ID_CHARS} at most")
    return [label for label in labels if label]


def check_defaults(defaults: SamplingDefaults) -> None:
    """Raises InvalidRequest where a default would be refused from a client."""
    _temperature(defaults.temperature, defaults)
    _top_p(defaults.top_p, defaults)
    check_min_p(defaults.min_p)
    check_repetition_penalty(defaults.repetition_penalty)


def _prompt(field: str, prompt_ids: Sequence[int], num_last: int | None, limits: Limits) -> Int32Array:
    """The last ``num_last`` tokens of a prompt; None: all; -1: what fits."""
    if not len(prompt_ids):
        raise InvalidRequest(f"{field} is empty; a prompt has at least one token")
    if num_last is not None and num_last < 1 and num_last != _WHAT_FITS:
        raise InvalidRequest(
            f"sampling_params.truncate_prompt_tokens is {num_last}; it must be 1 or more, or {_WHAT_FITS}: what fits"
        )
    num_tokens = len(prompt_ids)
    if num_last is not None:
        num_tokens = min(num_tokens, limits.max_model_len - 1 if num_last == _WHAT_FITS else num_last)
    first = len(prompt_ids) - num_tokens
    if num_tokens >= limits.max_model_len:
        raise InvalidRequest(
            f"{field} has {num_tokens} tokens; the context of {limits.max_model_len} tokens takes"
            f" {limits.max_model_len - 1} at most, so that one can be generated"
        )
    ids = np.fromiter(prompt_ids[first:], dtype=np.int64, count=num_tokens)
    wrong = np.flatnonzero((ids < 0) | (ids >= limits.vocab_size))
    if len(wrong):
        raise InvalidRequest(
            f"{field}[{first + wrong[0]}] is {ids[wrong[0]]}; the vocabulary has ids 0 to {limits.vocab_size - 1}"
        )
    return ids.astype(np.int32)


def _lengths(sampling: SamplingFields, num_left: int) -> tuple[int, int]:
    max_tokens = sampling.max_tokens
    if max_tokens is not None:
        if max_tokens < 1:
            raise InvalidRequest(f"sampling_params.max_tokens is {max_tokens}; it must be 1 or more")
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(
                f"sampling_params.min_tokens is {sampling.min_tokens}; it must not exceed max_tokens, {max_tokens}"
            )
    resolved = num_left if max_tokens is None else min(max_tokens, num_left)
    return resolved, min(sampling.min_tokens, resolved)


def _temperature(value: float | None, defaults: SamplingDefaults) -> float:
    value = defaults.temperature if value is None else value
    if not (math.isfinite(value) and 0 <= value <= MAX_TEMPERATURE):
        raise InvalidRequest(f"sampling_params.temperature is {value:g}; it must be in [0, {MAX_TEMPERATURE:g}]")
    return 0.0 if value < _GREEDY_BELOW else value


def _top_p(value: float | None, defaults: SamplingDefaults) -> float:
    value = defaults.top_p if value is None else value
    if not 0 < value <= 1:  # false for NaN, too
        raise InvalidRequest(f"sampling_params.top_p is {value:g}; it must be in (0, 1]")
    return value


def _top_k(value: int | None, defaults: SamplingDefaults, limits: Limits) -> int:
    value = defaults.top_k if value is None else value
    return 0 if value >= limits.vocab_size else value


def _stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"sampling_params.stop has {len(stops)} strings; {MAX_STOP_STRINGS} at most")
    for i, stop in enumerate(stops):
        if not stop:
            raise InvalidRequest(f"sampling_params.stop[{i}] is empty; a stop string has at least one character")
        if len(stop) > MAX_STOP_CHARS:
            raise InvalidRequest(f"sampling_params.stop[{i}] has {len(stop)} characters; {MAX_STOP_CHARS} at most")
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(ids: Sequence[int], limits: Limits) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"sampling_params.stop_token_ids has {len(ids)} ids; {MAX_STOP_TOKEN_IDS} at most")
    for i, token_id in enumerate(ids):
        _in_range(f"stop_token_ids[{i}]", token_id, 0, limits.vocab_size - 1)
    return tuple(sorted(set(ids)))


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"sampling_params.{name} is {value}; it must be {low} to {high}")


def _request_id(request_id: str) -> str:
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(f"request_id has {len(request_id)} characters; {MAX_REQUEST_ID_CHARS} at most")
    if control := _CONTROL_CHARS.search(request_id):
        raise InvalidRequest(f"request_id[{control.start()}] is {control[0]!r}; it must not have control characters")
    return request_id


def _tenant(tenant: str) -> str:
    if len(tenant) > MAX_TENANT_CHARS:
        raise InvalidRequest(f"x-tenant has {len(tenant)} characters; {MAX_TENANT_CHARS} at most")
    if unprintable := _UNPRINTABLE.search(tenant):
        raise InvalidRequest(
            f"x-tenant[{unprintable.start()}] is {unprintable[0]!r}; it must have printable ASCII characters only"
        )
    return tenant


def _mix(seed: int, index: int) -> int:
    """A seed that looks independent of ``seed``. Source: SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (seed + index * 0x9E3779B97F4A7C15) & _UINT64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _UINT64
    return x ^ (x >> 31)
