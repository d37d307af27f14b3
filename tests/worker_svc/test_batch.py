"""Batch state: what a rank computes in a step follows from the plans alone."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.errors import GroupError
from albireo.plan import NewSequence, Rows, StepPlan, decode_plan, decode_rows, encode_plan
from albireo.v1 import plan_pb2
from worker_svc.batch import BatchState, InputBatch
from worker_svc.row_sampling import SlotSampling

BLOCK_SIZE = 4


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def new_sequence(slot: int, tokens: int, blocks: list[int], num_prompt: int | None = None, **sampling: float):
    return NewSequence(
        slot=slot,
        token_ids=np.arange(100, 100 + tokens, dtype=np.int32),
        num_prompt_tokens=tokens if num_prompt is None else num_prompt,
        num_computed_tokens=0,
        block_table=ints(*blocks),
        sampling=plan_pb2.Sampling(**{"top_p": 1.0, **sampling}),
    )


def make_state() -> BatchState:
    return BatchState(
        max_num_seqs=3,
        max_model_len=16,
        block_size=BLOCK_SIZE,
        num_cache_blocks=10,
        vocab_size=200,
        max_num_batched_tokens=24,
    )


def test_a_prompt_in_chunks_then_decodes():
    """Chunks read known tokens, the last one samples, and decodes read the last sampled token on the device."""
    state = make_state()
    rows = Rows(ints(1), ints(4), np.array([False]))
    batch = state.apply(StepPlan(1, 0, rows, new_sequences=(new_sequence(1, 6, [7, 5]),)))
    assert batch.token_ids.tolist() == [100, 101, 102, 103]
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.slot_mapping.tolist() == [28, 29, 30, 31]
    assert len(batch.sample_tokens) == 0

    batch = state.apply(StepPlan(1, 1, Rows(ints(1), ints(2), np.array([True]))))
    assert batch.token_ids.tolist() == [104, 105]
    assert batch.slot_mapping.tolist() == [20, 21]
    assert batch.context_lens.tolist() == [6]
    assert batch.output_positions.tolist() == [0]

    batch = state.apply(StepPlan(1, 2, None))
    assert batch.from_last_token.tolist() == [True]
    assert batch.positions.tolist() == [6]
    assert batch.output_positions.tolist() == [1]


def test_block_appends_extend_the_table():
    state = make_state()
    state.apply(StepPlan(1, 0, decode_rows(ints(0)), new_sequences=(new_sequence(0, 1, [2]),)))
    for step in range(1, 4):
        state.apply(StepPlan(1, step, None))
    batch = state.apply(StepPlan(1, 4, None, append_slots=ints(0), append_blocks=ints(9)))
    assert batch.slot_mapping.tolist() == [9 * BLOCK_SIZE]
    assert batch.block_tables.tolist() == [[2, 9]]


@given(st.data())
@settings(max_examples=50)
def test_rows_that_repeat_are_those_that_are_told_again(data: st.DataObject):
    """A plan without rows, block appends or none, means the same as one that names the rows."""
    states = [BatchState(4, 120, BLOCK_SIZE, 200, 200, 200) for _ in range(2)]
    slots = np.array(data.draw(st.permutations([0, 1, 3])), dtype=np.int32)
    lens = data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=4))
    new = tuple(
        new_sequence(slot, length, list(range(slot * 40, slot * 40 + -(-length // BLOCK_SIZE))), min_tokens=length % 3)
        for slot, length in enumerate(lens)
    )
    rows = Rows(slots, ints(*(lens[slot] for slot in slots)), np.ones(3, dtype=np.bool_))
    for state in states:
        state.apply(StepPlan(1, 0, rows, new_sequences=new))
    for step in range(1, data.draw(st.integers(1, 100))):
        full = states[0].num_computed_tokens == states[0].num_blocks * BLOCK_SIZE
        full[2] = data.draw(st.integers(0, 20)) == 0 and states[0].num_blocks[2] < 30  # has no row
        appends = np.flatnonzero(full).astype(np.int32)
        blocks = (appends * 40 + states[0].num_blocks[appends]).astype(np.int32)
        batches = [
            state.apply(StepPlan(1, step, told, append_slots=appends, append_blocks=blocks))
            for state, told in zip(states, (None, decode_rows(slots)), strict=True)
        ]
        assert_same(*batches)


@pytest.mark.parametrize(("max_model_len", "num_blocks"), [(9, 3), (16, 2)])
def test_a_row_that_repeats_stops_at_the_end_of_its_blocks_and_of_the_model(max_model_len: int, num_blocks: int):
    state = BatchState(3, max_model_len, BLOCK_SIZE, 10, 200, 24)
    new = new_sequence(0, 5, list(range(num_blocks)))
    state.apply(StepPlan(1, 0, Rows(ints(0), ints(5), np.array([True])), new_sequences=(new,)))
    room = min(max_model_len, num_blocks * BLOCK_SIZE) - 5
    for step in range(1, room + 1):
        state.apply(StepPlan(1, step, None))
    with pytest.raises(GroupError, match="past its sequence's blocks"):
        state.apply(StepPlan(1, room + 1, None))


def test_mixed_rows_lie_one_after_the_other():
    state = make_state()
    first = new_sequence(0, 3, [1])
    state.apply(StepPlan(1, 0, Rows(ints(0), ints(3), np.array([True])), new_sequences=(first,)))
    rows = Rows(ints(0, 2), ints(1, 5), np.array([True, False]))
    batch = state.apply(StepPlan(1, 1, rows, new_sequences=(new_sequence(2, 8, [3, 4]),)))
    assert batch.query_starts.tolist() == [0, 1, 6]
    assert batch.positions.tolist() == [3, 0, 1, 2, 3, 4]
    assert batch.token_slots.tolist() == [0, 2, 2, 2, 2, 2]
    assert batch.from_last_token.tolist() == [True] + [False] * 5
    assert batch.sample_tokens.tolist() == [0]
    assert batch.sample_slots.tolist() == [0]


def test_a_resumed_sequence_keeps_its_output_position_and_its_min_tokens():
    """Prompt of 2, three tokens of output known: the next one is output position 3."""
    state = make_state()
    resumed = new_sequence(0, 5, [1, 2], num_prompt=2, min_tokens=4, suppressed_token_ids=ints(8).tobytes())
    batch = state.apply(StepPlan(1, 0, Rows(ints(0), ints(5), np.array([True])), new_sequences=(resumed,)))
    assert batch.output_positions.tolist() == [3]
    assert [(each.row, each.ids.tolist(), each.biases.tolist()) for each in batch.sampling.edits] == [
        (0, [8], [-np.inf])
    ]
    batch = state.apply(StepPlan(1, 1, None))
    assert batch.output_positions.tolist() == [4]
    assert batch.sampling.edits == ()


def test_sampling_parameters_are_copied_into_the_batch():
    """A slot may change hands while a prepared step still waits to run."""
    state = make_state()
    plan = StepPlan(1, 0, decode_rows(ints(0)), new_sequences=(new_sequence(0, 1, [1], temperature=0.5, seed=7),))
    batch = state.apply(plan)
    taken_over = new_sequence(0, 1, [2], temperature=2.0, seed=8)
    state.apply(StepPlan(1, 1, decode_rows(ints(0)), finished_slots=ints(0), new_sequences=(taken_over,)))
    assert batch.sampling.temperature.tolist() == [0.5]
    assert batch.sampling.seed.tolist() == [7]


def test_edits_and_penalties_reach_the_rows_that_have_them():
    """A bad word of one token is a bias; allowed ids are bits; where sampling looks at tokens, they come along once."""
    state = make_state()
    sampling = {
        "bias_token_ids": ints(7).tobytes(),
        "biases": np.array([1.5], dtype=np.float32).tobytes(),
        "bad_words": [ints(9).tobytes(), ints(3, 4).tobytes()],
        "allowed_token_ids": ints(0, 33).tobytes(),
        "num_logprobs": 2,
    }
    new = (new_sequence(0, 3, [1]), new_sequence(2, 4, [2], num_prompt=3, **sampling))
    rows = Rows(ints(0, 2), ints(3, 4), np.array([True, True]))
    batch = state.apply(StepPlan(1, 0, rows, new_sequences=new))
    ((slot, tokens, num_prompt),) = ((one.slot, one.token_ids, one.num_prompt_tokens) for one in batch.histories)
    assert (slot, tokens.tolist(), num_prompt) == (2, [100, 101, 102, 103], 3)
    (edits,) = batch.sampling.edits
    assert (edits.row, edits.ids.tolist(), edits.biases.tolist()) == (1, [7, 9], [1.5, -np.inf])
    assert [word.tolist() for word in edits.bad_words] == [[3, 4]]
    assert edits.allowed is not None
    assert edits.allowed[:2].tolist() == [1, 2]
    assert batch.sampling.num_logprobs.tolist() == [-1, 2]
    assert (batch.sampling.wants_logprobs, batch.sampling.has_penalties) == (True, False)
    again = state.apply(StepPlan(1, 1, None, append_slots=ints(2), append_blocks=ints(3)))
    assert again.histories == ()
    assert [each.row for each in again.sampling.edits] == [1]


def test_a_mask_of_allowed_tokens_is_the_same_as_their_ids():
    """The vocabulary of 200 does not end with a word of bits."""
    allowed = [0, 33, 64, 199]
    mask = np.zeros(200, dtype=np.bool_)
    mask[allowed] = True
    packed_mask = np.packbits(mask, bitorder="little").tobytes()
    state = make_state()
    told = ({"allowed_token_ids": ints(*allowed).tobytes()}, {"allowed_mask": packed_mask})
    new = tuple(new_sequence(slot, 1, [slot + 1], **each) for slot, each in enumerate(told))
    one, other = state.apply(StepPlan(1, 0, decode_rows(ints(0, 1)), new_sequences=new)).sampling.edits
    assert one.allowed is not None
    assert other.allowed is not None
    assert one.allowed.tolist() == other.allowed.tolist()


@pytest.mark.parametrize("mask", [b"\1" * 24, b"\1" * 26, b"\1" * 24 + b"\x20"])
def test_a_mask_of_another_vocabulary_is_an_error(mask: bytes):
    """One byte too few, one too many, one bit too many."""
    sampling = SlotSampling(1, 197)
    sampling.set(0, plan_pb2.Sampling(allowed_mask=b"\1" * 24 + b"\x10"))
    with pytest.raises(GroupError, match="not of 197 bits"):
        sampling.set(0, plan_pb2.Sampling(allowed_mask=mask))


def test_penalties_come_with_the_tokens_that_they_count():
    state = make_state()
    new = new_sequence(1, 2, [1], frequency_penalty=0.5)
    batch = state.apply(StepPlan(1, 0, Rows(ints(1), ints(2), np.array([True])), new_sequences=(new,)))
    assert [each.slot for each in batch.histories] == [1]
    assert batch.sampling.has_penalties
    assert (batch.sampling.repetition_penalty.tolist(), batch.sampling.frequency_penalty.tolist()) == ([1], [0.5])


def test_a_gap_in_the_stream_is_an_error():
    state = make_state()
    state.apply(StepPlan(1, 5, decode_rows(ints())))
    with pytest.raises(GroupError, match="step 7 where step 6"):
        state.apply(StepPlan(1, 7, decode_rows(ints())))


def test_a_new_epoch_begins_anew_and_an_old_one_is_refused():
    state = make_state()
    state.apply(StepPlan(2, 5, decode_rows(ints(0)), new_sequences=(new_sequence(0, 1, [1]),)))
    state.apply(StepPlan(3, 0, decode_rows(ints())))
    with pytest.raises(GroupError, match="epoch 2 after epoch 3"):
        state.apply(StepPlan(2, 6, None))
    with pytest.raises(GroupError, match="past its sequence's blocks"):
        state.apply(StepPlan(3, 1, decode_rows(ints(0))))


def scoring_state(num_prompt_logprobs: int | None, num_tokens: int = 6, num_prompt: int = 6) -> BatchState:
    """One that has a sequence in slot 1, of which a token is computed."""
    new = new_sequence(1, num_tokens, [5, 6], num_prompt)
    new = new._replace(num_computed_tokens=1, num_prompt_logprobs=num_prompt_logprobs)
    state = make_state()
    state.apply(StepPlan(1, 0, Rows(ints(), ints(), np.zeros(0, dtype=np.bool_)), new_sequences=(new,)))
    return state


def scoring(*counts_by_slot: tuple[int, int, bool, bool]) -> Rows:
    """Rows of (slot, tokens, whether it samples, whether it scores)."""
    slots, counts, samples, scores = zip(*counts_by_slot, strict=True)
    return Rows(ints(*slots), ints(*counts), np.array(samples), np.array(scores))


def test_a_row_that_scores_has_a_sampling_row_for_each_token_that_follows():
    """They come after all that draw a token, and have no slot."""
    state = scoring_state(7)
    beside = new_sequence(0, 3, [1])
    batch = state.apply(StepPlan(1, 1, scoring((0, 3, True, False), (1, 2, False, True)), new_sequences=(beside,)))
    assert batch.sample_tokens.tolist() == [2, 3, 4]
    assert batch.sample_slots.tolist() == [0]
    assert batch.scored_token_ids.tolist() == state.known_tokens[1, 2:4].tolist()
    assert batch.sampling.num_logprobs.tolist() == [-1, 7, 7]
    assert batch.output_positions.tolist() == [0, 0, 0]


def test_the_last_token_of_a_prompt_is_followed_by_the_output():
    state = scoring_state(0)
    batch = state.apply(StepPlan(1, 1, scoring((1, 2, False, True))))
    batch = state.apply(StepPlan(1, 2, scoring((1, 3, True, True))))
    assert batch.positions[batch.sample_tokens].tolist() == [5, 3, 4]
    assert batch.scored_token_ids.tolist() == state.known_tokens[1, 4:6].tolist()
    batch = state.apply(StepPlan(1, 3, None))
    assert (batch.sample_slots.tolist(), len(batch.scored_token_ids)) == ([1], 0)


def test_what_a_sequence_has_put_out_is_not_scored():
    state = scoring_state(0, num_tokens=6, num_prompt=3)
    batch = state.apply(StepPlan(1, 1, scoring((1, 5, True, True))))
    assert batch.scored_token_ids.tolist() == state.known_tokens[1, 2:3].tolist()


@pytest.mark.parametrize(
    ("num_prompt_logprobs", "count", "reason"),
    [
        (None, 2, "a row scores where its sequence wants no prompt logprobs"),
        (3, 4, "4 tokens scored, 0 sampled; 3 at most"),
        (21, 1, "21 prompt logprobs; 20 at most"),
    ],
)
def test_a_row_that_must_not_score_is_an_error(num_prompt_logprobs: int | None, count: int, reason: str):
    with pytest.raises(GroupError, match=reason):
        scoring_state(num_prompt_logprobs).apply(StepPlan(1, 1, scoring((1, count, False, True))))


def test_what_does_not_fit_is_an_error():
    state = make_state()
    with pytest.raises(GroupError, match="do not fit"):
        state.apply(StepPlan(1, 0, decode_rows(ints(0)), new_sequences=(new_sequence(0, 17, [1, 2, 3, 4, 5]),)))


VALID = StepPlan(1, 0, Rows(ints(0), ints(5), np.array([True])), new_sequences=(new_sequence(0, 5, [1, 2]),))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (StepPlan(1, 1, None, finished_slots=ints(3)), "finished slot"),
        (StepPlan(1, 1, None, new_sequences=(new_sequence(3, 1, [1]),)), "slot 3 of 3"),
        (StepPlan(1, 1, None, new_sequences=(new_sequence(1, 1, [10]),)), "block 10"),
        (StepPlan(1, 1, None, new_sequences=(new_sequence(1, 1, [-1]),)), "block -1"),
        (StepPlan(1, 1, None, new_sequences=(new_sequence(1, 0, [1]),)), "do not fit"),
        (StepPlan(1, 1, None, new_sequences=(new_sequence(1, 2, [1], num_prompt=3),)), "3 of the prompt"),
        (StepPlan(1, 1, None, append_slots=ints(0), append_blocks=ints(10)), "block 10"),
        (StepPlan(1, 1, None, append_slots=ints(-1), append_blocks=ints(3)), "append slot -1"),
        (StepPlan(1, 1, None, append_slots=ints(1), append_blocks=ints(3)), "without a sequence"),
        (StepPlan(1, 1, None, append_slots=ints(0, 0), append_blocks=ints(3, 4)), "named twice"),
        (StepPlan(1, 1, decode_rows(ints(-1))), "row slot -1"),
        (StepPlan(1, 1, decode_rows(ints(0, 0))), "named twice"),
        (StepPlan(1, 1, decode_rows(ints(1))), "past its sequence's blocks"),
        (StepPlan(1, 1, Rows(ints(0), ints(0), np.array([True]))), "scheduled tokens 0"),
        (StepPlan(1, 1, Rows(ints(0), ints(2**31 - 1), np.array([True]))), "scheduled tokens"),
        (StepPlan(1, 1, Rows(ints(0, 1), ints(16, 16), np.array([True, True]))), "more than 24 tokens"),
        (StepPlan(1, 1, Rows(ints(0), ints(4), np.array([True]))), "past its sequence's blocks"),
    ],
)
def test_what_is_out_of_range_is_an_error_and_a_new_epoch_heals_it(plan: StepPlan, reason: str):
    state, fresh = make_state(), make_state()
    state.apply(VALID)
    with pytest.raises(GroupError, match=reason):
        state.apply(plan)
    again = StepPlan(2, 9, VALID.rows, new_sequences=VALID.new_sequences)
    assert_same(state.apply(again), fresh.apply(again))


def assert_same(first: InputBatch, second: InputBatch) -> None:
    apart = ("block_tables", "sampling", "histories")
    for name in [field.name for field in dataclasses.fields(first) if field.name not in apart]:
        assert getattr(first, name).tolist() == getattr(second, name).tolist(), name
    for row, context_len in enumerate(first.context_lens):
        num_blocks = -(-context_len // BLOCK_SIZE)
        assert first.block_tables[row, :num_blocks].tolist() == second.block_tables[row, :num_blocks].tolist()
    for field in dataclasses.fields(first.sampling):
        one, other = getattr(first.sampling, field.name), getattr(second.sampling, field.name)
        if isinstance(one, np.ndarray):
            assert one.tolist() == other.tolist()
        elif field.name == "edits":
            assert [(each.row, each.ids.tolist()) for each in one] == [(each.row, each.ids.tolist()) for each in other]
        else:
            assert one == other
    assert [each.slot for each in first.histories] == [each.slot for each in second.histories]


small = st.integers(-2, 18)
integers = st.one_of(small, st.integers(-(2**31), 2**31 - 1))
arrays = st.lists(integers, max_size=4).map(lambda values: ints(*values))
packed = st.one_of(st.just(b""), arrays.map(np.ndarray.tobytes), st.binary(max_size=9))
unsigned = st.one_of(st.integers(0, 18), st.integers(0, 2**32 - 1))


@st.composite
def plans(draw: st.DrawFn, step_id: int) -> StepPlan:
    """Anything that the wire can hold, and much that is nearly right."""
    rows = None
    if draw(st.booleans()):
        slots = draw(arrays)
        counts = draw(st.lists(integers, min_size=len(slots), max_size=len(slots)))
        samples = draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        rows = Rows(slots, ints(*counts), np.array(samples, dtype=np.bool_))
    sampling = plan_pb2.Sampling(
        top_k=draw(unsigned),
        min_tokens=draw(unsigned),
        suppressed_token_ids=draw(st.binary(max_size=9)),
        bias_token_ids=draw(packed),
        biases=draw(packed),
        allowed_token_ids=draw(packed),
        allowed_mask=draw(st.one_of(st.just(b""), st.binary(min_size=24, max_size=26))),
        bad_words=draw(st.lists(packed, max_size=2)),
    )
    new = [
        NewSequence(draw(unsigned), draw(arrays), draw(unsigned), draw(unsigned), draw(arrays), sampling)
        for _ in range(draw(st.integers(0, 2)))
    ]
    append = draw(arrays)
    blocks = ints(*draw(st.lists(integers, min_size=len(append), max_size=len(append))))
    epoch = draw(st.sampled_from([1, 1, 1, 1, 2, 2**64 - 1]))
    return StepPlan(
        epoch,
        draw(st.sampled_from([step_id, step_id, step_id, 0, 2**64 - 1])),
        rows,
        draw(arrays),
        tuple(new),
        append,
        blocks,
    )


@given(st.data())
@settings(max_examples=400)
def test_no_plan_does_more_harm_than_a_group_error(data: st.DataObject):
    """What is applied stays within the cache, the tables and the vocabulary."""
    state = make_state()
    state.apply(VALID)
    for step_id in range(1, 4):
        plan = data.draw(plans(step_id))
        try:
            batch = state.apply(decode_plan(encode_plan(plan)))
        except GroupError:
            return
        assert ((batch.slot_mapping >= 0) & (batch.slot_mapping < 10 * BLOCK_SIZE)).all()
        assert ((batch.positions >= 0) & (batch.positions < 16)).all()
        assert ((batch.token_ids >= 0) & (batch.token_ids < 200)).all()
        assert ((batch.slots >= 0) & (batch.slots < 3)).all()
        assert (np.diff(batch.query_starts) > 0).all()
        for each in batch.sampling.edits:
            for ids in (each.ids, *each.bad_words):
                assert ((ids >= 0) & (ids < 200)).all()
            assert len(each.ids) == len(each.biases)
            assert each.allowed is None or len(each.allowed) == 7
