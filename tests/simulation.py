"""The planner and stub ranks in one process, with time in the test's hands: plans run and results arrive when told.

Everything is real but the transport: plans pass through the wire codec, every rank keeps its own batch state and
blocks, and a checker that knows nothing of the planner's insides watches which blocks and slots each plan touches.
"""

import random
from collections import Counter, deque
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from albireo import logprobs
from albireo.arrays import pack_float32, pack_int32
from albireo.logprobs import Logprobs, places_where
from albireo.plan import StepPlan, StepResult, decode_plan, decode_result, encode_plan, encode_result
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.planner.arrivals import abort_labelled, apply_message, end_all_of
from scheduler_svc.planner.commit import Ended, commit_step
from scheduler_svc.planner.policy import plan_step
from scheduler_svc.planner.rates import StepRates
from scheduler_svc.planner.sequence import EndReason
from scheduler_svc.planner.state import Limits, PlannerState, lose_group, regain_group
from worker_svc.batch import BatchState, InputBatch
from worker_svc.compute import PreparedStep, step_result
from worker_svc.engine import EngineConfig, StepOutput, StepTimes
from worker_svc.stub.engine import StubEngine
from worker_svc.stub.sampler import Sampler
from worker_svc.stub.truth import true_logprobs, true_tokens

EOS = 2


@dataclass
class Expected:
    """What a submitted sequence must bring."""

    tokens: np.ndarray
    ends_with_stop: bool
    submit: frontend_pb2.Submit
    logprobs: Logprobs | None = None  # of all tokens, where they are wanted
    prompt_logprobs: Logprobs | None = None  # of the prompt's tokens but the first, where they are wanted
    num_scored: int = 1  # of the prompt's tokens
    got: list[int] = field(default_factory=list)
    reason: EndReason | None = None
    gone: bool = False  # cancelled, truncated or aborted: a prefix is all that may have come

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.submit.token_ids) // 4

    @property
    def is_scored(self) -> bool:
        return self.prompt_logprobs is None or self.num_scored == self.num_prompt_tokens


class FenceChecker:
    """Watches plans and results: a block that a sequence will write must be its own, and not touched by a step that is
    still in flight; a block that it shares must have been computed whole by an earlier plan, for the same tokens."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables: dict[int, list[int]] = {}
        self._tokens: dict[int, list[int]] = {}  # by slot, those that came with the plan
        self._num_computed: dict[int, int] = {}
        self._content: dict[int, tuple[int, ...]] = {}  # by block: the tokens up to its end, where all are known
        self._row_slots: list[int] = []
        self._touched: deque[tuple[int, set[int]]] = deque()
        self.num_shared = 0

    def see_plan(self, plan: StepPlan) -> None:
        for slot in plan.finished_slots:
            self._tables.pop(int(slot), None)
        busy = set().union(*(blocks for _, blocks in self._touched)) if self._touched else set()
        for new in plan.new_sequences:
            assert new.slot not in self._tables, f"slot {new.slot} is taken while its sequence runs"
            self._tokens[new.slot] = new.token_ids.tolist()
            self._num_computed[new.slot] = new.num_computed_tokens
            num_shared = new.num_computed_tokens // self._block_size
            assert num_shared * self._block_size == new.num_computed_tokens, "part of a block is shared"
            blocks = new.block_table.tolist()
            self._share(new.slot, blocks[:num_shared])
            self._hand_out(new.slot, blocks[num_shared:], busy)
        for slot, block in zip(plan.append_slots.tolist(), plan.append_blocks.tolist(), strict=True):
            self._hand_out(slot, [block], busy)
        if plan.rows is not None:
            self._row_slots = plan.rows.slots.tolist()
        assert len(set(self._row_slots)) == len(self._row_slots), "a sequence has two rows in one step"
        self._touched.append((plan.step_id, {block for slot in self._row_slots for block in self._tables[slot]}))
        counts = [1] * len(self._row_slots) if plan.rows is None else plan.rows.num_scheduled_tokens.tolist()
        for slot, count in zip(self._row_slots, counts, strict=True):
            self._see_writes(slot, count)

    def see_result(self, step_id: int) -> None:
        assert self._touched.popleft()[0] == step_id

    def _share(self, slot: int, blocks: list[int]) -> None:
        for index, block in enumerate(blocks):
            tokens = tuple(self._tokens[slot][: (index + 1) * self._block_size])
            known = self._content.get(block)
            assert known is None or known == tokens, f"block {block} is shared with another history"
        self._tables.setdefault(slot, []).extend(blocks)
        self.num_shared += len(blocks)

    def _hand_out(self, slot: int, blocks: list[int], busy: set[int]) -> None:
        assert not busy & set(blocks), f"blocks {busy & set(blocks)} are reused before their fence"
        owned = {block for table in self._tables.values() for block in table}
        assert not owned & set(blocks), f"blocks {owned & set(blocks)} have two owners"
        assert len(set(blocks)) == len(blocks)
        for block in blocks:
            self._content.pop(block, None)
        self._tables.setdefault(slot, []).extend(blocks)

    def _see_writes(self, slot: int, count: int) -> None:
        start = self._num_computed[slot]
        stop = self._num_computed[slot] = start + count
        size = self._block_size
        written = set(self._tables[slot][start // size : -(-stop // size)])
        others = {block for other, table in self._tables.items() if other != slot for block in table}
        shared = {block for block in written & others if block not in self._content}
        assert not shared, f"blocks {shared} are written while others hold them"
        assert not any(block in self._content for block in written), "a block is written again"
        for index in range(start // size, min(stop, len(self._tokens[slot])) // size):
            self._content[self._tables[slot][index]] = tuple(self._tokens[slot][: (index + 1) * size])


def _moved(of_sequence: Logprobs, position: int, place: int) -> Logprobs:
    """Of one token of a sequence, which stands at ``place`` now."""
    places = np.full(len(of_sequence.indices), -1, dtype=np.int32)
    places[position] = place
    return of_sequence.of_tokens(places)


def pack_mask(ids: Container[int], vocab_size: int) -> bytes:
    """As front ends pack allowed tokens."""
    may_be = [token in ids for token in range(vocab_size)]
    return np.packbits(may_be, bitorder="little").tobytes()


def any_sampling(rng: random.Random, vocab_size: int) -> dict[str, object]:
    """Sampling parameters as the planner gets them, a few at a time. The last token is always left to sample."""

    def some(num: int) -> list[int]:
        return rng.sample(range(vocab_size - 1), num)

    biased, allowed = some(rng.choice([0, 0, 3])), [*some(vocab_size // 4), vocab_size - 1]
    return {
        "repetition_penalty": rng.choice([0.0, 1.0, 1.0, 1.25]),
        "presence_penalty": rng.choice([0.0, 0.0, -0.5]),
        "frequency_penalty": rng.choice([0.0, 0.0, 1.5]),
        "bias_token_ids": pack_int32(biased),
        "biases": pack_float32([rng.choice([-100.0, 0.5, 3.0]) for _ in biased]),
        **rng.choice(
            [{}, {}, {"allowed_token_ids": pack_int32(allowed)}, {"allowed_mask": pack_mask(allowed, vocab_size)}]
        ),
        "bad_words": [pack_int32(some(rng.choice([1, 2, 2, 3]))) for _ in range(rng.choice([0, 0, 200]))],
        "num_logprobs": rng.choice([None, None, 0, 3]),
    }


class Simulation:
    """A planner with a group of ``tp_size`` stub ranks."""

    def __init__(
        self,
        tp_size: int = 1,
        depth: int = 2,
        block_size: int = 4,
        num_blocks: int = 40,
        max_num_seqs: int = 4,
        max_model_len: int = 64,
        max_num_batched_tokens: int = 16,
        vocab_size: int = 53,
        caches_prefixes: bool = True,
    ) -> None:
        self.limits = Limits(
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            vocab_size=vocab_size,
            eos_token_ids=frozenset({EOS}),
            depth=depth,
            caches_prefixes=caches_prefixes,
        )
        self.epoch = 1
        self.rates = StepRates()
        self.state = self.make_state()
        self.engines = [StubEngine(self._engine_config(rank, tp_size)) for rank in range(tp_size)]
        for engine in self.engines:
            engine._vocab_size = vocab_size
            engine.allocate(num_blocks)
        self.batch_states = [
            BatchState(max_num_seqs, max_model_len, block_size, num_blocks, vocab_size, max_num_batched_tokens)
            for _ in range(tp_size)
        ]
        self.checker = self.make_checker()
        self.planned: deque[tuple[int, list[InputBatch]]] = deque()
        self.results: deque[StepResult] = deque()
        self.expected: dict[tuple[int, int], Expected] = {}
        self.num_arrivals = 0
        self.num_steps = self.num_rowless_plans = self.num_computed_tokens = self.num_scored_tokens = 0

    def make_state(self) -> PlannerState:
        return PlannerState.make(self.limits, self.epoch)

    def make_checker(self) -> FenceChecker:
        return FenceChecker(self.limits.block_size)

    @property
    def num_preemptions(self) -> int:
        return self.state.num_preemptions

    def _engine_config(self, rank: int, tp_size: int) -> EngineConfig:
        return EngineConfig(
            model_path=Path(),
            rank=rank,
            tp_size=tp_size,
            run_dir=Path(),
            device="cpu",
            dtype="auto",
            max_num_seqs=self.limits.max_num_seqs,
            max_model_len=self.limits.max_model_len,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            kv_cache_gib=0,
            block_size=self.limits.block_size,
        )

    # What front ends do.

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        frontend: int = 0,
        label: str = "",
        priority: int = 0,
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = False,
        tenant: str = "",
        num_prompt_logprobs: int | None = None,
        **sampling: object,
    ) -> tuple[int, int]:
        """Submits a sequence and works out its true output; returns its key."""
        key = (frontend, len(self.expected) + 1)
        message = frontend_pb2.Submit(
            sequence_id=key[1],
            request_id=label,
            token_ids=np.array(prompt, dtype="<i4").tobytes(),
            max_tokens=max_tokens,
            sampling=plan_pb2.Sampling(**{"top_p": 1.0, **sampling}),
            stop_token_ids=np.array(stop_token_ids, dtype="<i4").tobytes(),
            ignore_eos=ignore_eos,
            priority=priority,
            tenant=tenant,
            num_prompt_logprobs=num_prompt_logprobs,
        )
        self.send(frontend, submits=[message])
        ends = frozenset(stop_token_ids) | (frozenset() if ignore_eos else {EOS})
        suppressed = np.array(sorted(ends), dtype="<i4").tobytes()
        true_sampling = plan_pb2.Sampling(**{"top_p": 1.0, **sampling, "suppressed_token_ids": suppressed})
        room = min(max_tokens, self.limits.max_model_len - len(prompt))
        tokens = true_tokens(np.array(prompt, dtype=np.int32), true_sampling, ends, room, self.limits.vocab_size)
        stops = int(tokens[-1]) in ends and len(tokens) > true_sampling.min_tokens
        true = None
        if true_sampling.HasField("num_logprobs"):
            prompt_ids = np.array(prompt, dtype=np.int32)
            true = true_logprobs(prompt_ids, tokens, true_sampling.num_logprobs, self.limits.vocab_size)
        of_prompt = None
        if num_prompt_logprobs is not None:
            first, others = np.split(np.array(prompt, dtype=np.int32), [1])
            of_prompt = true_logprobs(first, others, num_prompt_logprobs, self.limits.vocab_size)
        self.expected[key] = Expected(tokens, stops, message, true, of_prompt)
        return key

    def send(self, frontend: int, **fields: object) -> None:
        message = frontend_pb2.FrontendMessage(**fields)
        arrived = apply_message(self.state, frontend, message, self.num_arrivals, now_ns=0, rates=self.rates)
        self.num_arrivals += len(message.submits)
        assert not arrived.refused
        for ended in arrived.ended:
            self._see_end(ended)

    def truncate(self, key: tuple[int, int], num_kept: int) -> None:
        """The front end has found a stop string."""
        self.send(key[0], truncates=[frontend_pb2.Truncate(sequence_id=key[1], num_kept=num_kept)])
        self.expected[key].gone = True

    def cancel(self, key: tuple[int, int]) -> None:
        self.send(key[0], cancels=[key[1]])
        self.expected[key].gone = True

    def abort(self, label: str) -> None:
        for sequence in abort_labelled(self.state, [frontend_pb2.Abort(request_id=label)]):
            self.expected[sequence.frontend, sequence.sequence_id].gone = True

    def lose_frontend(self, frontend: int) -> None:
        end_all_of(self.state, frontend)
        for (owner, _), expected in self.expected.items():
            expected.gone |= owner == frontend and expected.reason is None

    # What breaks.

    def lose_group(self) -> None:
        """The group forgets everything, and what is under way is lost; it comes back empty."""
        assert not lose_group(self.state), "given up on"
        self._restart_ranks()
        self.epoch += 1
        regain_group(self.state, self.limits, self.epoch)

    def lose_planner(self) -> None:
        """A new planner learns from the front ends what runs. Ends that were not told yet are told again."""
        self._restart_ranks()
        self.epoch += 1
        self.state = self.make_state()
        for (frontend, _), expected in self.expected.items():
            if expected.gone or expected.reason is not None:
                continue
            expected.submit.is_resumed = True
            expected.submit.output_token_ids = np.array(expected.got, dtype="<i4").tobytes()
            expected.submit.num_scored_tokens = expected.num_scored
            self.send(frontend, submits=[expected.submit])

    def lose_last_end(self) -> None:
        """The planner dies between a sequence's last token and saying that it was the last."""
        ended = [one for one in self.expected.values() if one.reason is not None]
        if ended:
            ended[-1].reason = None
        self.lose_planner()

    def _restart_ranks(self) -> None:
        self.planned.clear()
        self.results.clear()
        self.checker = self.make_checker()
        for engine in self.engines:
            engine._cache[:] = 0  # what a restarted rank holds
            engine._last_tokens[:] = 0
            engine._sampler = Sampler()

    # What time brings.

    def plan(self) -> bool:
        """Makes one plan, if one can be made, and lets every rank prepare it."""
        planned = plan_step(self.state)
        if planned is None:
            return False
        plan = decode_plan(encode_plan(planned.plan))
        self.checker.see_plan(plan)
        batches = [state.apply(plan) for state in self.batch_states]
        assert len(batches[0].sample_tokens) <= self.limits.max_num_seqs
        self.num_scored_tokens += len(batches[0].scored_token_ids)
        self.planned.append((plan.step_id, batches))
        self.num_steps += 1
        self.num_rowless_plans += plan.rows is None
        self.num_computed_tokens += planned.num_tokens
        assert len(self.state.in_flight) <= self.limits.depth
        return True

    def run_device(self) -> bool:
        """Runs the oldest plan that has not run on all ranks."""
        if not self.planned:
            return False
        step_id, batches = self.planned.popleft()
        digests = np.sum(
            [engine.forward(batch) for engine, batch in zip(self.engines, batches, strict=True)],
            axis=0,
            dtype=np.uint64,
        )
        outputs = []
        for engine, batch in zip(self.engines, batches, strict=True):
            tokens = engine.sample(batch, digests)
            output = StepOutput(tokens, StepTimes(0, 0, 0, 0), engine.logprobs(batch, digests, tokens))
            step = PreparedStep(self.epoch, step_id, batch, 0, 0)
            outputs.append(encode_result(step_result(step, output, plan_pb2.StepTimings())))
        assert len(set(outputs)) == 1
        self.results.append(decode_result(outputs[0]))
        return True

    def commit(self) -> bool:
        """Delivers the oldest result to the planner."""
        if not self.results:
            return False
        result = self.results.popleft()
        self.checker.see_result(result.step_id)
        committed = commit_step(self.state, result.step_id, result.token_ids, result.logprobs, result.prompt_logprobs)
        for sequence, first_position, scored in committed.scored:
            self._see_scored(self.expected[sequence.frontend, sequence.sequence_id], first_position, scored)
        columns = (committed.frontends.tolist(), committed.sequence_ids.tolist(), committed.token_ids.tolist())
        wanting = []
        for place, (frontend, sequence_id, token) in enumerate(zip(*columns, strict=True)):
            expected = self.expected[frontend, sequence_id]
            assert expected.reason is None, "a token after the end"
            assert not expected.gone, "a token for a sequence whose client is gone"
            assert expected.is_scored, "a token before the logprobs of the prompt"
            if expected.logprobs is not None:
                wanting.append(_moved(expected.logprobs, len(expected.got), place))
            expected.got.append(token)
            assert expected.got == expected.tokens[: len(expected.got)].tolist(), "a wrong token"
        got = logprobs.encode(committed.logprobs) if committed.logprobs is not None else None
        assert got == (logprobs.encode(logprobs.join(wanting)) if wanting else None), "wrong logprobs"
        for ended in committed.ended:
            self._see_end(ended)
        return True

    def _see_scored(self, expected: Expected, first_position: int, scored: Logprobs) -> None:
        assert not expected.gone, "prompt logprobs for a sequence whose client is gone"
        assert first_position == expected.num_scored, "prompt logprobs are missing, or come twice"
        expected.num_scored += len(scored.indices)
        positions = np.arange(1, expected.num_prompt_tokens)
        told = places_where((positions >= first_position) & (positions < expected.num_scored))
        assert logprobs.encode(scored) == logprobs.encode(expected.prompt_logprobs.of_tokens(told)), "wrong ones"

    def _see_end(self, ended: Ended) -> None:
        expected = self.expected[ended.sequence.frontend, ended.sequence.sequence_id]
        expected.reason = ended.reason
        assert expected.got == expected.tokens.tolist(), "ended too early"
        assert (ended.reason is EndReason.STOP) == expected.ends_with_stop

    def check_pool(self) -> None:
        pool, table = self.state.pool, self.state.table
        assert pool.num_free + pool.num_fenced + pool.num_held == pool.num_blocks
        held = Counter(block for owner in table.running for block in table.blocks_of(owner.slot))
        assert pool._ref_counts == [held[block] for block in range(pool.num_blocks)]
        assert pool._blocks.keys() == set(pool._hashes.values())

    def finish(self) -> None:
        """Runs to the end: everything ends, nothing leaks, in a bounded number of steps."""
        tokens = sum(len(one.tokens) + 64 for one in self.expected.values())
        for _ in range(40 * tokens + 100):
            if not (self.plan() or self.run_device() or self.commit()):
                break
        assert self.state.is_idle, "no progress"
        for expected in self.expected.values():
            assert expected.gone or expected.reason is not None
        self.check_pool()
        assert self.state.pool.num_free == self.state.pool.num_blocks, "leaked blocks"
        assert self.state.table.num_running == self.state.queue.num_waiting == 0
        assert self.state.queue.num_waiting_tokens == 0
        assert not self.state.draining
        assert not self.state.coming, "claims that nobody redeems"
        assert self.state.tenants.num_active == 0
        assert sorted(self.state.table.free_slots) == list(range(self.limits.max_num_seqs))
