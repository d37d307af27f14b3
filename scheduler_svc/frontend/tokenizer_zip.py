"""The files that make a model's tokeniser, in one archive."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

from albireo.errors import NotFound

_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_NEEDED = "tokenizer.json"
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that the format knows


class TokenizerZip(NamedTuple):
    data: bytes
    sha256: str  # in hexadecimal


def make_tokenizer_zip(directory: Path) -> TokenizerZip:
    """Of those files that ``directory`` has: the same files make the same archive. Raises NotFound."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _FILES:
            try:
                data = (directory / name).read_bytes()
            except OSError as error:
                if name == _NEEDED or not isinstance(error, FileNotFoundError):
                    raise NotFound(f"the tokenizer cannot be sent: {directory / name}: {error.strerror}") from error
                continue
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return TokenizerZip(buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest())
