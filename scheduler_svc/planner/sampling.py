"""A front end's sampling parameters, checked again: what a rank is told must not harm it."""

import math

import numpy as np

from albireo.arrays import BoolArray, Float32Array, Int32Array, pack_int32, unpack_float32, unpack_int32
from albireo.limits import MAX_LOGPROBS, MAX_WORD_TOKENS
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.planner.messages import Refused
from scheduler_svc.planner.state import Limits

_MAX_BAD_WORDS = 512  # as the front ends make them: up to two of each that a client gives
_MAX_BIASES = 1024
_MAX_PENALTY = 2.0


def checked_sampling(request: frontend_pb2.Submit, stop_token_ids: frozenset[int], limits: Limits) -> plan_pb2.Sampling:
    """The request's own message, with the ids that min_tokens forbids: those that would end the sequence. A plan with
    it is no longer than the vocabulary, whatever the front end says. Raises Refused."""
    sampling = request.sampling
    _in_range("temperature", sampling.temperature, 0, math.inf)
    if not 0 < sampling.top_p <= 1:
        raise Refused(f"top_p {sampling.top_p}; in (0, 1]")
    _in_range("min_p", sampling.min_p, 0, 1)
    _in_range("repetition_penalty", sampling.repetition_penalty, 0, math.inf)
    _in_range("presence_penalty", sampling.presence_penalty, -_MAX_PENALTY, _MAX_PENALTY)
    _in_range("frequency_penalty", sampling.frequency_penalty, -_MAX_PENALTY, _MAX_PENALTY)
    _in_range("num_logprobs", sampling.num_logprobs, 0, MAX_LOGPROBS)
    if sampling.bias_token_ids or sampling.biases:
        _check_biases(sampling, limits)
    if sampling.bad_words:
        _check_bad_words(sampling, limits)
    sampling.suppressed_token_ids = pack_int32(sorted(stop_token_ids)) if sampling.min_tokens else b""
    _check_that_some_are_left(sampling, _allowed(sampling, limits), limits)
    return sampling


def token_ids(name: str, packed: bytes, limits: Limits) -> Int32Array:
    """Raises Refused for what is no array of token ids."""
    try:
        ids = unpack_int32(packed)
    except ValueError as error:
        raise Refused(f"{name} are not packed int32: {error}") from error
    if len(ids) and int(ids.view(np.uint32).max()) >= limits.vocab_size:  # as are negative ones
        raise Refused(f"{name} has ids outside the vocabulary of {limits.vocab_size}")
    return ids


def _allowed(sampling: plan_pb2.Sampling, limits: Limits) -> BoolArray | None:
    """[vocab_size]; None: all tokens are allowed."""
    vocab_size = limits.vocab_size
    if sampling.allowed_mask:
        mask = np.frombuffer(sampling.allowed_mask, dtype=np.uint8)
        if sampling.allowed_token_ids or len(mask) != -(-vocab_size // 8):
            raise Refused(f"allowed_mask is a bit for each of {vocab_size} tokens, in place of allowed_token_ids")
        bits: BoolArray = np.unpackbits(mask, bitorder="little").view(np.bool_)
        if bits[vocab_size:].any():
            raise Refused(f"allowed_mask has bits outside the vocabulary of {vocab_size}")
        return bits[:vocab_size]
    if not sampling.allowed_token_ids:
        return None
    ids = token_ids("allowed_token_ids", sampling.allowed_token_ids, limits)
    _at_most("allowed_token_ids", len(ids), vocab_size)
    is_allowed = np.zeros(vocab_size, dtype=np.bool_)
    is_allowed[ids] = True
    return is_allowed


def _check_that_some_are_left(sampling: plan_pb2.Sampling, allowed: BoolArray | None, limits: Limits) -> None:
    """Of the tokens, whatever the output is: bad words of several tokens are not looked at. Consumes ``allowed``."""
    words = [word for word in map(unpack_int32, sampling.bad_words) if len(word) == 1]
    forbidden = np.concatenate([unpack_int32(sampling.suppressed_token_ids), *words])
    if allowed is None and len(forbidden) < limits.vocab_size:
        return
    is_left = np.ones(limits.vocab_size, dtype=np.bool_) if allowed is None else allowed
    is_left[forbidden] = False
    if not is_left.any():
        fields = {
            "allowed_token_ids": allowed is not None,
            "bad_words of one token": bool(words),
            "stop_token_ids below min_tokens": bool(sampling.suppressed_token_ids),
        }
        raise Refused(f"{' and '.join(name for name in fields if fields[name])} leave no token to sample")


def _check_biases(sampling: plan_pb2.Sampling, limits: Limits) -> None:
    ids = token_ids("bias_token_ids", sampling.bias_token_ids, limits)
    _at_most("bias_token_ids", len(ids), _MAX_BIASES)
    try:
        biases: Float32Array = unpack_float32(sampling.biases)
    except ValueError as error:
        raise Refused(f"biases are not packed float32: {error}") from error
    if len(ids) != len(biases) or len(np.unique(ids)) != len(ids) or not np.isfinite(biases).all():
        raise Refused("biases are one finite number for each token id")


def _check_bad_words(sampling: plan_pb2.Sampling, limits: Limits) -> None:
    _at_most("bad_words", len(sampling.bad_words), _MAX_BAD_WORDS)
    for word in sampling.bad_words:
        if not 1 <= len(token_ids("bad_words", word, limits)) <= MAX_WORD_TOKENS:
            raise Refused(f"bad_words have 1 to {MAX_WORD_TOKENS} tokens each")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise Refused(f"{name} {value}; a finite number, {low} to {high}")


def _at_most(name: str, num: int, most: int) -> None:
    if num > most:
        raise Refused(f"{name} has {num} entries; {most} at most")
