"""What a request asks to be done to the model's logits, and of its log-probabilities: from fields to checked values.

Rules that are not refusals:

- Biases beyond -100 and 100 count as -100 and 100, as in other servers.
- Ids that are allowed twice are allowed; where every id is allowed, nothing is forbidden.
- A bad word that is given as text is forbidden as it stands and, where that makes as many tokens and another first one,
  with a space before it: at the beginning of a text and in its middle.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from albireo.arrays import EMPTY_INT32, Float32Array, Int32Array
from albireo.errors import InvalidRequest
from albireo.limits import MAX_LOGPROBS, MAX_WORD_TOKENS

MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 1024

# A text's token ids, without special tokens around them.
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class LogitFields:
    """Parameters as a client sent them; None is absent."""

    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitParams:
    """Every value resolved and within its limits.

    Attributes:
        bias_token_ids, biases: parallel; no id twice.
        allowed_token_ids: ascending; empty, like allowed_mask: all.
        allowed_mask: a bit per token of the vocabulary, the lowest first, where that is shorter than the ids.
        bad_words: token ids that never follow each other in the output.
        num_logprobs: of the likeliest tokens, beside the sampled one's; None: no logprobs at all.
        num_prompt_logprobs: the same beside each of the prompt's tokens.
    """

    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bias_token_ids: Int32Array
    biases: Float32Array
    allowed_token_ids: Int32Array
    allowed_mask: bytes
    bad_words: tuple[tuple[int, ...], ...]
    num_logprobs: int | None
    num_prompt_logprobs: int | None


def check_logit_params(
    fields: LogitFields, encode: Encode, vocab_size: int, min_p: float, repetition_penalty: float
) -> LogitParams:
    """``min_p`` and ``repetition_penalty`` where the fields are absent. Raises InvalidRequest."""
    bias_token_ids, biases = _biases(fields.logit_bias, vocab_size)
    allowed_token_ids, allowed_mask = _allowed(fields.allowed_token_ids, vocab_size)
    return LogitParams(
        min_p=check_min_p(min_p if fields.min_p is None else fields.min_p),
        repetition_penalty=check_repetition_penalty(
            repetition_penalty if fields.repetition_penalty is None else fields.repetition_penalty
        ),
        presence_penalty=_penalty("presence_penalty", fields.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", fields.frequency_penalty),
        bias_token_ids=bias_token_ids,
        biases=biases,
        allowed_token_ids=allowed_token_ids,
        allowed_mask=allowed_mask,
        bad_words=_bad_words(fields, encode, vocab_size),
        num_logprobs=_num_logprobs("logprobs", fields.logprobs),
        num_prompt_logprobs=_num_logprobs("prompt_logprobs", fields.prompt_logprobs),
    )


def _num_logprobs(name: str, value: int | None) -> int | None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequest(f"sampling_params.{name} is {value}; it must be 0 to {MAX_LOGPROBS}")
    return value


def check_min_p(value: float) -> float:
    if not 0 <= value <= 1:  # false for NaN, too
        raise InvalidRequest(f"sampling_params.min_p is {value:g}; it must be in [0, 1]")
    return value


def check_repetition_penalty(value: float) -> float:
    if not 0 < value < math.inf:
        raise InvalidRequest(f"sampling_params.repetition_penalty is {value:g}; it must be a finite number above 0")
    return value


def _penalty(name: str, value: float) -> float:
    if not -MAX_PENALTY <= value <= MAX_PENALTY:
        raise InvalidRequest(f"sampling_params.{name} is {value:g}; it must be in [{-MAX_PENALTY:g}, {MAX_PENALTY:g}]")
    return value


def _biases(biases: Mapping[int, float], vocab_size: int) -> tuple[Int32Array, Float32Array]:
    if len(biases) > MAX_BIASES:
        raise InvalidRequest(f"sampling_params.logit_bias has {len(biases)} entries; {MAX_BIASES} at most")
    for token_id, bias in biases.items():
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"sampling_params.logit_bias names token {token_id}; the vocabulary has ids 0 to {vocab_size - 1}"
            )
        if not math.isfinite(bias):
            raise InvalidRequest(f"sampling_params.logit_bias[{token_id}] is {bias:g}; it must be a finite number")
    ids = sorted(biases)
    values = np.array([biases[token_id] for token_id in ids], dtype=np.float32)
    return np.array(ids, dtype=np.int32), np.clip(values, -MAX_BIAS, MAX_BIAS)


def _allowed(ids: Sequence[int] | None, vocab_size: int) -> tuple[Int32Array, bytes]:
    """Ids or mask, whichever is shorter; neither where all are allowed."""
    if ids is None:
        return EMPTY_INT32, b""
    if not len(ids):
        raise InvalidRequest("sampling_params.allowed_token_ids is empty; at least one token must be allowed")
    given = np.fromiter(ids, dtype=np.int64, count=len(ids))
    wrong = np.flatnonzero((given < 0) | (given >= vocab_size))
    if len(wrong):
        raise InvalidRequest(
            f"sampling_params.allowed_token_ids[{wrong[0]}] is {given[wrong[0]]};"
            f" the vocabulary has ids 0 to {vocab_size - 1}"
        )
    is_allowed = np.zeros(vocab_size, dtype=np.bool_)
    is_allowed[given] = True
    if is_allowed.all():
        return EMPTY_INT32, b""
    allowed = np.flatnonzero(is_allowed).astype(np.int32)
    mask = np.packbits(is_allowed, bitorder="little")
    return (EMPTY_INT32, mask.tobytes()) if allowed.nbytes > mask.nbytes else (allowed, b"")


def _bad_words(fields: LogitFields, encode: Encode, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    num_words = len(fields.bad_words) + len(fields.bad_words_token_ids)
    if num_words > MAX_BAD_WORDS:
        name = "bad_words" if fields.bad_words else "bad_words_token_ids"
        raise InvalidRequest(
            f"sampling_params.{name}: there are {num_words} bad words, of text and of ids; {MAX_BAD_WORDS} at most"
        )
    words: dict[tuple[int, ...], None] = {}
    for i, text in enumerate(fields.bad_words):
        if len(text) > MAX_BAD_WORD_CHARS:
            raise InvalidRequest(
                f"sampling_params.bad_words[{i}] has {len(text)} characters; {MAX_BAD_WORD_CHARS} at most"
            )
        for word in bad_word_variants(text, encode):
            words[_bad_word(f"bad_words[{i}]", word, vocab_size)] = None
    for i, ids in enumerate(fields.bad_words_token_ids):
        words[_bad_word(f"bad_words_token_ids[{i}]", ids, vocab_size)] = None
    return tuple(words)


def bad_word_variants(text: str, encode: Encode) -> list[Sequence[int]]:
    """The token ids of a bad word, as it stands and perhaps with a space before it. Source: vLLM's
    ``SamplingParams.update_from_tokenizer``."""
    text = text.lstrip()
    bare, spaced = encode(text), encode(" " + text)
    is_other = len(bare) > 0 and len(spaced) == len(bare) and spaced[0] != bare[0]
    return [bare, spaced] if is_other else [bare]


def _bad_word(name: str, ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if not 1 <= len(ids) <= MAX_WORD_TOKENS:
        raise InvalidRequest(f"sampling_params.{name} has {len(ids)} tokens; it must have 1 to {MAX_WORD_TOKENS}")
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"sampling_params.{name} has token {token_id}; the vocabulary has ids 0 to {vocab_size - 1}"
            )
    return tuple(ids)
