"""The stub's sampler: from digests of histories to tokens and log-probabilities."""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import BoolArray, Int32Array, Int64Array, UInt64Array
from albireo.logprobs import Logprobs
from worker_svc.batch import InputBatch
from worker_svc.row_sampling import RowEdits, RowSampling
from worker_svc.stub import edits, truth


@dataclass(slots=True)
class _SlotTokens:
    prompt: Int32Array
    output: list[int]


class Sampler:
    """Keeps the histories of slots in which sampling depends on them, in the order of the steps."""

    def __init__(self) -> None:
        self._of_slot: dict[int, _SlotTokens] = {}

    def choose(self, batch: InputBatch, digests: UInt64Array, vocab_size: int) -> Int32Array:
        """[S] digests of whole histories -> [S] tokens."""
        for new in batch.histories:
            prompt, output = np.split(new.token_ids, [new.num_prompt_tokens])
            self._of_slot[new.slot] = _SlotTokens(prompt, output.tolist())
        sampling = batch.sampling
        counting = _rows_with_penalties(sampling)
        if sampling.edits or len(counting):
            digests = digests ^ self._words(batch, counting)
        tokens = truth.choose_tokens(digests, batch.output_positions, sampling.temperature, sampling.seed, vocab_size)
        for each in sampling.edits:
            may_be = self._allowed(each, int(batch.sample_slots[each.row]), vocab_size)
            tokens[each.row] = edits.next_allowed(int(tokens[each.row]), may_be)
        for row in {*counting.tolist(), *(each.row for each in sampling.edits if each.bad_words)}:
            self._of_slot[int(batch.sample_slots[row])].output.append(int(tokens[row]))
        return with_scored(tokens, batch)

    def _words(self, batch: InputBatch, counting: Int64Array) -> UInt64Array:
        """[S], what biases and penalties bring into the digests."""
        sampling = batch.sampling
        words = np.zeros(len(batch.sample_tokens), dtype=np.uint64)
        for each in sampling.edits:
            words[each.row] = edits.bias_word(each.ids, each.biases)
        for row in counting.tolist():
            tokens = self._of_slot[int(batch.sample_slots[row])]
            words[row] ^= np.uint64(
                edits.penalty_word(
                    float(sampling.repetition_penalty[row]),
                    float(sampling.presence_penalty[row]),
                    float(sampling.frequency_penalty[row]),
                    tokens.prompt,
                    np.array(tokens.output, dtype=np.int32),
                )
            )
        return words

    def _allowed(self, row: RowEdits, slot: int, vocab_size: int) -> BoolArray:
        may_be = np.ones(vocab_size, dtype=np.bool_)
        if row.allowed is not None:
            bits = np.unpackbits(row.allowed.view(np.uint8), count=vocab_size, bitorder="little")
            may_be = bits.astype(np.bool_)
        may_be[row.ids[row.biases == -np.inf]] = False
        if row.bad_words:
            edits.forbid_bad_words(may_be, row.bad_words, np.array(self._of_slot[slot].output, dtype=np.int32))
        return may_be


def with_scored(tokens: Int32Array, batch: InputBatch) -> Int32Array:
    """``tokens`` [S], where rows that score take what their prompts have."""
    if not len(batch.scored_token_ids):
        return tokens
    return np.concatenate((tokens[: len(batch.sample_slots)], batch.scored_token_ids))


def _rows_with_penalties(sampling: RowSampling) -> Int64Array:
    if not sampling.has_penalties:
        return np.zeros(0, dtype=np.int64)
    has = (sampling.repetition_penalty != 1) | (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0)
    return np.flatnonzero(has)


def step_logprobs(sampling: RowSampling, digests: UInt64Array, tokens: Int32Array, vocab_size: int) -> Logprobs | None:
    """Of the rows that want them; ``digests`` and ``tokens`` [S]."""
    if not sampling.wants_logprobs:
        return None
    rows = np.flatnonzero(sampling.num_logprobs >= 0)
    logprobs = truth.token_logprobs(digests[rows], tokens[rows], sampling.num_logprobs[rows], vocab_size)
    return logprobs._replace(indices=rows.astype(np.int32))
