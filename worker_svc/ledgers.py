"""The ledgers of a group's ranks: a file per rank in the group's directory, which the leader serves and summarises."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc import aio

from albireo.arrays import Float64Array, Int64Array
from albireo.ledger import RANK_COLUMNS, Ledger, make_page, read_file
from albireo.metrics import LedgerHistograms
from albireo.v1 import ledger_pb2

SERVICE_NAME = "albireo.v1.Ledger"

# A gap counts as idle time of the device where the next plan was there by then; later ones found nothing to do.
_SAME_BUSY_PERIOD_NS = 50_000_000

_RECEIVED, _PREPARED, _LAUNCHED, _START, _END, _FORWARD, _SAMPLE = (
    RANK_COLUMNS.index(name)
    for name in (
        "received_at_ns",
        "prepared_at_ns",
        "launched_at_ns",
        "start_at_ns",
        "end_at_ns",
        "forward_ns",
        "sample_ns",
    )
)


def ledger_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"ledger-{rank}"


class GroupLedgers:
    """What the leader knows of all ranks' steps. The servicer of albireo.v1.Ledger.

    Args:
        own: the leader's.
    """

    def __init__(self, run_dir: Path, tp_size: int, own: Ledger) -> None:
        self._run_dir = run_dir
        self._tp_size = tp_size
        self._own = own
        self._histograms = make_histograms(own)

    def handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Read": grpc.unary_unary_rpc_method_handler(
                    self.read,
                    request_deserializer=ledger_pb2.ReadLedgerRequest.FromString,
                    response_serializer=ledger_pb2.LedgerPages.SerializeToString,
                )
            },
        )

    async def read(
        self, request: ledger_pb2.ReadLedgerRequest, _context: "aio.ServicerContext[Any, Any]"
    ) -> ledger_pb2.LedgerPages:
        pages = await asyncio.to_thread(self.pages, request.num_rows)  # megabytes: the plan stream does not wait for it
        return ledger_pb2.LedgerPages(pages=pages)

    def pages(self, num_rows: int = 0) -> list[ledger_pb2.LedgerPage]:
        """A page of each rank, in order; one whose file cannot be read, because it has not started, is left out."""
        pages = [self._own.page(num_rows)]
        for rank in range(1, self._tp_size):
            try:
                rows = read_file(ledger_path(self._run_dir, rank), RANK_COLUMNS, num_rows)
            except (OSError, ValueError):
                continue
            pages.append(make_page(f"rank-{rank}", RANK_COLUMNS, rows))
        return pages

    async def keep_folding(self, interval_s: float = 1.0) -> None:
        """Keeps the histograms up with the ledger, whose ring would wrap unseen where nobody scrapes."""
        while True:
            await asyncio.sleep(interval_s)
            self._histograms.fold()


def make_histograms(ledger: Ledger) -> LedgerHistograms:
    """Histograms of a rank's steps."""
    return LedgerHistograms(
        ledger,
        {
            "albireo_step_prepare_seconds": ("T2: from a plan's arrival until its inputs are ready", _prepare_seconds),
            "albireo_step_forward_seconds": ("T3: forward, collectives included", lambda rows: rows[:, _FORWARD] / 1e9),
            "albireo_step_sample_seconds": ("T4: sampling", lambda rows: rows[:, _SAMPLE] / 1e9),
            "albireo_step_launch_delay_seconds": (
                "From a plan's arrival until the device is given its step",
                lambda rows: (rows[:, _LAUNCHED] - rows[:, _RECEIVED]) / 1e9,
            ),
        },
        {
            "albireo_step_idle_seconds": (
                "Gap of the device before a step, where it follows on another",
                _idle_seconds,
            )
        },
    )


def _prepare_seconds(rows: Int64Array) -> Float64Array:
    return (rows[:, _PREPARED] - rows[:, _RECEIVED]) / 1e9


def _idle_seconds(before: Int64Array, rows: Int64Array) -> Float64Array:
    """Of the steps that belong to the same busy period as the one before."""
    last_end, start = before[:, _END], rows[:, _START]
    follows = (last_end > 0) & (start > 0) & (rows[:, _RECEIVED] < last_end + _SAME_BUSY_PERIOD_NS)
    seconds: Float64Array = np.maximum(0, start - last_end)[follows] / 1e9
    return seconds
