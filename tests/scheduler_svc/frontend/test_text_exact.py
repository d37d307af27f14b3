"""What clients read is what transformers decodes: random tokens of every kind of tokenizer, in random pieces."""

import random
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from scheduler_svc.frontend.text import Detokenizer, StopMatcher
from tokenizer_kinds import KINDS, SENTENCES, tokenizer_of

_NUM_SEQUENCES = 10_000 // len(KINDS) + 1
_NUM_WITH_STOPS = 300
_NUM_PAST_VOCABULARY = 20


def reference(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Without its clean-up of spaces, which we do not serve: see `scheduler_svc.frontend.text`."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Up to 40 ids: text, text with holes, bytes in a row, special and unknown tokens, or anything."""
    size = tokenizer.get_vocab_size()
    of_bytes = [i for byte in range(256) if (i := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None]
    of_bytes = of_bytes or [i for i in range(size) if len(tokenizer.id_to_token(i) or "") == 1]
    special = [*range(5), *range(size - 6, size + _NUM_PAST_VOCABULARY), 2**31 - 1]
    ids: list[int] = []
    while len(ids) < 40 and rng.random() < 0.9:
        kind = rng.random()
        if kind < 0.35:
            text = rng.choice(SENTENCES)
            start = rng.randrange(len(text))
            part = text[start : start + rng.randint(1, 12)]
            ids += tokenizer.encode(part, add_special_tokens=False).ids
        elif kind < 0.55:
            character = rng.choice("é€😀हい").encode()
            byte_ids = [of_bytes[byte % len(of_bytes)] for byte in character]
            ids += byte_ids[: rng.randint(1, len(byte_ids))]
        elif kind < 0.65:
            ids += rng.choices(of_bytes, k=rng.randint(1, 4))
        elif kind < 0.8:
            ids.append(rng.choice(special))
        else:
            ids += [rng.randrange(size) for _ in range(rng.randint(1, 5))]
    return ids[:40]


def chunks(rng: random.Random, ids: list[int]) -> Iterator[list[int]]:
    longest = rng.choice((1, 3, 10))
    while ids:
        num = rng.randint(1, longest)
        yield ids[:num]
        ids = ids[num:]


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_in_any_pieces_give_the_text_of_transformers(kind: str) -> None:
    """10,000 sequences over all kinds, special tokens kept and skipped."""
    tokenizer = tokenizer_of(kind)
    expected, detokenizer = reference(tokenizer), Detokenizer(tokenizer)
    rng = random.Random(kind)
    for _ in range(_NUM_SEQUENCES):
        ids, skip = random_ids(rng, tokenizer), rng.random() < 0.5
        stream = detokenizer.open(skip)
        pieces = [stream.push(chunk) for chunk in chunks(rng, ids)]
        pieces.append(stream.finish())
        assert "".join(pieces) == expected.decode(ids, skip_special_tokens=skip), (ids, skip)


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the stop string begins that ends first, of several the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, _, stop = min(found)
    return end - len(stop), stop


def random_stops(rng: random.Random, text: str) -> list[str]:
    """Pieces of the text itself, whole, broken or continued, which begin and end anywhere in a token."""
    stops = []
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text))
        piece = text[start : start + rng.randint(1, 9)]
        stops.append(rng.choice((piece, piece + "x", piece[:-1] + "\ufffd")))
    return stops


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_the_text_where_they_do_in_the_whole_of_it(kind: str) -> None:
    """Whatever tokens and pieces they begin and end in."""
    tokenizer = tokenizer_of(kind)
    expected, detokenizer = reference(tokenizer), Detokenizer(tokenizer)
    rng = random.Random(kind)
    num_matches = 0
    for _ in range(_NUM_WITH_STOPS):
        ids = random_ids(rng, tokenizer)
        whole = expected.decode(ids)
        if not whole:
            continue
        stops, include = random_stops(rng, whole), rng.random() < 0.5
        stream, matcher = detokenizer.open(False), StopMatcher(stops, include)
        given = ""
        for chunk in chunks(rng, ids):
            given += matcher.push(stream.push(chunk))
            if matcher.matched:
                break
        else:
            given += matcher.push(stream.finish())
            given += matcher.finish()
        match = first_match(whole, stops)
        if match is None:
            assert (matcher.matched, given) == (None, whole), (ids, stops)
        else:
            num_matches += 1
            start, stop = match
            assert (matcher.matched, given) == (stop, whole[: start + len(stop)] if include else whole[:start])
    assert num_matches > _NUM_WITH_STOPS // 3
