"""Traces of requests, from the real services to a real collector."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from otlp_collector import Collector, ReceivedSpan
from services import scheduler, worker_group

pytestmark = pytest.mark.e2e

CLIENT_SPAN_ID = "b7ad6b7169203331"
POOL_GIB = 20 * 32 * 4 * 8 / 2**30  # 20 blocks, where the longest sequence takes 16
CLOCK_SLACK_NS = 20_000_000  # each process takes its own distance to the wall clock


@dataclass(frozen=True)
class Traced:
    """Services that are traced, and who gets the traces."""

    stub: rpc.GenerationStub
    collector: Collector
    planner_log: Path


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[Traced]:
    path, collector = tmp_path_factory.mktemp("traced"), Collector()
    limits = {"kv_cache_gib": POOL_GIB, "max_num_seqs": 8}
    otlp = {"otlp_endpoint": collector.address}
    with (
        contextlib.closing(collector),
        worker_group(path / "g", stub_model, engine="stub", tp=2, **limits, **otlp) as group,
        scheduler(path / "s", stub_model, group, **otlp) as target,
        grpc.insecure_channel(target) as channel,
    ):
        yield Traced(rpc.GenerationStub(channel), collector, path / "s" / "logs" / "planner.log")


def context(trace_id: str, flags: str = "01") -> tuple[str, str]:
    return "traceparent", f"00-{trace_id}-{CLIENT_SPAN_ID}-{flags}"


def spans_of(traced: Traced, trace_id: str, num: int) -> list[ReceivedSpan]:
    """Of one trace, once so many of them are there."""
    spans = traced.collector.wait_for(lambda spans: num_of(spans, trace_id) >= num)
    return [span for span in spans if span.proto.trace_id.hex() == trace_id]


def num_of(spans: list[ReceivedSpan], trace_id: str) -> int:
    return sum(span.proto.trace_id.hex() == trace_id for span in spans)


def ask(stub: rpc.GenerationStub, max_tokens: int, *metadata: tuple[str, str]) -> pb.Finish:
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(3, 100)), sampling_params=sampling)
    *_, last = stub.Generate(request, metadata=metadata, timeout=60)
    assert last.finish.usage.completion_tokens == max_tokens
    return last.finish


def by_name(spans: list[ReceivedSpan]) -> dict[str, ReceivedSpan]:
    assert len({span.name for span in spans}) == len(spans), [span.name for span in spans]
    return {span.name: span for span in spans}


def test_a_traced_request_is_one_tree_of_spans(traced: Traced, stub_model: Path) -> None:
    """The client's context is the root; what carries none, or one that is not sampled, leaves nothing."""
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    ask(traced.stub, 5)
    ask(traced.stub, 5, context("1" * 32, flags="00"))
    finish = ask(traced.stub, 30, context(trace_id), ("tracestate", "vendor=opaque"))
    ask(traced.stub, 5)
    ask(traced.stub, 5, context("2" * 32))
    spans = by_name(spans_of(traced, trace_id, 5))
    spans_of(traced, "2" * 32, 5)  # what was asked for before it has come, too
    assert {span.proto.trace_id.hex() for span in traced.collector.spans} == {trace_id, "2" * 32}
    generate = spans["generate"]
    assert {name: span.process for name, span in spans.items()} == {
        "generate": "frontend-0",
        "queue": "planner",
        "prefill": "planner",
        "decode": "planner",
        "device": "rank-0",
    }
    assert generate.proto.parent_span_id.hex() == CLIENT_SPAN_ID
    assert generate.proto.kind == generate.proto.SPAN_KIND_SERVER
    assert generate.proto.trace_state == "vendor=opaque"
    children = [spans[name].proto for name in ("queue", "prefill", "decode", "device")]
    assert {child.parent_span_id for child in children} == {generate.proto.span_id}
    check_times(spans, finish)
    expected = {
        "gen_ai.request.model": stub_model.name,
        "gen_ai.usage.input_tokens": 97,
        "gen_ai.usage.output_tokens": 30,
        "gen_ai.response.finish_reasons": ["length"],
        "albireo.cached_tokens": 96,
    }
    assert {name: generate.attributes[name] for name in expected} == expected
    assert not any("tenant" in key for key in generate.attributes)
    steps = spans["device"].attributes
    assert steps["albireo.last_step_id"] - steps["albireo.first_step_id"] >= 29


def check_times(spans: dict[str, ReceivedSpan], finish: pb.Finish) -> None:
    """What the planner does follows on from each other, within the request; what the device does, within that."""
    queue, prefill, decode = (spans[name].proto for name in ("queue", "prefill", "decode"))
    assert queue.start_time_unix_nano <= queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano < decode.end_time_unix_nano
    for span, seconds in ((queue, finish.timings.queue_s), (prefill, finish.timings.prefill_s)):
        assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(seconds, abs=1e-6)
    generate, device = spans["generate"].proto, spans["device"].proto
    assert generate.start_time_unix_nano <= queue.start_time_unix_nano + CLOCK_SLACK_NS
    assert decode.end_time_unix_nano <= generate.end_time_unix_nano + CLOCK_SLACK_NS
    assert prefill.start_time_unix_nano <= device.start_time_unix_nano + CLOCK_SLACK_NS
    assert device.start_time_unix_nano < prefill.end_time_unix_nano + CLOCK_SLACK_NS
    assert device.end_time_unix_nano <= generate.end_time_unix_nano + CLOCK_SLACK_NS
    assert abs(generate.start_time_unix_nano - time.time_ns()) < 60e9


def test_a_request_that_is_refused_is_an_error(traced: Traced) -> None:
    trace_id = "6" * 32
    request = pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(top_p=7))
    with pytest.raises(grpc.RpcError, match="top_p"):
        list(traced.stub.Generate(request, metadata=[context(trace_id)]))
    (span,) = spans_of(traced, trace_id, 1)
    assert (span.name, span.attributes["error.type"]) == ("generate", "invalid_argument")
    assert span.proto.status.code == span.proto.status.STATUS_CODE_ERROR


def test_a_preempted_sequence_has_an_event_and_one_more_stay_on_the_device(traced: Traced) -> None:
    """Four sequences of 12 blocks each share 20."""
    trace_id = "3" * 32
    with ThreadPoolExecutor(4) as pool:
        finishes = list(pool.map(lambda _: ask(traced.stub, 280, context(trace_id)), range(4)))
    num_preemptions = sum(finish.timings.num_preemptions for finish in finishes)
    assert num_preemptions > 0
    num_spans = 4 * len(("generate", "queue", "prefill", "decode", "device")) + num_preemptions
    spans = spans_of(traced, trace_id, num_spans)
    events = [event.name for span in spans if span.process == "planner" for event in span.proto.events]
    assert events == ["preempted"] * num_preemptions
    assert sum(span.name == "device" for span in spans) == 4 + num_preemptions


def test_a_collector_that_is_away_disturbs_nobody(traced: Traced) -> None:
    """Requests run as ever, a line in the log says why there are no spans, and later ones come again."""
    with traced.collector.away():
        ask(traced.stub, 5, context("4" * 32))
        deadline = time.monotonic() + 15
        while "UNAVAILABLE" not in traced.planner_log.read_text():
            assert time.monotonic() < deadline
            ask(traced.stub, 5, context("4" * 32))
    ask(traced.stub, 5, context("5" * 32))
    assert spans_of(traced, "5" * 32, 5)
