"""The KV store that ``--kv-store`` names, as a rank reaches it, and what blocks of its model are called there."""

import asyncio
import threading
from pathlib import Path

import xxhash

from albireo.kv.arena import Arena, Lease, LocalArena
from albireo.kv.fingerprint import fingerprint_of
from albireo.kv.remote import RemoteArena
from albireo.security import Security
from albireo.transfers import KvLease
from worker_svc.engine import BLOCK_SIZE, EngineConfig, EngineInfo
from worker_svc.transfers import Attach, KvStore

_READ_BYTES = 8 << 20
# Of one block; less than a rank has to get out of a broken group.
_REMOTE_TIMEOUT_S = 2.0
_LOCAL = "unix:"
# Of a core, by device: steps on the same cores take longer by as much; a modelled device leaves little but this
# interpreter to quarrel about, a GPU not even that.
_SHARES = {"cpu": 0.05, "modelled": 0.25}


def make_kv_store(
    address: str,
    config: EngineConfig,
    info: EngineInfo,
    security: Security,
    loop: asyncio.AbstractEventLoop | None,
) -> KvStore:
    """Reads the model's files, at some GB/s.

    Args:
        address: unix:path of the arena's socket, or host:port of the store.
        loop: this process's only one with gRPC, in another thread; None: there is none.
    """
    share = _SHARES.get(info.device, 1.0)
    return KvStore(fingerprint(config, info), info.kv, attach_to(address, security, loop), share)


def attach_to(address: str, security: Security, loop: asyncio.AbstractEventLoop | None) -> Attach:
    """How a rank attaches to an arena there."""
    if address.startswith(_LOCAL):
        return _local(address.removeprefix(_LOCAL))
    return _remote(address, security, loop or _run_loop())


def fingerprint(config: EngineConfig, info: EngineInfo) -> bytes:
    """32 bytes, of all that the bytes of a block depend on; the TP degree is not among it."""
    return fingerprint_of(
        {
            "model": model_digest(config.model_path),
            "dtype": info.dtype,
            "quantize": config.quantize,
            "layout": info.kv.layout,
            "layers_per_part": info.kv.layers_per_part,
            "block_size": BLOCK_SIZE,
        }
    )


def model_digest(path: Path) -> str:
    """Of a model's configuration and all of its weights: any other weights make other blocks."""
    digest = xxhash.xxh3_128()
    for file in (path / "config.json", *sorted(path.glob("*.safetensors"))):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _local(path: str) -> Attach:
    def attach(lease: KvLease) -> Arena:
        return LocalArena.attach(Lease(lease.arena_id, path, lease.arena_bytes, lease.lease))

    return attach


def _remote(target: str, security: Security, loop: asyncio.AbstractEventLoop) -> Attach:
    def attach(lease: KvLease) -> Arena:
        return RemoteArena(target, lease.lease, loop, security, _REMOTE_TIMEOUT_S)

    return attach


def _run_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="kv-io", daemon=True).start()
    return loop
