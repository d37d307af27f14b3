"""``python -m albireo.cli.gateway``: OpenAI's HTTP API before the front ends, served by the published package smg.

smg runs in this process. It knows nothing of a supervisor, so a thread asks its health routes and beats for it.
"""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import math
import os
import shlex
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from albireo.cli import ports, ready
from albireo.cli.client import Server
from albireo.config import flag, parse
from albireo.errors import ConfigError
from albireo.identity import check_token
from albireo.watchdog import BEAT_INTERVAL_S, Watchdog

_POLL_S = 0.1
_ASK_TIMEOUT_S = 2.0
_NEVER_S = 1 << 30
# A front end that died is back within a second or two; smg tries five times, each pause half as long again.
_RETRY_BACKOFF_MS = 200
# Where nobody listens: what is not on this machine is not looked for elsewhere.
_NO_HUB = "http://127.0.0.1:9"
# smg writes two lines per request at info.
_LOG_LEVELS = {"debug": "debug", "info": "warn", "warning": "warn", "error": "error"}


@dataclass(frozen=True)
class GatewayConfig:
    """Flags of ``python -m albireo.cli.gateway``."""

    target: str = flag("127.0.0.1:50051", "the front ends: host:port")
    host: str = flag("127.0.0.1", "address that HTTP clients connect to")
    port: int = flag(8000, "port that HTTP clients connect to")
    http_api_key_file: str = flag("", "key that HTTP clients must send as a bearer token; empty: none")
    metrics_port: int = flag(0, "Prometheus, on this port of 127.0.0.1; 0: none")
    recovery_timeout: float = flag(30.0, "seconds after which front ends that do not serve make the gateway unready")
    drain_timeout: float = flag(20.0, "seconds that running requests get to finish on SIGTERM")
    log_level: str = flag("info", "least level that is logged", ("debug", "info", "warning", "error"))


def main(argv: list[str] | None = None) -> int:
    watchdog = Watchdog()
    config = parse(GatewayConfig, "python -m albireo.cli.gateway", "Serves OpenAI's HTTP API; needs smg.", argv)
    os.environ["HF_ENDPOINT"] = _NO_HUB
    try:
        api_key = load_api_key(config.http_api_key_file)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    asyncio.run(_wait_for_engine(watchdog, config.target))
    threading.Thread(target=_report, args=(watchdog, config, api_key), name="watchdog", daemon=True).start()
    _run_smg(config, api_key)
    return 0


def check_installed() -> None:
    """Raises ConfigError where smg is missing."""
    if importlib.util.find_spec("smg") is None:
        raise ConfigError("--http needs the package smg: pip install 'albireo[gateway]'")


def load_api_key(file: str) -> str:
    """What HTTP clients must show; empty, without a file: nothing. Raises ConfigError where it cannot be used."""
    if not file:
        return ""
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
        check_token(key)
    except OSError as error:
        raise ConfigError(f"--http-api-key-file {file}: {error.strerror}") from error
    except ValueError as error:  # bytes that are no UTF-8 as well
        raise ConfigError(f"--http-api-key-file {file}: {error}") from error
    return key


def check_access(host: str, api_key_file: str) -> None:
    """Raises ConfigError where a gateway at ``host`` would let in whoever reaches it, and others may."""
    if not load_api_key(api_key_file) and not ports.is_loopback(host):
        raise ConfigError(
            f"--http-host {host}: beyond loopback only with --http-api-key-file, for who gets in may register engines"
        )


async def wait_until_ready(host: str, port: int, api_key: str = "") -> None:
    """Waits until the gateway there can answer requests. Endless: the caller watches the process."""
    while not await asyncio.to_thread(is_ready, host, port, api_key):  # noqa: ASYNC110  # the event is in another process
        await asyncio.sleep(_POLL_S)


def is_ready(host: str, port: int, api_key: str = "") -> bool:
    """Whether the gateway there has found an engine that serves, and has read its tokenizer, which comes later."""
    if _ask(host, port, "/readiness") is None:
        return False
    tokenizers = _ask(host, port, "/v1/tokenizers", api_key)
    return tokenizers is not None and bool(json.loads(tokenizers)["tokenizers"])


def example(model: str | None, host: str, port: int, api_key_file: str = "") -> str:
    """A request to the gateway there, as people type it."""
    body = json.dumps({"model": model, "prompt": "def fibonacci(n):", "max_tokens": 64})
    url = f"http://{ports.address(host, port)}/v1/completions"
    key = f' -H "authorization: Bearer $(cat {shlex.quote(api_key_file)})"' if api_key_file else ""
    return f"curl {url}{key} -H 'content-type: application/json' -d {shlex.quote(body)}"


async def _wait_for_engine(watchdog: Watchdog, target: str) -> None:
    """smg asks an engine what it serves once only, and would take one that loads its model for one without a name."""
    beating = asyncio.create_task(watchdog.keep_beating())
    await ready.wait_until_serving(Server(target))
    beating.cancel()


def _report(watchdog: Watchdog, config: GatewayConfig, api_key: str) -> None:
    """Beats as long as smg answers, and tells once that it is ready; never returns."""
    host, pause, told_ready = ports.reachable(config.host), threading.Event(), False
    while True:
        if _ask(host, config.port, "/liveness") is not None:
            watchdog.beat()
            if not told_ready and is_ready(host, config.port, api_key):
                watchdog.ready()
                told_ready = True
        pause.wait(BEAT_INTERVAL_S)


def _ask(host: str, port: int, path: str, api_key: str = "") -> bytes | None:
    """The body of an answer with status 200; None for any other, and for none."""
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=_ASK_TIMEOUT_S)) as connection:
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {api_key}"} if api_key else {})
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
    return body if response.status == http.client.OK else None


def _run_smg(config: GatewayConfig, api_key: str) -> None:
    """Serves until SIGTERM."""
    from smg.launch_router import launch_router
    from smg.router_args import RouterArgs

    launch_router(
        RouterArgs(
            host=config.host,
            port=config.port,
            worker_urls=[f"grpc://{config.target}"],
            policy="round_robin",
            api_key=api_key or None,
            worker_startup_check_interval=1,
            # Front ends say themselves what they cannot take. With nobody else to send a request to, what smg would
            # hold back after errors makes an outage longer.
            disable_circuit_breaker=True,
            worker_overload_protection=False,
            worker_wedge_secs=_NEVER_S,
            health_check_interval_secs=1,
            health_success_threshold=1,
            health_failure_threshold=math.ceil(config.recovery_timeout),
            retry_initial_backoff_ms=_RETRY_BACKOFF_MS,
            shutdown_grace_period_secs=math.ceil(config.drain_timeout),
            prometheus_host="127.0.0.1",
            prometheus_port=config.metrics_port or None,
            log_level=_LOG_LEVELS[config.log_level],
            log_json=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
