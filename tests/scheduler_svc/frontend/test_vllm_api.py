"""vllm.grpc.engine.VllmEngine, from a real client to a scripted planner."""

import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2 as pb

from albireo.arrays import unpack_float32, unpack_int32
from albireo.v1.generation_pb2 import FINISH_REASON_ABORT, FINISH_REASON_STOP
from scheduler_svc.frontend import vllm_fields
from scheduler_svc.frontend.text import Detokenizer

Ids = Callable[..., list[int]]
pytestmark = pytest.mark.timeout(30)


def request(prompt: Any = (1, 2, 3), stream: bool = False, fields: Any = None, **params: Any) -> Any:
    given = pb.GenerateRequest(
        request_id="r", stream=stream, sampling_params=pb.SamplingParams(**params), **(fields or {})
    )
    if isinstance(prompt, str):
        given.text = prompt
    else:
        given.tokenized.CopyFrom(pb.TokenizedInput(input_ids=prompt))
    return given


async def failure(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_a_stream_has_chunks_of_new_tokens_and_an_end(world: Any, ids: Ids) -> None:
    """completion_tokens of a chunk count the chunk, of the end the whole; the end repeats no tokens."""
    call = world.vllm.Generate(request(stream=True, max_tokens=2))
    submit = await world.planner.submits.get()
    await world.planner.send((submit.sequence_id, ids("Hello")[0]))
    responses = [await anext(aiter(call))]
    await world.planner.run(submit.sequence_id, ids(" world"))
    responses += [response async for response in call]
    chunks = [response.chunk for response in responses[:-1]]
    assert [list(chunk.token_ids) for chunk in chunks] == [ids("Hello"), ids(" world")]
    assert [(chunk.prompt_tokens, chunk.completion_tokens) for chunk in chunks] == [(3, 1), (3, 1)]
    end = responses[-1].complete
    assert (list(end.output_ids), end.finish_reason, end.prompt_tokens, end.completion_tokens) == ([], "length", 3, 2)


async def test_an_answer_in_full_has_one_complete_per_index(world: Any, ids: Ids) -> None:
    """Nothing but completes, with all tokens."""
    call = world.vllm.Generate(request(n=2))
    submits = [await world.planner.submits.get() for _ in range(2)]
    await world.planner.run(submits[1].sequence_id, ids("a", "b"))
    await world.planner.run(submits[0].sequence_id, ids("Hello", "ab", "b"))
    responses = [response async for response in call]
    assert [response.WhichOneof("response") for response in responses] == ["complete", "complete"]
    assert [(r.complete.index, list(r.complete.output_ids)) for r in responses] == [
        (0, ids("Hello", "ab", "b")),
        (1, ids("a", "b")),
    ]
    assert [response.complete.completion_tokens for response in responses] == [3, 2]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_token_is_named_and_left_out(world: Any, ids: Ids, stream: bool) -> None:
    call = world.vllm.Generate(request(stream=stream))
    submit = await world.planner.submits.get()
    eos = ids("<|eos|>")[0]
    await world.planner.run(submit.sequence_id, ids("a", "<|eos|>"), reason=FINISH_REASON_STOP, matched_token_id=eos)
    responses = [response async for response in call]
    sent = [i for r in responses for i in (*r.chunk.token_ids, *r.complete.output_ids)]
    end = responses[-1].complete
    assert sent == ids("a")
    assert (end.finish_reason, end.matched_token_id, end.completion_tokens) == ("stop", eos, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_sequence(world: Any, ids: Ids, stream: bool) -> None:
    call = world.vllm.Generate(request(stream=stream, stop=["lo wo"]))
    submit = await world.planner.submits.get()
    for token_id in ids("Hello", " world", "a"):
        await world.planner.send((submit.sequence_id, token_id))
    responses = [response async for response in call]
    truncate = await world.planner.truncates.get()
    assert truncate.num_kept == 2
    sent = [i for r in responses for i in (*r.chunk.token_ids, *r.complete.output_ids)]
    end = responses[-1].complete
    assert sent == ids("Hello", " world")
    assert (end.finish_reason, end.matched_stop_str, end.completion_tokens) == ("stop", "lo wo", 2)


async def test_text_prompts_are_tokenised(world: Any, ids: Ids) -> None:
    call = world.vllm.Generate(request(prompt="ab"))
    submit = await world.planner.submits.get()
    assert unpack_int32(submit.token_ids).tolist() == ids("a", "b")
    call.cancel()


async def test_scalars_that_are_zero_count_as_unset(world: Any) -> None:
    """top_p and n 1, top_k all; absent temperature and max_tokens as the model and the context say."""
    call = world.vllm.Generate(request())
    submit = await world.planner.submits.get()
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 1, 0)
    assert submit.max_tokens == 61
    assert world.planner.submits.empty()
    call.cancel()


async def test_sampling_parameters_reach_the_planner(world: Any) -> None:
    """A negative seed is the same 64-bit number every time."""
    params = {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "seed": -2, "min_tokens": 1, "ignore_eos": True}
    call = world.vllm.Generate(request(max_tokens=4, stop_token_ids=[5], repetition_penalty=1.0, **params))
    submit = await world.planner.submits.get()
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 3, 2**64 - 2)
    assert (submit.max_tokens, sampling.min_tokens, submit.ignore_eos) == (4, 1, True)
    assert unpack_int32(submit.stop_token_ids).tolist() == [5]
    call.cancel()


async def test_parameters_of_logits_reach_the_planner(world: Any) -> None:
    """A repetition_penalty of 0 is an absent one."""
    params = {"min_p": 0.25, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5}
    call = world.vllm.Generate(request(**params, logit_bias={5: 0.5, 3: -1.0}, logprobs=4))
    sampling = (await world.planner.submits.get()).sampling
    assert {name: getattr(sampling, name) for name in params} == params
    assert unpack_int32(sampling.bias_token_ids).tolist() == [3, 5]
    assert unpack_float32(sampling.biases).tolist() == [-1, 0.5]
    assert sampling.num_logprobs == 4
    call.cancel()
    call = world.vllm.Generate(request())
    sampling = (await world.planner.submits.get()).sampling
    assert (sampling.repetition_penalty, sampling.HasField("num_logprobs")) == (1, False)
    call.cancel()


@pytest.mark.parametrize("num_top", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_come_with_the_token_ids(world: Any, ids: Ids, stream: bool, num_top: int) -> None:
    """Parallel arrays; the likeliest ones only where they are asked for. The end of a stream repeats none."""
    call = world.vllm.Generate(request(stream=stream, logprobs=num_top, stop=["lo wo"]))
    submit = await world.planner.submits.get()
    await world.planner.send_logprobs(submit.sequence_id, ids("Hello", " world", "a"), num_top)
    responses = [response async for response in call]
    given = (
        [r.chunk.output_logprobs for r in responses if r.HasField("chunk")]
        if stream
        else [responses[-1].complete.output_logprobs]
    )
    assert [i for each in given for i in each.token_ids] == ids("Hello", " world")
    assert [value for each in given for value in each.token_logprobs] == [-1, -2]
    tops = [top for each in given for top in each.top_logprobs]
    assert [list(top.token_ids) for top in tops] == [[10, 11]] * 2 * bool(num_top)
    assert [list(top.values) for top in tops] == [[-0.5, -0.75]] * 2 * bool(num_top)
    assert responses[-1].complete.HasField("output_logprobs") is not stream


async def test_abort_ends_the_stream(world: Any, ids: Ids) -> None:
    call = world.vllm.Generate(request(stream=True))
    submit = await world.planner.submits.get()
    await world.vllm.Abort(pb.AbortRequest(request_ids=["r"]))
    assert await world.planner.aborts.get() == "r"
    await world.planner.run(submit.sequence_id, ids("a"), reason=FINISH_REASON_ABORT)
    responses = [response async for response in call]
    assert responses[-1].complete.finish_reason == "abort"


async def test_the_tenant_is_the_metadatas(world: Any) -> None:
    """Absent, it is the default one, which has no name."""
    for metadata, tenant in (((("x-tenant", "a team"),), "a team"), ((), "")):
        call = world.vllm.Generate(request(), metadata=metadata)
        assert (await world.planner.submits.get()).tenant == tenant
        call.cancel()
    error = await failure(world.vllm.Generate(request(), metadata=(("x-tenant", "x" * 129),)))
    assert (error.code(), error.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "x-tenant has 129 characters; 128 at most",
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_the_call_cancels_its_sequences(world: Any, stream: bool) -> None:
    call = world.vllm.Generate(request(stream=stream, n=2))
    submits = [await world.planner.submits.get() for _ in range(2)]
    call.cancel()
    assert [await world.planner.cancels.get() for _ in range(2)] == [submit.sequence_id for submit in submits]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("grammar_from_first_token", {"grammar_from_first_token": True}),
        ("json_schema", {"json_schema": "{}"}),
        ("regex", {"regex": "a"}),
        ("grammar", {"grammar": "root ::= x"}),
        ("structural_tag", {"structural_tag": "{}"}),
        ("json_object", {"json_object": True}),
        ("choice", {"choice": pb.ChoiceConstraint(choices=["a"])}),
    ],
)
async def test_sampling_parameters_that_are_not_served_are_named(world: Any, name: str, params: Any) -> None:
    error = await failure(world.vllm.Generate(request(**params)))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert f"sampling_params.{name} is not served" in (error.details() or "")
    assert world.planner.submits.empty()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_transfer_params", pb.KvTransferParams()),
        ("kv_transfer_params_json", "{}"),
        ("mm_inputs", pb.MultimodalInputs()),
        ("extra_mm_inputs", [pb.MultimodalInputs()]),
        ("media_refs", pb.MediaRefs()),
        ("data_parallel_rank", 1),
    ],
)
async def test_request_fields_that_are_not_served_are_named(world: Any, name: str, value: Any) -> None:
    error = await failure(world.vllm.Generate(request(fields={name: value})))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert f"{name} is not served" in (error.details() or "")


# What a field of a request does. A field that a newer version of the messages brings must be put somewhere.
SERVED = {
    "GenerateRequest": "request_id tokenized text sampling_params stream",
    "SamplingParams": "temperature top_p top_k max_tokens min_tokens stop stop_token_ids skip_special_tokens ignore_eos"
    " n seed include_stop_str_in_output min_p frequency_penalty presence_penalty repetition_penalty logprobs"
    " logit_bias prompt_logprobs truncate_prompt_tokens",
    "TokenizedInput": "input_ids",
    "AbortRequest": "request_ids",
}
CONSTRAINTS = "json_schema regex grammar structural_tag json_object choice"
SHAPES_TEXT_ONLY = {"SamplingParams": "spaces_between_special_tokens", "TokenizedInput": "original_text"}


@pytest.mark.parametrize("name", SERVED)
def test_every_field_of_a_request_is_served_or_refused_or_shapes_text_only(name: str) -> None:
    refused = {
        "GenerateRequest": {*vllm_fields._UNSERVED},
        "SamplingParams": {*vllm_fields._UNSERVED_SAMPLING, *CONSTRAINTS.split()},
    }
    known = [*SERVED[name].split(), *refused.get(name, ()), *SHAPES_TEXT_ONLY.get(name, "").split()]
    assert sorted(known) == sorted(field.name for field in getattr(pb, name).DESCRIPTOR.fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (pb.GenerateRequest(), "the request has no prompt"),
        (request(prompt=[]), "tokenized.input_ids is empty"),
        (request(prompt=range(64)), "tokenized.input_ids has 64 tokens; the context of 64 tokens takes 63"),
        (request(max_tokens=0), "sampling_params.max_tokens is 0"),
        (request(temperature=-1.0), "sampling_params.temperature is -1"),
        (request(n=200), "sampling_params.n is 200"),
        (request(logprobs=-1), "sampling_params.logprobs is -1"),
        (request(logit_bias={-3: 1.0}), "sampling_params.logit_bias names token -3"),
        (request(min_p=2.0), "sampling_params.min_p is 2"),
        (request(fields={"data_parallel_rank": -1}), "data_parallel_rank is -1"),
    ],
)
async def test_a_wrong_request_is_refused(world: Any, given: Any, message: str) -> None:
    error = await failure(world.vllm.Generate(given))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in (error.details() or "")


async def test_nothing_is_detokenised_without_stop_strings(
    world: Any, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise AssertionError("detokenised")

    monkeypatch.setattr(Detokenizer, "open", refuse)
    call = world.vllm.Generate(request())
    submit = await world.planner.submits.get()
    await world.planner.run(submit.sequence_id, ids("a"))
    assert [list(response.complete.output_ids) async for response in call] == [ids("a")]


async def test_information_for_gateways(world: Any, model_path: Any, ids: Ids) -> None:
    health = await world.vllm.HealthCheck(pb.HealthCheckRequest())
    model = await world.vllm.GetModelInfo(pb.GetModelInfoRequest())
    server = await world.vllm.GetServerInfo(pb.GetServerInfoRequest())
    assert health.healthy
    assert (model.served_model_name, model.tokenizer_path, model.is_generation) == ("tiny", str(model_path), True)
    assert (model.max_context_length, model.max_req_input_len) == (64, 63)
    assert list(model.eos_token_ids) == ids("<|eos|>")
    assert json.loads(model.default_sampling_params_json) == {"temperature": 0.5, "top_k": 7}
    assert (server.max_num_seqs, server.data_parallel_size, server.block_size) == (8, 1, 32)
