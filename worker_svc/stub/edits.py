"""What sampling parameters do to the truth machine's choice, for one row.

Biases and penalties enter the digest: a wrong one, or a wrong count of tokens, changes the token. What must not be
sampled is passed over: the next id that may be takes its place.
"""

from collections.abc import Sequence

import numpy as np

from albireo.arrays import BoolArray, Float32Array, Int32Array, UInt64Array
from worker_svc.stub.hashing import GOLDEN, mix

_OF_OUTPUT, _OF_PROMPT = 1, 2


def bias_word(ids: Int32Array, biases: Float32Array) -> int:
    """Of the finite biases of these tokens, in any order; 0 without any."""
    is_finite = np.isfinite(biases)
    words = ids[is_finite].astype(np.uint64) * GOLDEN + biases[is_finite].view(np.uint32)
    return int(mix(words).sum(dtype=np.uint64))


def penalty_word(repetition: float, presence: float, frequency: float, prompt: Int32Array, output: Int32Array) -> int:
    """Of the penalties and the tokens that they look at, in any order; 0 without penalties."""
    if repetition == 1 and not presence and not frequency:
        return 0
    penalties = np.array([repetition, presence, frequency], dtype=np.float32).view(np.uint32)
    parts = [(np.arange(3, 6, dtype=np.uint64) << np.uint64(32)) + penalties, _token_words(output, _OF_OUTPUT)]
    if repetition != 1:
        parts.append(_token_words(prompt, _OF_PROMPT))
    words: UInt64Array = np.concatenate(parts)
    return int(mix(words).sum(dtype=np.uint64))


def _token_words(token_ids: Int32Array, of_what: int) -> UInt64Array:
    words: UInt64Array = token_ids.astype(np.uint64) * GOLDEN + np.uint64(of_what)
    return words


def forbid_bad_words(may_be: BoolArray, bad_words: Sequence[Int32Array], output: Int32Array) -> None:
    """Strikes from ``may_be`` [vocab_size] each token that would complete a bad word at the end of the output."""
    for word in bad_words:
        num_before = len(word) - 1
        if num_before <= len(output) and (output[len(output) - num_before :] == word[:-1]).all():
            may_be[word[-1]] = False


def next_allowed(token: int, may_be: BoolArray) -> int:
    """``token``, or the next one that may be; where none may, ``token``."""
    allowed = np.flatnonzero(may_be)
    if not len(allowed):
        return token
    return int(allowed[np.searchsorted(allowed, token) % len(allowed)])
