"""What a request's span tells, by OpenTelemetry's conventions for generative AI where they fit. Nothing of the prompt,
the text, or whose they are."""

from collections.abc import Sequence

from albireo.tracing import Attributes
from albireo.v1 import generation_pb2
from scheduler_svc.frontend.completion import Completion
from scheduler_svc.frontend.validation import GenerationRequest

SPAN_NAME = "generate"


def request_attributes(request: GenerationRequest, model: str) -> Attributes:
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.choice.count": request.n,
        "gen_ai.usage.input_tokens": len(request.token_ids),
    }


def completion_attributes(completions: Sequence[Completion]) -> Attributes:
    """Of a request that is over; of completions that did not end there are tokens and no reason."""
    return {
        "gen_ai.usage.output_tokens": sum(map(_num_output_tokens, completions)),
        "gen_ai.response.finish_reasons": [_reason(each.finish.reason) for each in completions if each.finish],
        "albireo.cached_tokens": completions[0].num_cached_tokens,
    }


def _num_output_tokens(completion: Completion) -> int:
    return completion.num_tokens if completion.finish is None else completion.finish.num_output_tokens


def _reason(reason: generation_pb2.FinishReason) -> str:
    return generation_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
