"""The plan stream of one group: what ends it and with which status, and what the group's status says meanwhile."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from group_driver import Ranks, collect, send_plans, start_plan, true_output
from grpc import aio

from albireo.errors import GroupUnavailable
from albireo.plan import StepPlan
from albireo.v1 import plan_pb2
from scheduler_svc.planner.group import GroupLink
from worker_svc.plan_stream import MAX_PLANS_QUEUED


async def wait_for_status(link: GroupLink, **expected: int) -> None:
    """Waits until the group's status has these fields."""
    for _ in range(500):
        status = await link.status()
        if {name: getattr(status, name) for name in expected} == expected:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{status} where {expected} was expected")


@pytest.fixture
async def link(tmp_path: Path, stub_model: Path) -> AsyncIterator[GroupLink]:
    """To a group whose steps take 50 ms."""
    with Ranks(tmp_path, stub_model, 1, engine="stub", stub_step_ms=50) as ranks:
        link = GroupLink(ranks.address)
        await link.wait_until_ready()
        yield link
        await link.close()


async def test_a_broken_stream_is_refused_and_a_new_epoch_heals_the_group(tmp_path: Path, stub_model: Path):
    """On all ranks, although the leader alone has seen the plan that does not follow."""
    with Ranks(tmp_path, stub_model, 2, engine="stub") as ranks:
        link = GroupLink(ranks.address)
        await link.wait_until_ready()
        stream = link.open()
        stream.send(start_plan(1))
        stream.send(StepPlan(1, 7, None))
        with pytest.raises(GroupUnavailable, match=r"INTERNAL.*step 7 where step 1 follows"):
            await stream.run(lambda: None, lambda _: None)
        assert (await link.wait_until_ready()).epoch == 1
        stream = link.open()
        send_plans(stream, 2, 5)
        assert await collect(stream, 5) == true_output(5)
        assert ranks.count(0, "group is ready") == 1
        await link.close()


async def test_status_counts_the_plans_whose_results_have_not_left(link: GroupLink):
    stream = link.open()
    send_plans(stream, 1, 4)
    collecting = asyncio.create_task(collect(stream, 4))
    await wait_for_status(link, epoch=1, next_step_id=4, num_queued=4)
    await wait_for_status(link, epoch=1, next_step_id=4, num_queued=2)
    assert await collecting == true_output(4)
    await wait_for_status(link, epoch=1, next_step_id=4, num_queued=0)
    stream = link.open()
    stream.send(start_plan(5, step_id=100))
    assert await collect(stream, 1) == true_output(1)
    await wait_for_status(link, epoch=5, next_step_id=101, num_queued=0)


async def test_a_second_planner_takes_over(link: GroupLink):
    """The first one's plans that wait still run, but nobody is told."""
    first = link.open()
    send_plans(first, 1, 8)
    ended = asyncio.create_task(first.run(lambda: None, lambda _: None))
    await wait_for_status(link, epoch=1, next_step_id=8)
    second = link.open()
    send_plans(second, 2, 3)
    assert await collect(second, 3) == true_output(3)
    with pytest.raises(Exception, match="another planner took over"):
        await asyncio.wait_for(ended, 10)


async def end_of_stream(link: GroupLink, *plans: bytes) -> tuple[grpc.StatusCode, str]:
    """How a stream of these messages ends."""
    call = link._channel.stream_stream("/albireo.v1.WorkerGroup/Run", None, None)()
    for plan in plans:
        await call.write(plan)
    with contextlib.suppress(aio.AioRpcError):
        while await asyncio.wait_for(call.read(), 10) is not aio.EOF:
            pass
    return await call.code(), await call.details()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\xff\xff", "not a step plan"),
        (plan_pb2.StepPlan(epoch=2, append_slots=b"123").SerializeToString(), "not a step plan"),
        (plan_pb2.StepPlan(epoch=2, append_slots=b"1234").SerializeToString(), "differ in length"),
        (plan_pb2.StepPlan(epoch=0).SerializeToString(), "epoch 0 after epoch 0"),
        (plan_pb2.StepPlan(epoch=2, step_id=2**64 - 1).SerializeToString(), "step 18446744073709551615"),
        (plan_pb2.StepPlan(epoch=2, finished_slots=b"\xff\xff\xff\xff").SerializeToString(), "finished slot -1"),
    ],
)
async def test_what_is_no_plan_ends_the_stream_only(link: GroupLink, message: bytes, reason: str):
    code, details = await end_of_stream(link, message)
    assert code is grpc.StatusCode.INTERNAL
    assert reason in details
    stream = link.open()
    send_plans(stream, 1, 2)
    assert await collect(stream, 2) == true_output(2)


async def test_an_epoch_that_the_group_has_seen_is_refused(link: GroupLink):
    stream = link.open()
    send_plans(stream, 3, 1)
    await collect(stream, 1)
    stream = link.open()
    stream.send(StepPlan(3, 1, None))
    with pytest.raises(GroupUnavailable, match="epoch 3 after epoch 3"):
        await stream.run(lambda: None, lambda _: None)


async def test_a_planner_that_does_not_wait_for_results_is_refused(link: GroupLink):
    stream = link.open()
    send_plans(stream, 1, MAX_PLANS_QUEUED + 10)
    with pytest.raises(GroupUnavailable, match=r"INTERNAL.*plans are queued already"):
        await stream.run(lambda: None, lambda _: None)


async def test_a_group_that_is_not_complete_is_unavailable(tmp_path: Path, stub_model: Path):
    with Ranks(tmp_path, stub_model, 2, engine="stub") as ranks:
        ranks.kill(1)
        link = GroupLink(ranks.address)
        await ranks.wait_for(0, "weights are loaded", 1)
        await asyncio.sleep(0.2)
        status = await link.status()
        assert (status.state, status.stage) == (plan_pb2.GroupStatus.STATE_LOADING, "meeting the other ranks")
        assert await end_of_stream(link) == (
            grpc.StatusCode.UNAVAILABLE,
            "the worker group is not complete: meeting the other ranks",
        )
        await link.close()
