"""vllm.grpc.engine.VllmEngine beside generation, from a real client to a scripted planner."""

import asyncio
import hashlib
import io
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

import albireo
from albireo.cache_events import Change, Removed, Reset, Stored, encode
from albireo.rpc import CHANNEL_OPTIONS
from albireo.v1 import frontend_pb2
from scheduler_svc.frontend import vllm_operations
from scheduler_svc.frontend.tokenizer_zip import _FILES

Ids = Callable[..., list[int]]
pytestmark = pytest.mark.timeout(30)

LOAD = frontend_pb2.Load(
    num_running=2,
    num_waiting=3,
    num_used_blocks=25,
    is_serving=True,
    num_waiting_tokens=70,
    tokens_per_s=12.5,
    cache_hit_rate=0.25,
)


def stored(name: int, parent_hash: bytes = b"") -> Stored:
    return Stored(hashlib.sha256(b"%d" % name).digest(), parent_hash, name.to_bytes(4, "little") * 32)


async def tell(world: Any, *changes: Change) -> None:
    await world.planner.send_message(frontend_pb2.PlannerMessage(cache_events=encode(changes)))


async def tell_load(world: Any, load: frontend_pb2.Load) -> None:
    await world.planner.send_message(frontend_pb2.PlannerMessage(load=load))
    async with asyncio.timeout(10):
        while world.core.link.load != load:
            await asyncio.sleep(0.002)


async def refusal(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    return caught.value


async def test_embeddings_are_not_served(world: Any) -> None:
    error = await refusal(world.vllm.Embed(pb.EmbedRequest()))
    assert (error.code(), error.details()) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "Embed: this server generates; it serves no embeddings",
    )


# Load.


async def test_load_figures_are_the_planners(world: Any) -> None:
    await tell_load(world, LOAD)
    answer = await world.vllm.GetLoads(pb.GetLoadsRequest(include=["core", "disagg", "memory", "no such section"]))
    assert (answer.version, answer.dp_rank_count) == (albireo.__version__, 1)
    assert abs(datetime.fromisoformat(answer.timestamp) - datetime.now(UTC)) < timedelta(seconds=10)
    assert list(answer.loads) == [
        pb.SchedulerLoad(
            num_running_reqs=2,
            num_waiting_reqs=3,
            num_total_reqs=5,
            num_used_tokens=25 * 32,
            max_total_num_tokens=100 * 32,
            token_usage=0.25,
            gen_throughput=12.5,
            cache_hit_rate=0.25,
            utilization=0.25,
            max_running_requests=8,
            num_waiting_uncached_tokens=70,
        )
    ]


async def test_a_server_is_as_busy_as_the_scarcer_of_slots_and_blocks(world: Any) -> None:
    await tell_load(world, frontend_pb2.Load(num_running=6, num_used_blocks=25, is_serving=True))
    answer = await world.vllm.GetLoads(pb.GetLoadsRequest())
    assert answer.loads[0].utilization == 0.75


@pytest.mark.parametrize(("dp_rank", "num_loads"), [(0, 1), (1, 0)])
async def test_load_figures_of_one_rank(world: Any, dp_rank: int, num_loads: int) -> None:
    answer = await world.vllm.GetLoads(pb.GetLoadsRequest(dp_rank=dp_rank))
    assert (answer.dp_rank_count, len(answer.loads)) == (num_loads, num_loads)


async def test_nothing_can_be_asked_while_the_model_loads(loading_world: Any) -> None:
    calls = [
        loading_world.vllm.GetLoads(pb.GetLoadsRequest()),
        loading_world.vllm.FlushCache(common_pb2.FlushCacheRequest()),
        loading_world.vllm.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()),
    ]
    for call in calls:
        assert (await refusal(call)).code() == grpc.StatusCode.UNAVAILABLE


# Flushing.


async def test_flushing_the_cache_reaches_the_planner(world: Any) -> None:
    answer = await world.vllm.FlushCache(common_pb2.FlushCacheRequest())
    assert (answer.success, answer.message) == (True, "the prefix cache is forgotten")
    await world.planner.flushed.wait()


async def test_flushing_waits_for_requests_no_longer_than_it_may(world: Any) -> None:
    """Those that go on are counted."""
    await tell_load(world, LOAD)
    answer = await world.vllm.FlushCache(common_pb2.FlushCacheRequest(timeout_s=0.01))
    assert "5 requests go on" in answer.message
    await world.planner.flushed.wait()
    world.planner.flushed.clear()
    flushing = asyncio.ensure_future(world.vllm.FlushCache(common_pb2.FlushCacheRequest(timeout_s=30)))
    await world.vllm.GetLoads(pb.GetLoadsRequest())  # answered after the other call has come
    assert not world.planner.flushed.is_set()
    await tell_load(world, frontend_pb2.Load(is_serving=True))
    assert (await flushing).message == "the prefix cache is forgotten"
    await world.planner.flushed.wait()


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
async def test_a_wrong_timeout_is_refused(world: Any, timeout_s: float) -> None:
    error = await refusal(world.vllm.FlushCache(common_pb2.FlushCacheRequest(timeout_s=timeout_s)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "timeout_s" in (error.details() or "")
    assert not world.planner.flushed.is_set()


# Cache events.


def subscribe(world: Any, **fields: Any) -> Any:
    return world.vllm.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(**fields))


async def test_a_subscription_tells_what_is_cached_and_what_changes(world: Any) -> None:
    """Metadata comes at once, before the planner has said anything; the planner is followed while somebody reads."""
    call = subscribe(world)
    await call.initial_metadata()
    assert await world.planner.follows.get()
    parent = stored(1)
    await tell(world, Reset(), parent)
    state = await call.read()
    assert (state.sequence_number, state.snapshot.count) == (1, 1)
    assert [event.WhichOneof("data") for event in state.events] == ["cleared", "stored"]
    await tell(world, stored(2, parent.block_hash), Removed(parent.block_hash))
    batch = await call.read()
    while batch.load.load_only:
        batch = await call.read()
    child, removed = batch.events
    assert batch.sequence_number == 2
    assert [(block.block_size, list(block.token_ids)) for block in child.stored.blocks] == [(32, [2] * 32)]
    assert list(removed.removed.block_hashes) == [child.stored.parent_block_hash]
    assert batch.load.max_running_requests == 8
    call.cancel()
    assert not await world.planner.follows.get()


async def test_a_subscriber_comes_back_to_where_it_was(world: Any) -> None:
    """The other one keeps the planner followed."""
    first, second = subscribe(world), subscribe(world)
    assert await world.planner.follows.get()
    await tell(world, Reset())
    for call in (first, second):
        assert (await call.read()).sequence_number == 1
    second.cancel()
    for name in (2, 3):
        await tell(world, stored(name))
        while (await first.read()).load.load_only:
            pass
    again = subscribe(world, start_sequence_number=2)
    batches = [await again.read() for _ in range(2)]
    assert [batch.sequence_number for batch in batches] == [2, 3]
    assert not any(batch.HasField("snapshot") for batch in batches)
    from_elsewhere = subscribe(world, start_sequence_number=77)
    batch = await from_elsewhere.read()
    assert (batch.sequence_number, batch.snapshot.blocks) == (3, 2)
    assert world.planner.follows.empty()
    for call in (first, again, from_elsewhere):
        call.cancel()


async def test_a_new_planner_is_followed_as_well(world: Any, restart_planner: Callable[[], Any]) -> None:
    """What it has begins with a reset, under the next number."""
    call = subscribe(world)
    assert await world.planner.follows.get()
    await tell(world, Reset(), stored(1))
    assert (await call.read()).sequence_number == 1
    await world.planner_server.stop(None)
    await restart_planner()
    assert await world.planner.follows.get()
    await tell(world, Reset(), stored(2))
    batch = await call.read()
    while batch.load.load_only:
        batch = await call.read()
    assert batch.sequence_number == 2
    assert [event.WhichOneof("data") for event in batch.events] == ["cleared", "stored"]
    call.cancel()


async def test_load_records_come_when_the_load_changes_and_now_and_then(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbered like the last batch; before the first one only for those who ask."""
    monkeypatch.setattr(vllm_operations, "_HEARTBEAT_S", 0.05)
    early = subscribe(world, load_records_before_first_batch=True)
    late = subscribe(world)
    records = [await early.read() for _ in range(2)]
    assert [(each.sequence_number, each.load.load_only, len(each.events)) for each in records] == [(0, True, 0)] * 2
    await tell_load(world, LOAD)
    record = await early.read()
    while not record.load.running_requests:
        record = await early.read()
    load = record.load
    assert (load.running_requests, load.waiting_requests, load.waiting_uncached_tokens) == (2, 3, 70)
    assert (load.token_usage, load.active_token_usage, load.gen_throughput) == (0.25, 0.25, 12.5)
    assert (load.cache_hit_rate, load.num_used_tokens, load.max_total_num_tokens) == (0.25, 800, 3200)
    await tell(world, Reset())
    batches = [await late.read() for _ in range(3)]
    assert [each.sequence_number for each in batches] == [1, 1, 1]
    assert [each.load.load_only for each in batches] == [False, True, True]
    assert [each.load.sample for each in batches] == [1, 2, 3]
    assert batches[0].load.HasField("cache_hit_rate"), "a stream's first record is complete"
    for call in (early, late):
        call.cancel()


async def test_a_server_that_does_not_serve_has_no_load(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last figures would pass for the present ones."""
    monkeypatch.setattr(vllm_operations, "_HEARTBEAT_S", 0.01)
    call = subscribe(world, load_records_before_first_batch=True)
    assert (await call.read()).load.sample == 1
    await tell_load(world, frontend_pb2.Load(is_serving=False))
    await tell(world, Reset())
    while (batch := await call.read()).load.load_only:
        pass
    await tell(world, stored(1))
    assert (await call.read()).load.sample == batch.load.sample + 1, "no record in between"
    call.cancel()


async def test_subscriptions_end_when_the_server_stops(world: Any) -> None:
    call = subscribe(world)
    await call.initial_metadata()
    await world.frontend.stop(10)
    error = await refusal(call)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")


@pytest.mark.parametrize("flags", [{"write_timeout": 0.2}])
async def test_a_subscriber_that_does_not_read_is_cut_off(world: Any, config: Any) -> None:
    """The planner is not followed for it any longer."""
    options = [*CHANNEL_OPTIONS, ("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with aio.insecure_channel(config.listen, options=options) as channel:
        call = channel.unary_stream("/vllm.grpc.engine.VllmEngine/SubscribeKvEvents")(b"")
        assert await world.planner.follows.get()
        await tell(world, Reset(), *[stored(name) for name in range(20_000)])
        async with asyncio.timeout(20):
            assert not await world.planner.follows.get()
        call.cancel()


# The tokenizer.


async def fetch_tokenizer(world: Any) -> tuple[bytes, list[Any]]:
    chunks = [chunk async for chunk in world.vllm.GetTokenizer(common_pb2.GetTokenizerRequest())]
    return b"".join(chunk.data for chunk in chunks), chunks


async def test_the_tokenizer_comes_as_an_archive(world: Any, model_path: Path) -> None:
    """In chunks of 64 KiB, the last of which has the fingerprint of all."""
    filler = model_path / "vocab.txt"
    filler.write_bytes(hashlib.shake_256(b"incompressible").digest(200_000))
    try:
        data, chunks = await fetch_tokenizer(world)
        assert [len(chunk.data) for chunk in chunks[:-1]] == [64 << 10] * 3
        assert [chunk.sha256 for chunk in chunks] == [*[""] * 3, hashlib.sha256(data).hexdigest()]
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            assert names == ["config.json", "generation_config.json", "tokenizer.json", "vocab.txt"]
            assert all(archive.read(name) == (model_path / name).read_bytes() for name in names)
        filler.write_text("changed")
        assert (await fetch_tokenizer(world))[0] == data, "it is made once"
    finally:
        filler.unlink()


async def test_a_tokenizer_that_is_gone_is_not_found(world: Any, model_path: Path) -> None:
    """It may come back."""
    file = model_path / "tokenizer.json"
    aside = file.rename(model_path / "aside.json")
    error = await refusal(world.vllm.GetTokenizer(common_pb2.GetTokenizerRequest()))
    aside.rename(file)
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert f"{file}: No such file" in (error.details() or "")
    data, _ = await fetch_tokenizer(world)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert set(archive.namelist()) <= set(_FILES)


# Profiles; what they show is tested with real ledgers.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start_step": 5}, "start_step is not served"),
        ({"activities": ["CPU", "MEM"]}, "activities is not served"),
        ({"with_stack": True}, "with_stack is not served"),
        ({"record_shapes": True}, "record_shapes is not served"),
        ({"profile_by_stage": True}, "profile_by_stage is not served"),
        ({"activities": ["CPU", "GPU"]}, "there is no --profile-dir"),
    ],
)
async def test_a_profile_that_cannot_be_made_says_why(world: Any, fields: dict[str, Any], message: str) -> None:
    answer = await world.vllm.StartProfile(common_pb2.StartProfileRequest(**fields))
    assert not answer.success
    assert message in answer.message


async def test_stopping_no_profile_says_why(world: Any) -> None:
    answer = await world.vllm.StopProfile(common_pb2.StopProfileRequest())
    assert (answer.success, answer.message) == (
        False,
        "no profile is being made at frontend-0; StartProfile begins one",
    )


def test_every_field_of_a_profile_is_served_or_refused() -> None:
    known = {"output_dir", "num_steps", *vllm_operations._UNSERVED_PROFILE}
    assert {field.name for field in common_pb2.StartProfileRequest.DESCRIPTOR.fields} == known
