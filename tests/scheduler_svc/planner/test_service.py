"""The planner between a leader that loses messages and front ends that come and go: nothing is lost or repeated."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from albireo.arrays import pack_int32
from albireo.rpc import make_channel
from albireo.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2, plan_pb2
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.planner import frontends, service
from scheduler_svc.planner.group import Superseded

pytestmark = pytest.mark.timeout(60)

PROMPTS = [[5, 6, 7], [9] * 30, [40], [2, 3], [4, 4, 4, 4]]


async def until(condition: Any) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


def once(at: int) -> Any:
    """True for the first step from ``at`` on, and never again."""
    done: list[int] = []

    def ask(step_id: int) -> bool:
        if step_id < at or done:
            return False
        done.append(step_id)
        return True

    return ask


async def health_of(world: Any) -> Any:
    async with make_channel(world.planner_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest())).status


@pytest.mark.parametrize("fault", ["lose_plan", "double_plan", "lose_result", "double_result"])
@pytest.mark.parametrize("at", [0, 7, 21])
async def test_a_lost_or_doubled_message_costs_no_token(world: Any, fault: str, at: int) -> None:
    """Step 21 is among the last ones: where no other message shows the loss, the leader's status does."""
    await world.start()
    setattr(world.leader, fault, once(at))
    await world.exact(*[(prompt, world.submit(prompt)) for prompt in PROMPTS])
    await until(lambda: world.planner.counts.num_recoveries >= 1 or (fault.startswith("double") and at == 21))
    await until(lambda: not world.planner._state.in_flight)
    state = world.planner._state
    assert state.is_idle
    assert state.pool.num_free == state.pool.num_blocks


async def test_a_broken_stream_begins_a_new_epoch_and_sequences_go_on(world: Any) -> None:
    await world.start()
    inboxes = [(prompt, world.submit(prompt)) for prompt in PROMPTS]
    await until(lambda: len(inboxes[0][1].tokens) > 3)
    world.leader.break_stream()
    await world.exact(*inboxes)
    assert world.leader.num_streams == 2
    assert world.leader.status.epoch == 2


async def test_a_group_that_stays_away_fails_what_waits_and_is_served_again_later(world: Any) -> None:
    """Past the recovery timeout: UNAVAILABLE for what waits and what comes, NOT_SERVING, until the group is back."""
    await world.start(recovery_timeout_s=0.3)
    world.leader.open.clear()
    inbox = world.submit(PROMPTS[0])
    await until(lambda: world.leader.status.num_queued)
    await until(lambda: world.link.is_serving)
    world.leader.ready = False
    world.leader.break_stream()
    await until(lambda: inbox.ended)
    assert inbox.ended.refusal.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert "0.3 s" in inbox.ended.refusal.message
    late = world.submit(PROMPTS[1])
    await until(lambda: late.ended)
    assert late.ended.refusal.code == grpc.StatusCode.UNAVAILABLE.value[0]
    await until(lambda: not world.link.is_serving)
    assert await health_of(world) == health_pb2.HealthCheckResponse.NOT_SERVING
    world.leader.ready = True
    world.leader.open.set()
    await until(lambda: world.link.is_serving)
    await world.exact((PROMPTS[2], world.submit(PROMPTS[2])))
    assert await health_of(world) == health_pb2.HealthCheckResponse.SERVING


async def test_health_means_progress(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that answers and does not work is not healthy, and nothing is thrown away: it may be slow."""
    monkeypatch.setattr("scheduler_svc.planner.progress._LEAST_LIMIT_S", 0.4)
    await world.start()
    await until(lambda: world.link.is_serving)
    world.leader.open.clear()
    inbox = world.submit(PROMPTS[0])
    await until(lambda: not world.link.is_serving)
    assert await health_of(world) == health_pb2.HealthCheckResponse.NOT_SERVING
    await asyncio.sleep(2.5)  # the leader says that it is at work: no message is lost
    assert world.leader.num_streams == 1
    world.leader.open.set()
    await world.exact((PROMPTS[0], inbox))
    await until(lambda: world.link.is_serving)


async def test_a_full_queue_refuses_with_a_retry_hint_and_keeps_what_it_has(world: Any) -> None:
    await world.start(max_waiting=3)
    world.leader.open.clear()
    kept = [([7], world.submit([7]))]
    await until(lambda: len(world.planner._state.in_flight) == 2)  # the window is full: who comes now waits
    kept += [([8, i], world.submit([8, i])) for i in range(3)]
    await until(lambda: world.planner._state.queue.num_waiting == 3)
    refused = world.submit([3])
    await until(lambda: refused.ended)
    assert refused.ended.refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "3 sequences wait" in refused.ended.refusal.message
    assert refused.ended.refusal.retry_after_s >= 1
    world.leader.open.set()
    await world.exact(*kept)


async def test_what_was_accepted_once_is_not_refused_when_it_comes_again(world: Any) -> None:
    await world.start(max_waiting=1)
    world.leader.open.clear()
    inboxes = [world.submit([7, i], is_resumed=True) for i in range(9)]
    await until(lambda: world.planner._state.table.num_running == 4)
    world.leader.open.set()
    await world.exact(*[([7, i], inbox) for i, inbox in enumerate(inboxes)])


async def test_a_request_that_breaks_the_group_every_time_is_given_up_on(world: Any) -> None:
    await world.start()
    world.leader.poison = 66
    bad = world.submit([66, 2])
    async with asyncio.timeout(20):
        await bad.over.wait()
    assert bad.ended is not None
    assert bad.ended.refusal.code == grpc.StatusCode.INTERNAL.value[0]
    await world.exact((PROMPTS[0], world.submit(PROMPTS[0])))


@pytest.mark.parametrize(("output", "reason"), [([5, 1], "STOP"), ([5, 6, 7], "LENGTH")])
async def test_a_resumed_sequence_that_was_over_is_told_so(world: Any, output: list[int], reason: str) -> None:
    """The planner died between the last token and saying that it was the last."""
    await world.start()
    inbox = world.submit([3], max_tokens=3, is_resumed=True, output_token_ids=pack_int32(output), ignore_eos=False)
    async with asyncio.timeout(10):
        await inbox.over.wait()
    assert inbox.ended is not None
    assert generation_pb2.FinishReason.Name(inbox.ended.reason) == f"FINISH_REASON_{reason}"
    assert inbox.ended.num_output_tokens == len(output)
    assert inbox.tokens == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_token_ids": pack_int32([500])}, "outside the vocabulary"),
        ({"output_token_ids": pack_int32([5] * 30)}, "20 is the limit"),
        ({"output_token_ids": b"abc"}, "packed int32"),
    ],
)
async def test_wrong_output_is_refused(world: Any, fields: dict[str, Any], message: str) -> None:
    await world.start()
    inbox = world.submit([3], is_resumed=True, **fields)
    await until(lambda: inbox.ended)
    assert message in inbox.ended.refusal.message


async def test_another_planner_takes_over(world: Any) -> None:
    """The one that lost the group ends; it does not fight for it."""
    await world.start()

    inbox = world.submit(PROMPTS[0])
    await until(lambda: inbox.tokens)
    world.leader.break_stream(grpc.StatusCode.ABORTED)
    with pytest.raises(Superseded):
        await asyncio.wait_for(world.running, 15)


async def test_a_front_end_that_does_not_read_is_cut_off(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sequences are freed, the others' go on, and it may attach again."""
    monkeypatch.setattr(frontends, "_MAX_BACKLOG_TOKENS", 50)
    monkeypatch.setattr(service, "_WATCH_INTERVAL_S", 0.02)
    await world.start()
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
    async with aio.insecure_channel(world.planner_address, options=options) as channel:
        call: Any = frontend_pb2_grpc.PlannerStub(channel).Attach()
        await call.write(frontend_pb2.FrontendMessage(hello=frontend_pb2.Hello(name="parked")))
        await call.read()
        # Fills the window of the connection, so that the planner's next write has to wait.
        world.planner.frontends._attached[1].outbox.add_ended(
            frontend_pb2.Ended(refusal=frontend_pb2.Refusal(message="x" * (8 << 20)))
        )
        submits = [
            frontend_pb2.Submit(
                sequence_id=i + 1,
                token_ids=pack_int32([i + 1]),
                max_tokens=60,
                ignore_eos=True,
                sampling=plan_pb2.Sampling(top_p=1),
            )
            for i in range(8)
        ]
        await call.write(frontend_pb2.FrontendMessage(submits=submits))
        await until(lambda: len(world.planner.frontends) == 1)
        await world.exact((PROMPTS[0], world.submit(PROMPTS[0])))
        await until(lambda: world.planner._state.is_idle)
        async with asyncio.timeout(10):
            with pytest.raises((aio.AioRpcError, asyncio.CancelledError)):
                await read_to_the_end(call)


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not aio.EOF:
        pass
    raise aio.AioRpcError(await call.code(), aio.Metadata(), aio.Metadata())


@pytest.mark.parametrize("first", [None, frontend_pb2.FrontendMessage(cancels=[1])])
async def test_a_stream_without_a_hello_is_refused_in_time(
    world: Any, monkeypatch: pytest.MonkeyPatch, first: Any
) -> None:
    monkeypatch.setattr(frontends, "_HELLO_TIMEOUT_S", 0.2)
    await world.start()
    async with make_channel(world.planner_address) as channel:
        call: Any = frontend_pb2_grpc.PlannerStub(channel).Attach()
        if first is not None:
            await call.write(first)
        with pytest.raises(aio.AioRpcError, match="the first message is a hello"):
            await asyncio.wait_for(call.read(), 10)


async def test_a_lost_front_end_gives_everything_back(world: Any) -> None:
    await world.start()
    world.leader.open.clear()
    other = PlannerLink(world.planner_address, "other")
    await other.connect(10)
    running = asyncio.create_task(other.run())
    for prompt in PROMPTS:
        other.submit(
            frontend_pb2.Submit(token_ids=pack_int32(prompt), max_tokens=9, sampling=plan_pb2.Sampling(top_p=1)),
            world.submit([3], max_tokens=1),
        )
    await until(lambda: len(world.planner._state.sequences) == 10)
    running.cancel()
    await other.close()
    await until(lambda: len(world.planner._state.sequences) == 5)
    world.leader.open.set()
    await until(lambda: world.planner._state.is_idle)
    assert len(world.planner.frontends) == 1
