"""Messages of the Attach stream: what came, by sequence; what goes, in messages of a bounded size.

All functions are pure. Those that read raise ValueError for a message that cannot be read.
"""

from collections.abc import Iterable

from albireo.arrays import Int32Array, UInt64Array, unpack_int32, unpack_uint64
from albireo.logprobs import Logprobs, decode, decode_whole
from albireo.v1 import frontend_pb2
from scheduler_svc.frontend.logprobs import split_logprobs

MAX_SUBMITS_BYTES = 16 << 20  # of one message; it has more only where a single submit does


def started_in(message: frontend_pb2.PlannerMessage) -> list[tuple[int, int]]:
    """The sequences that began to run, each with how many tokens of its prompt were cached."""
    if not (message.started_sequence_ids or message.started_num_cached_tokens):
        return []
    sequence_ids = unpack_uint64(message.started_sequence_ids).tolist()
    num_cached_tokens = unpack_int32(message.started_num_cached_tokens).tolist()
    if len(sequence_ids) != len(num_cached_tokens):
        raise ValueError(f"{len(sequence_ids)} started sequences and {len(num_cached_tokens)} numbers of cached tokens")
    return list(zip(sequence_ids, num_cached_tokens, strict=True))


def tokens_in(message: frontend_pb2.PlannerMessage) -> dict[int, list[int]]:
    """New tokens by sequence."""
    if not (message.token_sequence_ids or message.token_ids):
        return {}
    return group_tokens(unpack_uint64(message.token_sequence_ids), unpack_int32(message.token_ids))


def logprobs_in(message: frontend_pb2.PlannerMessage) -> dict[int, Logprobs]:
    """Those of the new tokens by sequence, where there are any."""
    if not message.HasField("logprobs"):
        return {}
    sequence_ids = unpack_uint64(message.token_sequence_ids)
    return split_logprobs(sequence_ids, decode(message.logprobs, len(sequence_ids)))


def prompt_logprobs_in(message: frontend_pb2.PlannerMessage) -> list[tuple[int, int, Logprobs]]:
    """Those of prompts: sequence, place of the first one's token in the prompt, and they themselves."""
    return [(each.sequence_id, each.first_position, decode_whole(each.logprobs)) for each in message.prompt_logprobs]


def group_tokens(sequence_ids: UInt64Array, token_ids: Int32Array) -> dict[int, list[int]]:
    """Splits two parallel arrays by sequence; each sequence's tokens stay in their order.

    Raises ValueError when the arrays are not parallel.
    """
    if len(sequence_ids) != len(token_ids):
        raise ValueError(f"{len(sequence_ids)} sequence ids and {len(token_ids)} tokens")
    tokens: dict[int, list[int]] = {}
    for sequence_id, token_id in zip(sequence_ids.tolist(), token_ids.tolist(), strict=True):
        if sequence_id in tokens:
            tokens[sequence_id].append(token_id)
        else:
            tokens[sequence_id] = [token_id]
    return tokens


def in_messages(submits: Iterable[frontend_pb2.Submit]) -> list[frontend_pb2.FrontendMessage]:
    """Packs submits into messages of a bounded size."""
    messages: list[frontend_pb2.FrontendMessage] = []
    num_bytes = 0
    for submit in submits:
        num_bytes += submit.ByteSize()
        if not messages or num_bytes > MAX_SUBMITS_BYTES:
            messages.append(frontend_pb2.FrontendMessage())
            num_bytes = submit.ByteSize()
        messages[-1].submits.append(submit)
    return messages
