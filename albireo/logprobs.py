"""Log-probabilities of sampled tokens, on their way from the ranks to the front ends: arrays, and their wire form."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from albireo.arrays import (
    EMPTY_INT32,
    BoolArray,
    Float32Array,
    Int32Array,
    pack_float32,
    pack_int32,
    unpack_float32,
    unpack_int32,
)
from albireo.v1 import plan_pb2


class Logprobs(NamedTuple):
    """Of some of the tokens that they stand beside; L tokens have them.

    Attributes:
        indices: [L], which tokens, ascending.
        logprobs: [L], of the tokens, before any sampling parameter.
        ranks: [L]; 1: no token is likelier.
        num_top: [L], how many of the following two are each token's.
        top_token_ids, top_logprobs: [sum of num_top], of the likeliest tokens, in order.
    """

    indices: Int32Array
    logprobs: Float32Array
    ranks: Int32Array
    num_top: Int32Array
    top_token_ids: Int32Array
    top_logprobs: Float32Array

    def of_tokens(self, places: Int32Array) -> "Logprobs":
        """Of a selection of the tokens: token i is the new token ``places[i]``, or left out where that is negative.
        Those that stay keep their order."""
        moved = places[self.indices]
        stays: BoolArray = moved >= 0
        if stays.all():
            return self._replace(indices=moved)
        top_stays = np.repeat(stays, self.num_top)
        return Logprobs(
            moved[stays],
            self.logprobs[stays],
            self.ranks[stays],
            self.num_top[stays],
            self.top_token_ids[top_stays],
            self.top_logprobs[top_stays],
        )


def places_where(stays: BoolArray) -> Int32Array:
    """For `Logprobs.of_tokens`: where each token stands when those that do not stay are left out."""
    return np.where(stays, np.cumsum(stays) - 1, -1).astype(np.int32)


def join(parts: Sequence[Logprobs]) -> Logprobs:
    """One after the other; their indices ascend."""
    if len(parts) == 1:
        return parts[0]
    return Logprobs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def encode(logprobs: Logprobs) -> plan_pb2.Logprobs:
    return plan_pb2.Logprobs(
        indices=pack_int32(logprobs.indices),
        logprobs=pack_float32(logprobs.logprobs),
        ranks=pack_int32(logprobs.ranks),
        num_top=pack_int32(logprobs.num_top),
        top_token_ids=pack_int32(logprobs.top_token_ids),
        top_logprobs=pack_float32(logprobs.top_logprobs),
    )


def decode(message: plan_pb2.Logprobs, num_tokens: int) -> Logprobs:
    """Raises ValueError when the message is not of ``num_tokens`` tokens, or its arrays do not fit each other."""
    logprobs = Logprobs(
        unpack_int32(message.indices),
        unpack_float32(message.logprobs),
        unpack_int32(message.ranks),
        unpack_int32(message.num_top),
        unpack_int32(message.top_token_ids),
        unpack_float32(message.top_logprobs),
    )
    count, num_top = len(logprobs.indices), logprobs.num_top
    fits = (
        all(len(array) == count for array in logprobs[:4])
        and len(logprobs.top_token_ids) == len(logprobs.top_logprobs) == num_top.sum()
        and not (num_top < 0).any()
    )
    if not fits:
        raise ValueError("arrays of logprobs differ in length")
    if count and not (logprobs.indices[0] >= 0 and logprobs.indices[-1] < num_tokens):
        raise ValueError(f"logprobs of tokens that are not there: {num_tokens} are")
    if (np.diff(logprobs.indices) <= 0).any():
        raise ValueError("logprobs are not in order")
    return logprobs


def decode_whole(message: plan_pb2.Logprobs) -> Logprobs:
    """Logprobs of all tokens that they stand beside. Raises ValueError when the message does not hold any."""
    return decode(message, len(message.indices) // EMPTY_INT32.itemsize)
