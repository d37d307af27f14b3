"""Training text: the running interpreter's own standard library, and a byte-level BPE for it."""

from __future__ import annotations

import io
import re
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

EXCLUDED_DIRECTORIES = frozenset({
    "test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "tkinter", "turtledemo",
    "distutils", "ensurepip", "encodings", "__phello__", "__pycache__",
})  # fmt: skip
EXCLUDED_FILES = frozenset({
    "html/entities.py", "locale.py", "stringprep.py", "sre_compile.py", "sre_constants.py", "sre_parse.py",
    "this.py", "antigravity.py", "profile.py", "pstats.py", "wsgiref/validate.py", "urllib/robotparser.py",
})  # fmt: skip

# Wording of a permission notice other than the Python Software Foundation licence.  A file that carries one is left
# out whole, so that the NOTICE beside the model can name a single licence.
OTHER_LICENCE = re.compile(
    r"permission to use, copy|permission is hereby granted|redistribution and use in source|SPDX-License-Identifier"
    r"|alter it and redistribute|copy, modify, merge|licensed under the|you may redistribute it|python 1\.6 license"
    r"|python 2\.2 license|two licenses when using|copyright CNRI|usage and redistribution",
    re.IGNORECASE,
)

# Never seen by the tokenizer trainer nor by the model: the text of the bits-per-byte measurement.
HELD_OUT = frozenset({
    "asyncio/locks.py", "base64.py", "calendar.py", "csv.py", "email/utils.py", "fractions.py", "heapq.py",
    "html/parser.py", "json/encoder.py", "queue.py", "sched.py", "shlex.py", "textwrap.py", "unittest/runner.py",
    "wave.py", "zipapp.py",
})  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Source texts, one string per module, in sorted path order."""

    train: list[str]
    held_out: list[str]


def _strip_header(text: str) -> str:
    """Drop the leading block of ``#`` lines and blank lines (shebang, coding line, copyright)."""
    lines = text.splitlines(keepends=True)
    start = 0
    while start < len(lines) and (not lines[start].strip() or lines[start].startswith("#")):
        start += 1
    return "".join(lines[start:])


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library under ``root`` (by default the running interpreter's), header comments stripped."""
    base = root or Path(sysconfig.get_path("stdlib"))
    corpus = Corpus([], [])
    for path in sorted(base.rglob("*.py")):
        name = path.relative_to(base).as_posix()
        if EXCLUDED_DIRECTORIES.intersection(path.relative_to(base).parts[:-1]) or name in EXCLUDED_FILES:
            continue
        if name.startswith("_sysconfigdata"):
            continue
        raw = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding).replace("\r\n", "\n")
        if OTHER_LICENCE.search(text):
            continue
        text = _strip_header(text)
        if text:
            (corpus.held_out if name in HELD_OUT else corpus.train).append(text)
    if len(corpus.held_out) != len(HELD_OUT):
        raise RuntimeError(f"expected {len(HELD_OUT)} held-out modules under {base}, found {len(corpus.held_out)}")
    return corpus


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the whole 256-byte alphabet, with ``<|endoftext|>`` as id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size or tokenizer.token_to_id(END_OF_TEXT) != 0:
        raise RuntimeError("the trained tokenizer does not have the expected size or special token")
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[npt.NDArray[np.int64]]:
    """Token ids of each text, with the end-of-text id (0) in front of it."""
    return [np.array([0, *e.ids], dtype=np.int64) for e in tokenizer.encode_batch(texts)]


class WindowSampler:
    """Endless batches of training windows.

    Each epoch shuffles the documents, joins them into one stream (closed by id 0, so that the last document's end is
    seen too), drops a random number of leading tokens below one window, cuts the rest into windows of
    ``context + 1`` tokens overlapping by one, and shuffles the windows.
    """

    def __init__(self, documents: list[npt.NDArray[np.int64]], context: int, seed: int) -> None:
        self.documents = documents
        self.context = context
        self.random = np.random.default_rng(seed)
        self.windows: list[npt.NDArray[np.int64]] = []

    def _refill(self) -> None:
        order = self.random.permutation(len(self.documents))
        stream = np.concatenate([*(self.documents[i] for i in order), np.zeros(1, dtype=np.int64)])
        first = int(self.random.integers(self.context))
        starts = np.arange(first, len(stream) - self.context, self.context)
        self.windows.extend(stream[s : s + self.context + 1] for s in self.random.permutation(starts))

    def batch(self, size: int) -> npt.NDArray[np.int64]:
        """The next ``size`` windows, shape ``(size, context + 1)``."""
        while len(self.windows) < size:
            self._refill()
        taken, self.windows = self.windows[:size], self.windows[size:]
        return np.stack(taken)
