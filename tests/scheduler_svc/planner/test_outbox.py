"""What waits for a front end merges into one message."""

import numpy as np

from albireo.arrays import unpack_int32
from albireo.logprobs import Logprobs, decode
from scheduler_svc.planner.outbox import Outbox


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def one_logprob(index: int, num_top: int) -> Logprobs:
    top = np.zeros(num_top, dtype=np.float32)
    return Logprobs(ints(index), np.array([-0.5], dtype=np.float32), ints(1), ints(num_top), ints(*range(num_top)), top)


async def test_logprobs_of_steps_that_merge_keep_beside_their_tokens() -> None:
    outbox = Outbox()
    ids = np.array([1, 2], dtype=np.int64)
    outbox.add_tokens(ids, ints(10, 11), one_logprob(1, 2))
    outbox.add_tokens(ids, ints(12, 13))
    outbox.add_tokens(ids, ints(14, 15), one_logprob(0, 0))
    assert outbox.backlog_tokens == 8
    message = await outbox.take()
    tokens = unpack_int32(message.token_ids)
    logprobs = decode(message.logprobs, len(tokens))
    assert tokens[logprobs.indices].tolist() == [11, 14]
    assert outbox.backlog_tokens == 0

    outbox.add_tokens(ids, ints(16, 17), one_logprob(0, 0))
    message = await outbox.take()
    assert unpack_int32(message.logprobs.indices).tolist() == [0]


async def test_without_logprobs_a_message_has_none() -> None:
    outbox = Outbox()
    outbox.add_tokens(np.array([1], dtype=np.int64), ints(10))
    assert not (await outbox.take()).HasField("logprobs")
