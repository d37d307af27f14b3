"""Following the prefix cache over real sockets: whatever is lost on the way, a front end knows what can be found."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from albireo.cache_events import Cached, Change, Reset, apply_change

pytestmark = pytest.mark.timeout(60)


class Mirror:
    """What a link has told."""

    def __init__(self, link: Any) -> None:
        self.blocks: Cached = {}
        self.num_resets = 0
        self._news = asyncio.Event()
        link.on_cache_changes = self._see

    def _see(self, changes: Sequence[Change]) -> None:
        for change in changes:
            apply_change(self.blocks, change)
            self.num_resets += isinstance(change, Reset)
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self._news.clear()
                await self._news.wait()


def cached(world: Any) -> Cached:
    return world.planner._state.pool._contents


async def run(world: Any, *prompts: list[int]) -> None:
    await world.exact(*[(prompt, world.submit(prompt)) for prompt in prompts])


def prompts(num: int) -> list[list[int]]:
    return [[2 + i, *range(10, 25)] for i in range(num)]


async def test_a_front_end_that_begins_to_follow_is_told_what_is_cached_and_what_changes(world: Any) -> None:
    """Evictions included: the pool is small."""
    await world.start()
    mirror = Mirror(world.link)
    await run(world, *prompts(2))
    assert not mirror.blocks, "nobody follows yet"
    world.link.follow_cache(True)
    await mirror.until(lambda: len(mirror.blocks) >= 8)
    assert mirror.blocks == cached(world)
    await run(world, *prompts(20))
    await mirror.until(lambda: mirror.blocks == cached(world))
    assert world.planner._state.pool.num_evicted > 0
    assert mirror.num_resets == 1


async def test_following_ends_and_begins_again_with_a_reset(world: Any) -> None:
    """Also within one message to the planner."""
    await world.start()
    mirror = Mirror(world.link)
    world.link.follow_cache(True)
    await run(world, *prompts(1))
    await mirror.until(lambda: mirror.blocks == cached(world))
    world.link.follow_cache(False)
    await run(world, *prompts(2))
    assert not world.planner._state.pool.followers
    assert mirror.blocks != cached(world)
    world.link.follow_cache(True)
    world.link.follow_cache(False)
    world.link.follow_cache(True)
    await mirror.until(lambda: mirror.num_resets == 2 and mirror.blocks == cached(world))


async def test_a_lost_group_has_nothing_cached(world: Any) -> None:
    await world.start()
    mirror = Mirror(world.link)
    world.link.follow_cache(True)
    await run(world, *prompts(2))
    world.leader.break_stream()
    await mirror.until(lambda: mirror.num_resets > 1)
    await run(world, *prompts(3))
    await mirror.until(lambda: mirror.blocks == cached(world))


async def test_a_front_end_that_lost_its_stream_goes_on_following(world: Any) -> None:
    await world.start()
    mirror = Mirror(world.link)
    world.link.follow_cache(True)
    await run(world, *prompts(2))
    (attached,) = world.planner.frontends._attached.values()
    attached.gone.set()
    attached.outbox.wake()
    await mirror.until(lambda: mirror.num_resets == 2)
    await run(world, *prompts(3))
    await mirror.until(lambda: mirror.blocks == cached(world))
    assert len(world.planner._state.pool.followers) == 1


async def test_figures_tell_what_waits_and_how_fast_tokens_come(world: Any) -> None:
    """And what the prefix cache has found so far."""
    await world.start()
    world.leader.open.clear()
    running = [(prompt, world.submit(prompt)) for prompt in prompts(6)]
    arrived = asyncio.Event()
    world.link.on_load = arrived.set

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                arrived.clear()
                await arrived.wait()

    load = lambda: world.link.load  # noqa: E731  # the latest
    await until(lambda: load().num_running > 0)
    assert load().num_waiting == 6 - load().num_running > 0
    assert load().num_waiting_tokens == 16 * load().num_waiting
    world.leader.open.set()
    await world.exact(*running)
    await until(lambda: load().tokens_per_s > 0 and load().num_waiting_tokens == 0)
    await run(world, *prompts(6))
    await until(lambda: load().cache_hit_rate > 0)
    assert load().cache_hit_rate == pytest.approx(
        world.planner.counts.num_cached_tokens / world.planner.counts.num_prompt_tokens
    )
