"""A front end without clients: it attaches to the planner, counts tokens, and submits a sequence whenever one ends.

What it costs is what a planner's stream costs its front end before any client is served.
"""

import asyncio

import numpy as np

from albireo.arrays import pack_int32
from albireo.errors import AlbireoError, GroupUnavailable
from albireo.logprobs import Logprobs
from albireo.rpc import listen, make_server
from albireo.v1 import frontend_pb2, ledger_pb2_grpc, plan_pb2
from albireo.watchdog import Watchdog
from scheduler_svc.frontend.ledger import LedgerServicer
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.load.config import LoadConfig
from scheduler_svc.load.record import Record

_SEED = 0  # no two prompts of a run are the same


class InternalLoad:
    """Runs ``config.streams`` sequences at a time."""

    def __init__(self, config: LoadConfig, record: Record) -> None:
        self._config = config
        self._record = record
        self._link = PlannerLink(config.planner, config.name)
        self._rng = np.random.default_rng(_SEED)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, watchdog: Watchdog) -> None:
        """Until it is cancelled. Raises AlbireoError when a sequence or the link fails."""
        await self._link.connect(self._config.startup_timeout)
        server = make_server(for_peers=True)
        ledger_pb2_grpc.add_LedgerServicer_to_server(LedgerServicer(self._link), server)
        if self._config.listen:
            listen(server, self._config.listen)
        await server.start()
        running = asyncio.create_task(self._link.run())
        try:
            for stream in range(self._config.streams):
                self._submit(_Client(self), self._config.first_output_tokens(stream))
            watchdog.ready()
            await asyncio.wait({running, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            for each in (running, self._failed):
                if each.done():
                    each.result()  # raises what it met
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await self._link.close()
            await server.stop(grace=None)

    def took(self, num_tokens: int) -> None:
        self._record.took(num_tokens)

    def ended(self, client: "_Client") -> None:
        self._record.ended()
        self._submit(client, self._config.output_tokens)

    def failed(self, error: AlbireoError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    def _submit(self, client: "_Client", num_tokens: int) -> None:
        assert self._link.group is not None
        vocab_size = self._link.group.vocab_size
        prompt = self._rng.integers(vocab_size, size=self._config.prompt_tokens, dtype=np.int32)
        submit = frontend_pb2.Submit(
            token_ids=pack_int32(prompt),
            max_tokens=num_tokens,
            sampling=plan_pb2.Sampling(top_p=1.0),
            ignore_eos=True,
        )
        self._link.submit(submit, client)


class _Client:
    """One of the streams; a `Receiver` of one sequence after another."""

    __slots__ = ("_load",)

    def __init__(self, load: InternalLoad) -> None:
        self._load = load

    def start(self, num_cached_tokens: int) -> None:
        pass

    def score(self, logprobs: Logprobs) -> None:
        pass

    def receive(self, token_ids: list[int], now: float, logprobs: Logprobs | None) -> None:
        self._load.took(len(token_ids))

    def end(self, ended: frontend_pb2.Ended) -> None:
        if ended.HasField("refusal"):
            self._load.failed(GroupUnavailable(f"the planner ended a sequence: {ended.refusal.message}"))
        else:
            self._load.ended(self)

    def fail(self, error: AlbireoError) -> None:
        self._load.failed(error)
