"""deploy/compose.yaml: valid by the published specification, and every command is one that its service takes."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def read_compose() -> dict[str, Any]:
    """With merge keys resolved, and variables at their defaults."""
    text = _VARIABLE.sub(lambda match: match.group(2), (DEPLOY / "compose.yaml").read_text())
    compose: dict[str, Any] = yaml.safe_load(text)
    return compose


def test_the_file_is_valid() -> None:
    """By the JSON schema of the Compose specification."""
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    jsonschema.validate(read_compose(), schema)
