"""Draws one token per sampling row, the ranks together. Three schemes, one outcome, to the bit:

merge (default)   Each rank edits its own part of the vocabulary and sends what it found there: a record, or a few, per
                  row, in one all-gather. Rows whose filters need the order of the whole vocabulary, and rows that want
                  logprobs, go to one rank each, by all-to-all; results come back with an all-gather.
batch-sharded     All rows go to one rank each.
gather            Logits are gathered, and every rank draws all rows.

A row's route follows from its parameters, which all ranks know: none ever waits for a collective that others leave out,
and nothing on the device has to be looked at to decide.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from albireo.arrays import Int64Array
from albireo_kernels.reference import to_device
from worker_svc.batch import InputBatch
from worker_svc.sharding import ModelShard
from worker_svc.torch_engine.collectives import Collectives
from worker_svc.torch_engine.sampling.draws import draw_from_records, draw_sorted, draw_whole, local_records
from worker_svc.torch_engine.sampling.edits import edit_rows, needy_rows
from worker_svc.torch_engine.sampling.exchange import collect_rows, owners_of, share_results
from worker_svc.torch_engine.sampling.logprobs import most_logprobs, rows_with_logprobs, token_logprobs
from worker_svc.torch_engine.sampling.routes import DrawParams, choose_routes, draw_params
from worker_svc.torch_engine.sampling.state import SlotState


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step sampled, on the device and identical on every rank.

    Attributes:
        tokens: [S] int64.
        logprobs: [rows that want them, 2 + 2 * N], see `sampling.logprobs`; None: no row does.
    """

    tokens: Tensor
    logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """A step's sampling rows, as every rank knows them before anything runs.

    Attributes:
        params: of all rows, on the device.
        with_logprobs: the rows that want logprobs.
        num_top: logprobs of so many of the likeliest tokens are worked out.
    """

    batch: InputBatch
    params: DrawParams
    with_logprobs: Int64Array
    num_top: int


class Sampler:
    """The sampler of one rank, with what it remembers of sequences."""

    def __init__(self, scheme: str, max_num_seqs: int, shard: ModelShard, device: torch.device) -> None:
        self._shard = shard
        self._device = device
        self._vocab = range(sum(shard.vocab_widths))
        self._scheme = scheme if shard.tp_size > 1 else "gather"
        self._state = SlotState(max_num_seqs, shard.vocab if self._scheme == "merge" else self._vocab, device)

    def sample(self, logits_shard: Tensor, batch: InputBatch, group: Collectives) -> Sampled:
        """Draws one token per sampling row.

        Args:
            logits_shard: [S, ids of the shard] float32, this rank's part of the vocabulary; consumed.
        Collective: all ranks call with the same batch. See the schemes.
        """
        sampling = batch.sampling
        self._state.expect(batch.histories)
        if not len(logits_shard):
            return Sampled(torch.zeros(0, dtype=torch.int64, device=self._device))
        penalised, with_words = needy_rows(sampling)
        self._state.begin(batch.sample_slots[penalised], batch.sample_slots[with_words])
        step = _Step(
            batch,
            draw_params(sampling, batch.output_positions, self._device),
            rows_with_logprobs(sampling),
            most_logprobs(sampling, len(self._vocab)),
        )
        if self._scheme == "merge":
            sampled = self._sample_merging(logits_shard, step, group)
        elif self._scheme == "batch-sharded":
            sampled = self._sample_shared_out(logits_shard, step, group)
        else:
            sampled = self._sample_whole(
                group.all_gather(logits_shard, self._shard.vocab_widths), step, _all_rows(batch)
            )
        self._remember(sampled.tokens, batch, penalised, with_words)
        return sampled

    def _sample_merging(self, logits: Tensor, step: _Step, group: Collectives) -> Sampled:
        """Scheme merge; logits [S, ids of the shard]."""
        batch, ids, rows = step.batch, self._shard.vocab, _all_rows(step.batch)
        unedited = logits[to_device(step.with_logprobs, self._device)]
        edit_rows(logits, ids, batch.sampling, rows, batch.sample_slots, self._state)
        routes = choose_routes(batch.sampling, rows, len(self._vocab))
        records = local_records(logits, ids.start, step.params, routes)
        if routes.num_records:
            records = group.all_gather(records, [routes.num_records] * group.size)
        tokens = draw_from_records(records.view(group.size, -1), step.params, routes)
        _put_scored(tokens, rows, batch)
        if not len(routes.sorted) and not len(step.with_logprobs):
            return Sampled(tokens)
        edited = logits[to_device(routes.sorted, self._device)]
        return self._finish_on_owners(tokens, routes.sorted, edited, unedited, step, group)

    def _finish_on_owners(
        self, tokens: Tensor, to_sort: Int64Array, edited: Tensor, unedited: Tensor, step: _Step, group: Collectives
    ) -> Sampled:
        """Has the rows ``to_sort`` drawn, and logprobs worked out, by one rank each.

        Args:
            tokens: [S], of all other rows; gets those of ``to_sort``.
            edited: [rows to sort, ids of the shard] logits.
            unedited: [rows with logprobs, ids of the shard] logits.
        """
        travelling = np.union1d(to_sort, step.with_logprobs)
        # A row with both parts has one owner, which so knows its token when it works out the logprobs.
        owner_of = np.zeros(len(tokens), dtype=np.int64)
        owner_of[travelling] = owners_of(len(travelling), group)
        owners = owner_of[np.concatenate((to_sort, step.with_logprobs))]
        whole = collect_rows(torch.cat((edited, unedited)), owners, self._shard.vocab_widths, group)
        own_to_sort, own_with_logprobs, own = (
            rows[owner_of[rows] == group.rank] for rows in (to_sort, step.with_logprobs, travelling)
        )
        drawn = to_device(own_to_sort, self._device)
        tokens[drawn] = draw_sorted(whole[: len(drawn)], step.params.take(drawn))
        of_logprobs = tokens[to_device(own_with_logprobs, self._device)]
        logprobs = token_logprobs(whole[len(drawn) :], of_logprobs, step.num_top)
        results = Sampled(tokens[to_device(own, self._device)], logprobs)
        shared = self._share(results, own, travelling, step, group)
        tokens[to_device(travelling, self._device)] = shared.tokens
        return Sampled(tokens, shared.logprobs)

    def _sample_shared_out(self, logits: Tensor, step: _Step, group: Collectives) -> Sampled:
        """Scheme batch-sharded; logits [S, ids of the shard]."""
        rows, owners = _all_rows(step.batch), owners_of(len(logits), group)
        own = rows[owners == group.rank]
        whole = collect_rows(logits, owners, self._shard.vocab_widths, group)
        return self._share(self._sample_whole(whole, step, own), own, rows, step, group)

    def _sample_whole(self, logits: Tensor, step: _Step, rows: Int64Array) -> Sampled:
        """Draws sampling rows ``rows`` [n] from the whole vocabulary's logits [n, vocab_size], on this rank alone."""
        batch, params = step.batch, step.params.take(to_device(rows, self._device))
        with_logprobs = self._places_with_logprobs(rows, step)
        unedited = logits[with_logprobs]
        edit_rows(logits, self._vocab, batch.sampling, rows, batch.sample_slots, self._state)
        tokens = draw_whole(logits, params, choose_routes(batch.sampling, rows, len(self._vocab)))
        _put_scored(tokens, rows, batch)
        if not len(step.with_logprobs):
            return Sampled(tokens)
        return Sampled(tokens, token_logprobs(unedited, tokens[with_logprobs], step.num_top))

    def _share(self, own: Sampled, own_rows: Int64Array, rows: Int64Array, step: _Step, group: Collectives) -> Sampled:
        """Joins what the owners of ``rows`` have sampled, of which ``own_rows`` are this rank's."""
        if own.logprobs is None or not len(step.with_logprobs):
            return Sampled(share_results(own.tokens[:, None], len(rows), group)[:, 0])
        of_own = own.tokens.new_zeros((len(own_rows), own.logprobs.shape[1]))
        of_own[self._places_with_logprobs(own_rows, step)] = own.logprobs
        shared = share_results(torch.cat((own.tokens[:, None], of_own), dim=1), len(rows), group)
        return Sampled(shared[:, 0], shared[self._places_with_logprobs(rows, step), 1:])

    def _places_with_logprobs(self, rows: Int64Array, step: _Step) -> Tensor:
        """Which of ``rows`` want them, as indices into that array."""
        return to_device(np.flatnonzero(np.isin(rows, step.with_logprobs)), self._device)

    def _remember(self, tokens: Tensor, batch: InputBatch, penalised: Int64Array, with_words: Int64Array) -> None:
        """Adds sampled tokens to the slots whose later draws depend on them."""
        if len(penalised):
            slots = to_device(batch.sample_slots[penalised], self._device)
            self._state.counts.add(slots, tokens[to_device(penalised, self._device)])
        if len(with_words):
            slots = to_device(batch.sample_slots[with_words], self._device)
            self._state.tails.add(slots, tokens[to_device(with_words, self._device)])


def _all_rows(batch: InputBatch) -> Int64Array:
    return np.arange(len(batch.sample_tokens))


def _put_scored(tokens: Tensor, rows: Int64Array, batch: InputBatch) -> None:
    """``tokens`` [n] of sampling rows ``rows`` [n]: those that score take what their prompts have."""
    num_drawn = len(batch.sample_slots)
    (places,) = np.nonzero(rows >= num_drawn)
    if len(places):
        scored = batch.scored_token_ids[rows[places] - num_drawn]
        tokens[to_device(places, tokens.device)] = to_device(scored, tokens.device)
