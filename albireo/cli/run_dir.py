"""The directory of one running server: its unix sockets and logs."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from albireo.errors import ConfigError

# A unix socket's path holds 107 bytes; what the services put under the directory (group/rank-15.sock) needs the rest.
_MAX_PATH_BYTES = 107 - 35


class RunDir:
    """An existing run directory. ``keep`` leaves it, for its logs, after the server has ended."""

    def __init__(self, path: Path, keep: bool) -> None:
        self.path = path
        self.keep = keep
        for directory in (path, self.logs, self.group):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def group(self) -> Path:
        """Belongs to the worker group."""
        return self.path / "group"


@contextlib.contextmanager
def open_run_dir(given: str | None) -> Iterator[RunDir]:
    """``given``, made where it is missing and always kept, else a new directory, gone at the end unless ``keep``.

    Raises ConfigError when the path is too long for sockets, cannot be used, or is in use by another server.
    """
    if given is None:
        run_dir = RunDir(Path(tempfile.mkdtemp(prefix="albireo-", dir=_runtime_dir())), keep=False)
    else:
        path = Path(given).absolute()
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise ConfigError(f"--run-dir {path}: longer than {_MAX_PATH_BYTES} bytes, too long for unix sockets in it")
        try:
            run_dir = RunDir(path, keep=True)
        except OSError as error:
            raise ConfigError(f"--run-dir {path}: {error.strerror}") from error
    try:
        with _lock(run_dir.path):
            yield run_dir
    finally:
        if not run_dir.keep:
            shutil.rmtree(run_dir.path, ignore_errors=True)


def _runtime_dir() -> Path:
    """Where the user's own sockets belong; /tmp and not $TMPDIR, whose path may be long."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    fits = os.path.isabs(given) and len(os.fsencode(given)) < _MAX_PATH_BYTES - len("/albireo-12345678")
    if fits and os.access(given, os.W_OK | os.X_OK):
        return Path(given)
    return Path("/tmp")  # noqa: S108  # mkdtemp makes it safe


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Two servers in one directory would take each other's sockets."""
    with (path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--run-dir {path}: another server is using it") from None
        yield
