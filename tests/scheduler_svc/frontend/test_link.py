"""The stream to the planner: what is sent, what is dispatched, and how its end is noticed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from albireo.arrays import pack_int32, pack_uint64, unpack_int32
from albireo.errors import AlbireoError, DeadlineExceeded, GroupUnavailable
from albireo.rpc import make_server
from albireo.v1 import frontend_pb2, frontend_pb2_grpc, plan_pb2
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.frontend.messages import MAX_SUBMITS_BYTES


class Inbox:
    """Notes what it gets."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.batches: list[list[int]] = []
        self.ended: frontend_pb2.Ended | None = None
        self.error: AlbireoError | None = None

    def start(self, num_cached_tokens: int) -> None:
        assert not self.batches
        self.starts.append(num_cached_tokens)

    def receive(self, token_ids: list[int], now: float, logprobs: Any) -> None:
        self.batches.append(token_ids)

    def end(self, ended: frontend_pb2.Ended) -> None:
        self.ended = ended

    def fail(self, error: AlbireoError) -> None:
        self.error = error


class BrokenInbox(Inbox):
    def receive(self, token_ids: list[int], now: float, logprobs: Any) -> None:
        raise RuntimeError("a bug")


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def serve(planner: Any, path: Path) -> Any:
    """The planner's successor at the same address."""
    server = make_server()
    frontend_pb2_grpc.add_PlannerServicer_to_server(planner, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server


@pytest.fixture
async def link(planner_server: Any, tmp_path: Path) -> Any:
    link = PlannerLink(f"unix:{tmp_path}/planner.sock", "frontend-7")
    await link.connect(10)
    running = asyncio.create_task(link.run())
    yield link
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await link.close()


async def test_a_message_that_cannot_be_read_costs_the_link_and_no_sequence(link: Any, planner: Any) -> None:
    """It is attached again, and the sequence submitted again."""
    inbox = Inbox()
    link.submit(frontend_pb2.Submit(), inbox)
    await planner.submits.get()
    await planner.send_message(frontend_pb2.PlannerMessage(started_sequence_ids=pack_uint64([1])))
    async with asyncio.timeout(10):
        assert (await planner.submits.get()).is_resumed
    assert (inbox.starts, inbox.batches, inbox.error) == ([], [], None)


async def test_sequence_ids_increase_and_what_gathers_goes_in_one_message(link: Any, planner: Any) -> None:
    first, second = Inbox(), Inbox()
    assert link.submit(frontend_pb2.Submit(request_id="a"), first) == 1
    assert link.submit(frontend_pb2.Submit(request_id="b"), second) == 2
    link.cancel(1)
    async with asyncio.timeout(10):
        assert [(await planner.submits.get()).sequence_id for _ in range(2)] == [1, 2]
        assert await planner.cancels.get() == 1
    assert planner.hello.name == "frontend-7"
    assert link.submit(frontend_pb2.Submit(request_id="c"), first) == 3


async def test_an_abort_does_not_end_what_was_submitted_after_it(link: Any) -> None:
    """Submits come first in a message, so a later submit takes the next one."""
    link.submit(frontend_pb2.Submit(request_id="a"), Inbox())
    link.abort(["a"])
    link.submit(frontend_pb2.Submit(request_id="a"), Inbox())
    assert [len(message.submits) for message in link._outbox] == [1, 1]
    assert [[abort.request_id for abort in message.aborts] for message in link._outbox] == [["a"], []]


async def test_an_inbox_gets_one_batch_per_message_and_nothing_after_its_end(link: Any, planner: Any) -> None:
    first, second = Inbox(), Inbox()
    link.submit(frontend_pb2.Submit(), first)
    link.submit(frontend_pb2.Submit(), second)
    end = frontend_pb2.Ended(sequence_id=1, num_output_tokens=2)
    await planner.send((1, 10), (2, 20), (1, 11), ended=(end,))
    await planner.send((1, 12), (2, 21))
    await until(lambda: len(second.batches) == 2)
    assert first.batches == [[10, 11]]
    assert first.ended == end
    assert second.batches == [[20], [21]]


async def test_nothing_comes_for_a_sequence_that_was_cut_or_cancelled(link: Any, planner: Any) -> None:
    cut, cancelled, other = Inbox(), Inbox(), Inbox()
    for inbox in (cut, cancelled, other):
        link.submit(frontend_pb2.Submit(), inbox)
    link.truncate(1, 4)
    link.cancel(2)
    link.cancel(2)
    async with asyncio.timeout(10):
        assert (await planner.truncates.get()).num_kept == 4
        assert await planner.cancels.get() == 2
    await planner.send((1, 10), (2, 10), (3, 10))
    await until(lambda: other.batches)
    assert cut.batches == cancelled.batches == []
    assert planner.cancels.empty()


async def test_a_bug_at_one_sequence_leaves_the_others_alone(link: Any, planner: Any) -> None:
    broken, other = BrokenInbox(), Inbox()
    link.submit(frontend_pb2.Submit(), broken)
    link.submit(frontend_pb2.Submit(), other)
    await planner.send((1, 10), (2, 10))
    await until(lambda: other.batches)
    assert broken.error is not None
    async with asyncio.timeout(10):
        assert await planner.cancels.get() == 1


async def test_connecting_waits_for_a_planner_that_starts_later(planner: Any, tmp_path: Path) -> None:
    link = PlannerLink(f"unix:{tmp_path}/late.sock", "f")
    connecting = asyncio.create_task(link.connect(10))
    await asyncio.sleep(0.05)
    server = await serve(planner, tmp_path / "late.sock")
    assert (await connecting).engine == "stub"
    await link.close()
    await server.stop(None)


async def test_connecting_is_bounded(tmp_path: Path) -> None:
    link = PlannerLink(f"unix:{tmp_path}/never.sock", "f")
    with pytest.raises(GroupUnavailable, match=r"not ready within 0\.1 s"):
        await link.connect(0.1)


async def test_connecting_to_something_that_is_no_planner_fails_at_once(tmp_path: Path) -> None:
    server = make_server()
    server.add_insecure_port(f"unix:{tmp_path}/other.sock")
    await server.start()
    link = PlannerLink(f"unix:{tmp_path}/other.sock", "f")
    with pytest.raises(GroupUnavailable, match="UNIMPLEMENTED"):
        await link.connect(10)
    await link.close()
    await server.stop(None)


async def test_a_lost_link_attaches_again_and_sequences_go_on(
    planner: Any, planner_server: Any, tmp_path: Path
) -> None:
    """What runs is submitted again with its output, in its order; what was never sent comes after it."""
    link = PlannerLink(f"unix:{tmp_path}/planner.sock", "f")
    await link.connect(10)
    running = asyncio.create_task(link.run())
    first, second, late = Inbox(), Inbox(), Inbox()
    for inbox, label in ((first, "a"), (second, "b")):
        link.submit(frontend_pb2.Submit(request_id=label, max_tokens=9), inbox)
        await planner.submits.get()
    await planner.send((1, 10), (1, 11))
    await until(lambda: first.batches)
    await planner_server.stop(None)
    await until(lambda: not link._is_attached)
    assert link.is_open
    assert link.submit(frontend_pb2.Submit(request_id="c"), late) == 3
    server = await serve(planner, tmp_path / "planner.sock")
    async with asyncio.timeout(10):
        again = [await planner.submits.get() for _ in range(3)]
    assert [(submit.sequence_id, submit.request_id, submit.is_resumed) for submit in again] == [
        (1, "a", True),
        (2, "b", True),
        (3, "c", False),
    ]
    assert [unpack_int32(submit.output_token_ids).tolist() for submit in again] == [[10, 11], [], []]
    assert again[0].max_tokens == 9
    await planner.send((1, 12), ended=(frontend_pb2.Ended(sequence_id=1, num_output_tokens=3),))
    await until(lambda: first.ended)
    assert first.batches == [[10, 11], [12]]
    assert first.error is second.error is None
    running.cancel()
    await link.close()
    await server.stop(None)


async def test_what_was_cancelled_meanwhile_is_not_submitted_again(
    planner: Any, planner_server: Any, tmp_path: Path
) -> None:
    link = PlannerLink(f"unix:{tmp_path}/planner.sock", "f")
    await link.connect(10)
    running = asyncio.create_task(link.run())
    for _ in range(2):
        link.submit(frontend_pb2.Submit(), Inbox())
        await planner.submits.get()
    await planner_server.stop(None)
    await until(lambda: not link._is_attached)
    link.cancel(1)
    server = await serve(planner, tmp_path / "planner.sock")
    async with asyncio.timeout(10):
        assert (await planner.submits.get()).sequence_id == 2
    assert planner.submits.empty()
    running.cancel()
    await link.close()
    await server.stop(None)


async def test_past_the_recovery_timeout_sequences_fail_and_the_link_still_comes_back(
    planner: Any, planner_server: Any, tmp_path: Path
) -> None:
    link = PlannerLink(f"unix:{tmp_path}/planner.sock", "f", recovery_timeout_s=0.2)
    await link.connect(10)
    changes: list[bool] = []
    link.on_change = lambda: changes.append(link.is_serving)
    inbox = Inbox()
    link.submit(frontend_pb2.Submit(), inbox)
    running = asyncio.create_task(link.run())
    await planner.submits.get()
    await planner_server.stop(None)
    await until(lambda: inbox.error)
    assert isinstance(inbox.error, GroupUnavailable)
    assert "not back within 0.2 s" in str(inbox.error)
    assert not link.is_open
    with pytest.raises(GroupUnavailable):
        link.submit(frontend_pb2.Submit(), inbox)
    server = await serve(planner, tmp_path / "planner.sock")
    await until(lambda: link.is_open)
    link.submit(frontend_pb2.Submit(), Inbox())
    async with asyncio.timeout(10):
        assert (await planner.submits.get()).sequence_id == 2
    assert changes[0] is False
    running.cancel()
    await link.close()
    await server.stop(None)


async def test_a_planner_with_another_model_is_not_gone_on_with(
    planner: Any, planner_server: Any, tmp_path: Path
) -> None:
    link = PlannerLink(f"unix:{tmp_path}/planner.sock", "f")
    await link.connect(10)
    inbox = Inbox()
    link.submit(frontend_pb2.Submit(), inbox)
    running = asyncio.create_task(link.run())
    await planner.submits.get()
    await planner_server.stop(None)
    planner.group.vocab_size += 1
    server = await serve(planner, tmp_path / "planner.sock")
    with pytest.raises(GroupUnavailable, match="another model"):
        await asyncio.wait_for(running, 10)
    assert isinstance(inbox.error, GroupUnavailable)
    await link.close()
    await server.stop(None)


async def test_a_sequence_is_told_once_how_much_of_its_prompt_was_cached(
    planner: Any, planner_server: Any, tmp_path: Path
) -> None:
    """Before its tokens, also of the same message; where it goes on elsewhere, the first answer stays."""
    link = PlannerLink(f"unix:{tmp_path}/planner.sock", "f")
    await link.connect(10)
    running = asyncio.create_task(link.run())
    early, late = Inbox(), Inbox()
    for inbox in (early, late):
        link.submit(frontend_pb2.Submit(), inbox)
        await planner.submits.get()
    await planner.send((1, 10), started=((1, 32), (99, 1)))
    await until(lambda: early.batches)
    await planner_server.stop(None)
    await until(lambda: not link._is_attached)
    server = await serve(planner, tmp_path / "planner.sock")
    async with asyncio.timeout(10):
        _ = [await planner.submits.get() for _ in range(2)]
    await planner.send((1, 11), (2, 20), started=((1, 33), (2, 0)))
    await until(lambda: late.batches)
    assert (early.starts, late.starts) == ([32], [0])
    assert early.batches == [[10], [11]]
    running.cancel()
    await link.close()
    await server.stop(None)


async def test_a_deadline_stays_where_it_is_when_a_sequence_is_submitted_again(
    planner: Any, planner_server: Any, tmp_path: Path
) -> None:
    """Sent before or not: what is left then counts. What has nothing left fails, and no planner sees it."""
    link = PlannerLink(f"unix:{tmp_path}/planner.sock", "f")
    await link.connect(10)
    running = asyncio.create_task(link.run())
    inboxes = {label: Inbox() for label in ("long", "short", "none", "unsent short", "unsent long")}

    def submit(label: str, remaining_s: float) -> None:
        link.submit(frontend_pb2.Submit(request_id=label, remaining_s=remaining_s), inboxes[label])

    submit("long", 60)
    submit("short", 0.3)
    submit("none", 0)
    assert [(await planner.submits.get()).remaining_s for _ in range(3)] == [60, 0.3, 0]
    await planner_server.stop(None)
    await until(lambda: not link._is_attached)
    submit("unsent short", 0.3)
    submit("unsent long", 60)
    await asyncio.sleep(0.4)
    server = await serve(planner, tmp_path / "planner.sock")
    async with asyncio.timeout(10):
        again = [await planner.submits.get() for _ in range(3)]
    assert [(one.request_id, one.is_resumed) for one in again] == [
        ("long", True),
        ("none", True),
        ("unsent long", False),
    ]
    assert 50 < again[0].remaining_s < 59.7
    assert again[1].remaining_s == 0
    assert 50 < again[2].remaining_s < 59.7
    assert planner.submits.empty()
    for label, inbox in inboxes.items():
        assert isinstance(inbox.error, DeadlineExceeded) is label.endswith("short")
    running.cancel()
    await link.close()
    await server.stop(None)


async def test_what_is_submitted_again_and_again_lost_stays_resumed(link: Any) -> None:
    """A link that is lost before it has written must not make a sequence new."""
    link.submit(frontend_pb2.Submit(), Inbox())
    link._outbox.clear()  # as when it was written
    for _ in range(2):
        link._resubmit()
        assert [submit.is_resumed for message in link._outbox for submit in message.submits] == [True]


async def test_submits_fill_messages_of_a_bounded_size() -> None:
    """A few requests of many completions must not make a message that is too large to send, whatever is large."""
    link = PlannerLink("unix:/nowhere", "f")
    link._is_open = True
    small, large = frontend_pb2.Submit(), frontend_pb2.Submit(token_ids=bytes(MAX_SUBMITS_BYTES - 1000))
    words = frontend_pb2.Submit(sampling=plan_pb2.Sampling(bad_words=[bytes(256)] * 512))
    for submit in (small, large, large, small, words, *[small] * 3):
        link.submit(submit, Inbox())
    submits = [[submit.sequence_id for submit in message.submits] for message in link._outbox]
    assert submits == [[1, 2], [3, 4], [5, 6, 7, 8]]
    assert max(message.ByteSize() for message in link._outbox) <= MAX_SUBMITS_BYTES + 100
    link._resubmit()
    link.submit(large, Inbox())
    assert [submit.sequence_id for submit in link._outbox[-1].submits] == [9]
    await link.close()


async def test_sequences_of_one_submit_share_it_and_go_on_with_their_own_seeds(link: Any) -> None:
    """However many there are, prompt and allowed ids are held once."""
    submit = frontend_pb2.Submit(token_ids=pack_int32([1, 2]), sampling=plan_pb2.Sampling(allowed_mask=b"\x05"))
    for seed in (7, 8, 9):
        submit.sampling.seed = seed
        link.submit(submit, Inbox())
    assert all(sequence._submit is submit for sequence in link._sequences.values())
    link._outbox.clear()  # as when it was written
    link._resubmit()
    (message,) = link._outbox
    assert [(one.sequence_id, one.sampling.seed) for one in message.submits] == [(1, 7), (2, 8), (3, 9)]
    for one in message.submits:
        assert (one.token_ids, one.sampling.allowed_mask, one.is_resumed) == (submit.token_ids, b"\x05", True)
