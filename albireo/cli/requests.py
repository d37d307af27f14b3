"""From flags and JSON objects to ``GenerateRequest``, by the descriptors of the contract.

Fields that the contract gains later need no change here.
"""

import argparse
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor as Fd
from google.protobuf.message import Message

from albireo.errors import InvalidRequest
from albireo.v1 import generation_pb2 as pb

_INTEGER_TYPES = frozenset({Fd.CPPTYPE_INT32, Fd.CPPTYPE_INT64, Fd.CPPTYPE_UINT32, Fd.CPPTYPE_UINT64})
_FLOAT_TYPES = frozenset({Fd.CPPTYPE_FLOAT, Fd.CPPTYPE_DOUBLE})
# A FieldDescriptor; the stubs give its two implementations no common type.
Field = Any
_SAMPLING_FIELDS: dict[str, Field] = dict(pb.SamplingParams.DESCRIPTOR.fields_by_name)
# request_id, priority and the like: what is neither the prompt nor a message.
_REQUEST_FIELDS: dict[str, Field] = {
    field.name: field
    for field in pb.GenerateRequest.DESCRIPTOR.fields
    if field.containing_oneof is None and field.cpp_type != Fd.CPPTYPE_MESSAGE
}
_KNOWN_KEYS = ["prompt", "prompt_token_ids", *_REQUEST_FIELDS, *_SAMPLING_FIELDS]

_HELP = {
    "temperature": "0 is greedy",
    "top_p": "sample from the most probable tokens that make up this much",
    "top_k": "sample from so many tokens; 0 is all",
    "seed": "makes sampling repeatable",
    "max_tokens": "the most tokens to generate",
    "min_tokens": "no end before so many tokens",
    "stop": "a string that ends the text; may be given again",
    "stop_token_ids": "a token id that ends the text; may be given again",
    "ignore_eos": "go on past the end-of-sequence token",
    "include_stop_str_in_output": "keep the stop string in the text",
    "skip_special_tokens": "leave special tokens out of the text",
    "n": "completions of the prompt",
    "min_p": "no token less probable than this part of the likeliest one",
    "repetition_penalty": "divides the logits of tokens in prompt or output; 1 is none",
    "presence_penalty": "from the logits of tokens in the output",
    "frequency_penalty": "the same, times the token's number in the output",
    "logit_bias": "added to the logit of a token; may be given again",
    "bad_words": "a text that the output never contains; may be given again",
    "logprobs": "show each token's log-probability, and those of the N likeliest tokens",
    "prompt_logprobs": "the same for each token of the prompt but the first",
    "truncate_prompt_tokens": "use only so many of the prompt's last tokens",
    "request_id": "a label for logs and aborts",
    "priority": "work of a higher priority starts first",
}


def add_flags(parser: argparse._ActionsContainer) -> None:
    """One flag per plain field of the contract. Flags that are not given are absent from `flag_values`."""
    for name, field in (_SAMPLING_FIELDS | _REQUEST_FIELDS).items():
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _HELP.get(name)}
        if field.cpp_type == Fd.CPPTYPE_BOOL:
            options["action"] = argparse.BooleanOptionalAction
        elif field.cpp_type in _INTEGER_TYPES:
            options |= {"type": int, "metavar": "N"}
        elif field.cpp_type in _FLOAT_TYPES:
            options |= {"type": float, "metavar": "X"}
        elif field.cpp_type == Fd.CPPTYPE_STRING:
            options["metavar"] = "S"
        elif name == "logit_bias":
            options |= {"type": _bias, "metavar": "ID=VALUE"}
        else:
            continue  # structures are for JSON
        if field.is_repeated:
            options["action"] = "append"
        parser.add_argument("--" + name.replace("_", "-"), **options)


def flag_values(namespace: argparse.Namespace) -> dict[str, Any]:
    """The request fields that were given as flags."""
    values = {name: value for name, value in vars(namespace).items() if name in _SAMPLING_FIELDS | _REQUEST_FIELDS}
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    return values


def _bias(text: str) -> tuple[str, float]:
    token_id, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (equals and token_id.isdecimal() and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE, a token id and a number")
    return token_id, number


def parse_line(line: bytes, defaults: Mapping[str, Any]) -> pb.GenerateRequest:
    """A request from one JSON object; ``defaults`` fill keys that are absent or null. Raises InvalidRequest."""
    try:
        fields = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("not a JSON object")
    return build_request(dict(defaults) | {key: value for key, value in fields.items() if value is not None})


def build_request(fields: Mapping[str, Any]) -> pb.GenerateRequest:
    """A request from API names and JSON values. Raises InvalidRequest, naming the field."""
    request = pb.GenerateRequest()
    request.sampling_params.SetInParent()
    if ("prompt" in fields) == ("prompt_token_ids" in fields):
        raise InvalidRequest("prompt, prompt_token_ids: exactly one of the two is needed")
    for key, value in fields.items():
        if key == "prompt":
            _set(request, pb.GenerateRequest.DESCRIPTOR.fields_by_name["text"], key, value)
        elif key == "prompt_token_ids":
            request.token_ids.SetInParent()  # no ids are still ids: the server says what is wrong with none
            _set(request.token_ids, pb.TokenIds.DESCRIPTOR.fields_by_name["ids"], key, value)
        elif key in _REQUEST_FIELDS:
            _set(request, _REQUEST_FIELDS[key], key, value)
        elif key in _SAMPLING_FIELDS:
            _set(request.sampling_params, _SAMPLING_FIELDS[key], key, value)
        else:
            close = difflib.get_close_matches(key, _KNOWN_KEYS, n=1)
            raise InvalidRequest(f"{key}: no such field" + (f"; did you mean {close[0]}?" if close else ""))
    return request


def _set(message: Message, field: Field, key: str, value: Any) -> None:
    """Sets one field from a JSON value of the right type; ``key`` is its name in errors."""
    if field.cpp_type in (Fd.CPPTYPE_MESSAGE, Fd.CPPTYPE_ENUM) or field.type == Fd.TYPE_BYTES:
        try:
            json_format.ParseDict({field.name: value}, message)
        except json_format.ParseError as error:
            raise InvalidRequest(f"{key}: {error}") from error
        return
    if field.is_repeated:
        if isinstance(value, str) and field.cpp_type == Fd.CPPTYPE_STRING:
            value = [value]  # "stop": "x", as other APIs allow
        if not isinstance(value, list):
            raise InvalidRequest(f"{key}: {_shown(value)} is not a list")
    for each in value if field.is_repeated else [value]:
        _check_type(field, key, each)
    try:
        if field.is_repeated:
            getattr(message, field.name).extend(value)
        else:
            setattr(message, field.name, value)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{key}: not valid Unicode: {error.reason}") from error
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"{key}: {_shown(value)} is out of range") from error


def _check_type(field: Field, key: str, value: Any) -> None:
    is_bool = isinstance(value, bool)  # which Python counts among the integers, and JSON does not
    if field.cpp_type in _INTEGER_TYPES:
        fits, what = isinstance(value, int) and not is_bool, "an integer"
    elif field.cpp_type in _FLOAT_TYPES:
        fits, what = isinstance(value, int | float) and not is_bool, "a number"
    elif field.cpp_type == Fd.CPPTYPE_BOOL:
        fits, what = is_bool, "true or false"
    else:
        fits, what = isinstance(value, str), "a string"
    if not fits:
        raise InvalidRequest(f"{key}: {_shown(value)} is not {what}")


def _shown(value: Any) -> str:
    """``value`` as JSON, short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
