"""A small tokenizer of each kind that models come with, trained on a few sentences."""

import functools
import json
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. It doesn't, does it? No: it won't!",
    "def main(argv: list[str]) -> int:\n    return 0  # nothing\n\n\nclass Stack:\n\tpass\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, für 3,50 €.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを 我が世誰ぞ常ならむ。",
    "नमस्ते दुनिया, यह एक परीक्षण है।",
    "a  b   c    d ... 'quoted' \"words\" 1234567890 \u00a0 e\u0301 naïve ﬁ",
    "👩\u200d👩\u200d👧 🎉🎉 👍🏽 🇩🇪 ∑∀∃ 𐍈𐌰 \u2028 ok",
]
_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|reserved 1|>"]
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_LLAMA3_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_VOCAB_SIZE = 700
_METASPACE = "▁"


def _gpt2() -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _llama3() -> Tokenizer:
    """Byte-level BPE, cut by a pattern, with added tokens that are no special ones; Qwen's is alike."""
    tokenizer = _gpt2()
    split = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.add_tokens(["<tool_call>", "é", " spaced ", "工具", "\u0120half\u20ac"])
    return tokenizer


def _llama2() -> Tokenizer:
    """BPE of SentencePiece: metaspaces, byte tokens for what has no token, one space less at the beginning."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _gemma() -> Tokenizer:
    """Like Llama 2's, but every space counts."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _t5() -> Tokenizer:
    """Unigram of SentencePiece; what has no token is lost."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=_SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _unigram_with_bytes() -> Tokenizer:
    """Unigram with byte tokens."""
    state = json.loads(_t5().to_str())
    state["model"]["vocab"] += [[token, -20.0] for token in _BYTE_TOKENS]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def _bert() -> Tokenizer:
    """WordPiece, which closes gaps before some signs."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=500, special_tokens=_SPECIAL))
    return tokenizer


def _sentencepiece_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_METASPACE), normalizers.Replace(" ", _METASPACE)])
    # Few characters have a token of their own, so that many are spelled in bytes.
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB_SIZE, special_tokens=[*_SPECIAL, *_BYTE_TOKENS], limit_alphabet=80)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [each for each in state["added_tokens"] if each["content"] not in _BYTE_TOKENS]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens(["<tool>", f"{_METASPACE}both{_METASPACE}"])
    return tokenizer


_MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": _gpt2,
    "llama3": _llama3,
    "llama2": _llama2,
    "gemma": _gemma,
    "t5": _t5,
    "unigram-with-bytes": _unigram_with_bytes,
    "bert": _bert,
}
KINDS = tuple(_MAKERS)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Of one of KINDS."""
    return _MAKERS[kind]()
