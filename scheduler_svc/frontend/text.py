"""Token ids to text, piece by piece.

The pieces of a stream, joined, are exactly what ``tokenizer.decode`` gives for all of its ids, whatever the ids are:
a piece is given out only when no later token can change it.

In transformers that is ``decode`` with ``clean_up_tokenization_spaces=False``. Its clean-up takes away spaces that the
model has written, has had other defaults in other versions, and may change what a client has read already.
"""

import codecs
import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer


class TextStream(Protocol):
    """The text of one completion."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds tokens; returns the text that is certain now, perhaps none."""

    def finish(self) -> str:
        """Returns what was held back. Nothing is pushed after it."""


class Detokenizer:
    """Opens text streams; one per model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        kinds = _decoder_kinds(json.loads(decoder.__getstate__())) if decoder is not None else []
        special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._is_byte_level = kinds == ["ByteLevel"]
        self._holds_replacement = "ByteLevel" in kinds
        # By whether special tokens are skipped.
        self._bytes = [_TokenBytes(tokenizer, skipped) for skipped in (frozenset[int](), special)]
        has_byte_fallback = "ByteFallback" in kinds
        self._texts = [_TokenTexts(tokenizer, skipped, has_byte_fallback) for skipped in (frozenset[int](), special)]

    def open(self, skip_special_tokens: bool) -> TextStream:
        if self._is_byte_level:
            return _ByteStream(self._bytes[skip_special_tokens])
        return _WindowStream(self._tokenizer, self._texts[skip_special_tokens], self._holds_replacement)


class _ByteStream:
    """Of a byte-level tokenizer: every token is a string of bytes, and the text is their UTF-8 reading."""

    def __init__(self, table: "_TokenBytes") -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        return self._decoder.decode(b"".join([table[token_id] for token_id in token_ids]))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _WindowStream:
    """Of any other tokenizer: decodes each piece together with the token before it, on which its spaces may depend.

    A run of byte tokens is read as a whole (one wrong byte turns all of it into replacement characters), so it is held
    back until another token ends it.
    """

    def __init__(self, tokenizer: Tokenizer, table: "_TokenTexts", holds_replacement: bool) -> None:
        self._tokenizer = tokenizer
        self._table = table
        self._holds_replacement = holds_replacement
        self._context: list[int] = []  # the last token given out
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        last = None
        for token_id in token_ids:
            if (token := self._table[token_id]) is not None:
                self._pending.append(token_id)
                last = token
        if last is None or last.is_byte:
            return ""
        piece = self._piece()
        if self._holds_replacement and piece.endswith("\ufffd"):
            return ""  # half a character, perhaps
        self._context = self._pending[-1:]
        self._context_text = last.text
        self._pending = []
        return piece

    def finish(self) -> str:
        return self._piece() if self._pending else ""

    def _piece(self) -> str:
        text = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=False)
        return text[len(self._context_text) :]


class _TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level tokenizer, worked out when first asked for."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            value = b""
        elif all(char in _BYTE_OF_CHAR for char in token):
            value = bytes(_BYTE_OF_CHAR[char] for char in token)
        else:
            value = token.encode()  # an added token, spelled as it is
        self[token_id] = value
        return value


class _TokenText(NamedTuple):
    text: str  # when it stands alone
    is_byte: bool  # one of a run that is read as a whole


class _TokenTexts(dict[int, _TokenText | None]):
    """What a window must know of each token, worked out when first asked for. None: it is skipped or unknown, leaves no
    trace in the text, and must not pass for a neighbour."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], has_byte_fallback: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._has_byte_fallback = has_byte_fallback

    def __missing__(self, token_id: int) -> _TokenText | None:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            value = None
        else:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            value = _TokenText(text, self._has_byte_fallback and _is_byte_token(token))
        self[token_id] = value
        return value


class StopMatcher:
    """Finds the first of some stop strings in a stream of text and holds back what may be the beginning of one.

    Of several matches the one that ends first counts, and of those the longest. That depends on the text alone, not on
    how it was cut into tokens, and it ends a completion at the earliest token possible.
    """

    def __init__(self, stops: Sequence[str], include_match: bool) -> None:
        self._stops = stops
        self._include_match = include_match
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str, armed: bool = True) -> str:
        """Adds text; returns what may be given out. After a match (see ``matched``) that is the end of the text.

        A match that ends in this piece is passed over when not ``armed``.
        """
        num_seen = len(self._held)  # no match ends in here: it would have been found, or passed over
        text = self._held + piece
        if armed and (found := self._first_match(text, num_seen)) is not None:
            start, self.matched = found
            self._held = ""
            return text[: start + len(self.matched)] if self._include_match else text[:start]
        split = self._start_of_partial(text)
        self._held = text[split:]
        return text[:split]

    def finish(self) -> str:
        """What is still held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_seen: int) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # end, start, stop string
        for stop in self._stops:
            start = text.find(stop, max(0, num_seen - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _start_of_partial(self, text: str) -> int:
        """Where the longest tail of ``text`` begins that a stop string begins with."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1, first)
        return first


def _decoder_kinds(decoder: dict[str, object]) -> list[str]:
    parts = decoder.get("decoders")
    if isinstance(parts, list):
        return [kind for part in parts for kind in _decoder_kinds(part)]
    return [str(decoder["type"])]


def _is_byte_token(token: str) -> bool:
    """``<0x0A>`` and the like, as the byte fallback of tokenizers reads them."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return False
    return all(char in "0123456789abcdefABCDEF" for char in token[3:5])


def _byte_of_char() -> dict[str, int]:
    """The printable stand-ins of byte-level tokenizers (GPT-2): bytes without a glyph of their own move past 255."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF_CHAR = _byte_of_char()
