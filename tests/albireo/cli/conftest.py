"""Fixtures for the command line's tests."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from albireo.v1 import generation_pb2_grpc
from fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    grpc_server = grpc.server(ThreadPoolExecutor(max_workers=64))
    generation_pb2_grpc.add_GenerationServicer_to_server(fake, grpc_server)
    fake.target = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    yield fake
    grpc_server.stop(grace=None).wait()


@pytest.fixture
def dead_target() -> str:
    """An address where nothing listens."""
    return "127.0.0.1:1"
