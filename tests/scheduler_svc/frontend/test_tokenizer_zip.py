"""The archive of a model's tokenizer files."""

import io
import os
import zipfile
from pathlib import Path

import pytest

from albireo.errors import NotFound
from scheduler_svc.frontend.tokenizer_zip import make_tokenizer_zip


def model(directory: Path, *names: str) -> Path:
    directory.mkdir()
    for name in names:
        (directory / name).write_text(f"{name}\n" * 1000)
    return directory


def test_it_has_what_a_tokenizer_is_made_of_and_no_weights(tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "config.json"]
    archive = make_tokenizer_zip(model(tmp_path / "a", *names, "model.safetensors", "README.md"))
    with zipfile.ZipFile(io.BytesIO(archive.data)) as opened:
        assert opened.namelist() == sorted(names)
        assert opened.testzip() is None
    assert len(archive.data) < 5000, "it is compressed"


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    """Whenever they were written, and in whatever order."""
    names = ["tokenizer.json", "vocab.json", "added_tokens.json"]
    first, second = model(tmp_path / "a", *names), model(tmp_path / "b", *reversed(names))
    for name in names:
        os.utime(second / name, (0, 0))
    assert make_tokenizer_zip(first) == make_tokenizer_zip(second)
    (second / "vocab.json").write_text("{}")
    assert make_tokenizer_zip(first).sha256 != make_tokenizer_zip(second).sha256


@pytest.mark.parametrize(
    ("names", "odd", "message"),
    [
        (["config.json"], None, "tokenizer.json: No such file"),
        (["tokenizer.json"], "vocab.json", "vocab.json: Is a directory"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, names: list[str], odd: str | None, message: str) -> None:
    directory = model(tmp_path / "a", *names)
    if odd is not None:
        (directory / odd).mkdir()
    with pytest.raises(NotFound, match=message):
        make_tokenizer_zip(directory)
