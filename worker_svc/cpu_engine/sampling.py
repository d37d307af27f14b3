"""A step's sampling parameters, as the kernels read them."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from albireo.arrays import Int32Array, Int64Array
from albireo_kernels.cpu import NUM_RECENT, Edits, Histories, Logprobs, Sampling, address
from albireo_kernels.noise import row_keys
from worker_svc.batch import History, InputBatch
from worker_svc.row_sampling import RowEdits, RowSampling

_NO_IDS = np.zeros(0, dtype=np.int32)
_NO_BIASES = np.zeros(0, dtype=np.float32)


class SamplingMaker:
    """Makes the steps' parameters. Those of a decode run, whose rows stay the same, are made once."""

    def __init__(self) -> None:
        self._made: tuple[RowSampling, Sampling] | None = None

    def of_step(self, batch: InputBatch) -> Sampling:
        if self._made is None or self._made[0] is not batch.sampling:
            self._made = batch.sampling, _of_rows(batch.sampling)
        sampling, of_rows = self._made
        return replace(
            of_rows,
            noise_keys=row_keys(sampling.seed, batch.output_positions) if of_rows.draws else of_rows.noise_keys,
            histories=_histories(batch.histories) if batch.histories else None,
            logprobs=Logprobs(np.ascontiguousarray(sampling.num_logprobs)) if sampling.wants_logprobs else None,
        )


def _of_rows(sampling: RowSampling) -> Sampling:
    """What is the same in each step that samples these rows."""
    num_samples = len(sampling.temperature)
    return Sampling(
        temperature=np.ascontiguousarray(sampling.temperature),
        top_p=np.ascontiguousarray(sampling.top_p),
        min_p=np.ascontiguousarray(sampling.min_p),
        top_k=np.ascontiguousarray(sampling.top_k),
        noise_keys=np.zeros(num_samples, dtype=np.uint64),
        edits=_edits(sampling, num_samples) if sampling.edits or sampling.has_penalties else None,
    )


def _edits(sampling: RowSampling, num_samples: int) -> Edits:
    of_row: list[RowEdits | None] = [None] * num_samples
    for edits in sampling.edits:
        of_row[edits.row] = edits
    words = [edits.bad_words if edits else () for edits in of_row]
    allowed = [edits.allowed if edits else None for edits in of_row]
    return Edits(
        bias_starts=_starts(len(edits.ids) if edits else 0 for edits in of_row),
        bias_ids=_joined([edits.ids for edits in sampling.edits]),
        biases=np.concatenate([_NO_BIASES, *(edits.biases for edits in sampling.edits)], dtype=np.float32),
        allowed=np.array([0 if bits is None else address(bits) for bits in allowed], dtype=np.uint64),
        word_starts=_starts(map(len, words)),
        word_token_starts=_starts(map(len, itertools.chain(*words))),
        word_tokens=_joined(list(itertools.chain(*words))),
        repetition_penalty=np.ascontiguousarray(sampling.repetition_penalty),
        presence_penalty=np.ascontiguousarray(sampling.presence_penalty),
        frequency_penalty=np.ascontiguousarray(sampling.frequency_penalty),
        has_history=sampling.is_penalised | np.array([bool(of_row) for of_row in words], dtype=np.bool_),
        keeps=tuple(bits for bits in allowed if bits is not None),
    )


def _histories(histories: Sequence[History]) -> Histories:
    counted = [_counts(history) for history in histories]
    return Histories(
        slots=np.array([history.slot for history in histories], dtype=np.int32),
        starts=_starts(len(ids) for ids, _ in counted),
        ids=_joined([ids for ids, _ in counted]),
        counts=_joined([counts for _, counts in counted]),
        recent=np.concatenate([_recent(history) for history in histories]),
        num_output=np.array([len(history.token_ids) - history.num_prompt_tokens for history in histories], np.int32),
    )


def _counts(history: History) -> tuple[Int32Array, Int32Array]:
    """The sequence's different tokens; of each, 2 * times in the output + whether it is in the prompt."""
    is_output = np.arange(len(history.token_ids)) >= history.num_prompt_tokens
    ids, places = np.unique(history.token_ids, return_inverse=True)
    num_output = np.bincount(places, weights=is_output, minlength=len(ids))
    is_prompt = np.bincount(places, weights=~is_output, minlength=len(ids)) > 0
    return ids.astype(np.int32), (2 * num_output + is_prompt).astype(np.int32)


def _recent(history: History) -> Int32Array:
    """[NUM_RECENT], the last output tokens, each at its index modulo that."""
    output = history.token_ids[history.num_prompt_tokens :]
    recent = np.zeros(NUM_RECENT, dtype=np.int32)
    indices = np.arange(max(0, len(output) - NUM_RECENT), len(output))
    recent[indices % NUM_RECENT] = output[indices]
    return recent


def _starts(lengths: Iterable[int]) -> Int64Array:
    """Where each of several lists begins when they are joined, and where the last one ends."""
    return np.fromiter(itertools.accumulate(lengths, initial=0), dtype=np.int64)


def _joined(arrays: Sequence[Int32Array]) -> Int32Array:
    return np.concatenate([_NO_IDS, *arrays], dtype=np.int32)
