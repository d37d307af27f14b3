"""Reports as JSON files."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albireo.errors import ConfigError


def write_json(file: str, report: Mapping[str, Any]) -> None:
    """Writes what ``--json`` asks for; - is stdout. Raises ConfigError when the file cannot be written."""
    text = json.dumps(report, indent=2) + "\n"
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text)
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror}") from error
