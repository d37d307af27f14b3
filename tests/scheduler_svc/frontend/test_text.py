"""Detokenising piece by piece, and stop strings in a stream of text."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from scheduler_svc.frontend.text import Detokenizer, StopMatcher

_SETTINGS = settings(max_examples=150, deadline=None)


def stream_text(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> str:
    stream = Detokenizer(tokenizer).open(skip)
    bounds = sorted({0, len(ids), *[cut % (len(ids) + 1) for cut in cuts]})
    pieces = [stream.push(ids[start:stop]) for start, stop in pairwise(bounds)]
    return "".join(pieces) + stream.finish()


_CUTS = st.lists(st.integers(0, 1000), max_size=30)


@_SETTINGS
@given(st.lists(st.integers(0, 270), max_size=30), _CUTS, st.booleans())
def test_pieces_of_any_byte_level_ids_join_to_the_decoded_text(
    byte_level: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    """Broken UTF-8, special and unknown ids included, however the ids are cut into pieces."""
    assert stream_text(byte_level, ids, cuts, skip) == byte_level.decode(ids, skip_special_tokens=skip)


@_SETTINGS
@given(st.text(max_size=12), st.lists(st.integers(0, 255), max_size=3), st.integers(0, 40), _CUTS)
def test_pieces_of_text_with_stray_bytes_join_to_the_decoded_text(
    byte_level: Tokenizer, text: str, stray: list[int], at: int, cuts: list[int]
) -> None:
    """Characters of two to four bytes with foreign bytes in the middle."""
    ids = byte_level.encode(text).ids
    ids[at:at] = stray
    assert stream_text(byte_level, ids, cuts, True) == byte_level.decode(ids)


# Mostly bytes of multi-byte characters, so that runs of byte tokens are both right and wrong.
_PIECE_IDS = st.one_of(
    st.integers(0, 270),
    st.sampled_from([10 + byte for byte in (0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x41)]),
    st.integers(0, 9),
)


@_SETTINGS
@given(st.lists(_PIECE_IDS, max_size=30), _CUTS, st.booleans())
def test_pieces_of_any_sentencepiece_ids_join_to_the_decoded_text(
    sentencepiece: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    """Spaces at the beginning, runs of byte tokens right and wrong, special tokens in between."""
    assert stream_text(sentencepiece, ids, cuts, skip) == sentencepiece.decode(ids, skip_special_tokens=skip)


@_SETTINGS
@given(st.lists(_PIECE_IDS, max_size=20), _CUTS, st.booleans(), st.sampled_from(["Metaspace", "parts", "none"]))
def test_pieces_join_to_the_decoded_text_with_other_decoders(
    sentencepiece: Tokenizer, ids: list[int], cuts: list[int], skip: bool, kind: str
) -> None:
    """A metaspace decoder, a byte-level decoder inside a sequence, no decoder at all."""
    tokenizer = Tokenizer.from_str(sentencepiece.to_str())
    if kind == "Metaspace":
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    elif kind == "parts":
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.decoder = None
    assert stream_text(tokenizer, ids, cuts, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_comes_with_its_last_byte(byte_level: Tokenizer) -> None:
    """Half a character is held back; what can no longer become one is given out at once."""
    euro = byte_level.encode("€").ids
    stream = Detokenizer(byte_level).open(True)
    assert [stream.push([i]) for i in euro] == ["", "", "€"]
    assert stream.push(euro[:1]) == ""
    assert stream.push(byte_level.encode("a").ids) == "\ufffda"


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The plain definition: the shortest prefix that ends in a stop string; of several the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return end - len(stop), stop
    return None


_AB = st.text(alphabet="ab", max_size=25)


@settings(max_examples=400, deadline=None)
@given(_AB, st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4), _CUTS, st.booleans())
def test_the_first_match_ends_the_text_however_it_was_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    """A match may span pieces; the one that ends first counts; the text ends before it, or after it if asked."""
    matcher = StopMatcher(stops, include)
    bounds = sorted({0, len(text), *[cut % (len(text) + 1) for cut in cuts]})
    released = ""
    for start, stop in pairwise(bounds):
        released += matcher.push(text[start:stop])
        if matcher.matched:
            break
    else:
        released += matcher.finish()
    expected = first_match(text, stops)
    if expected is None:
        assert (matcher.matched, released) == (None, text)
    else:
        start, stop = expected
        assert (matcher.matched, released) == (stop, text[: start + len(stop)] if include else text[:start])


def test_text_is_held_back_only_while_it_may_begin_a_stop_string() -> None:
    matcher = StopMatcher(["END"], False)
    assert [matcher.push(piece) for piece in ("a", "E", "N", "x", "EE")] == ["a", "", "", "ENx", "E"]
    assert matcher.finish() == "E"


@pytest.mark.parametrize(("armed_from", "released"), [(0, "x"), (1, "xabc"), (3, "xabcabcab")])
def test_a_match_before_min_tokens_is_passed_over(armed_from: int, released: str) -> None:
    """Passed over for good, also while its text is held back as the beginning of another stop string."""
    matcher = StopMatcher(["abc", "abcabcabd"], False)
    pieces = ["xab", "c", "abc", "ab"]
    out = ""
    for i, piece in enumerate(pieces):
        out += matcher.push(piece, armed=i > armed_from)
        if matcher.matched:
            break
    assert out + matcher.finish() == released
