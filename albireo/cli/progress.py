"""Progress bars on stderr; stdout is for results."""

import sys
from typing import Protocol

import tqdm


class Bar(Protocol):
    """The part of tqdm's bars that is used here."""

    n: float
    disable: bool

    def __enter__(self) -> "Bar": ...
    def __exit__(self, *exc_info: object) -> None: ...
    def update(self, n: float = 1) -> object: ...
    def refresh(self) -> object: ...
    def set_description_str(self, desc: str | None = None, refresh: bool | None = True) -> None: ...


def counting_bar(total: int, what: str, unit: str) -> Bar:
    """A bar over ``total`` things."""
    bar: Bar = tqdm.tqdm(total=total, desc=what, unit=unit, file=sys.stderr, dynamic_ncols=True)
    return bar


def loading_bar() -> Bar:
    """A bar from 0 to 1 with the current stage before it; disabled where no person is looking."""
    bar: Bar = tqdm.tqdm(
        total=1.0,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=None,
        leave=False,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}",
    )
    return bar


def print_line(line: str) -> None:
    """Prints a result without tearing a bar that shares the terminal."""
    if sys.stdout.isatty():
        tqdm.tqdm.write(line, file=sys.stdout)
    else:
        print(line)
    sys.stdout.flush()
