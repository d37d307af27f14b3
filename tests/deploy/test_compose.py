"""deploy/compose.yaml: valid by the published specification, and every command is one that its image takes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from albireo.config import from_namespace, parser_for
from kvstore_svc.config import StoreConfig
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.planner.config import PlannerConfig
from worker_svc.config import WorkerConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
SUBCOMMANDS = {"planner", "frontend"}
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """With merge keys resolved, and variables at their defaults."""
    text = _VARIABLE.sub(lambda match: match.group(2), (DEPLOY / "compose.yaml").read_text())
    read: dict[str, Any] = yaml.safe_load(text)
    return read


def test_the_file_is_valid(compose: dict[str, Any]) -> None:
    """By the JSON schema of the Compose specification, which tells a wrong key as well."""
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(compose)
    compose["services"]["worker"]["comand"] = []
    assert not validator.is_valid(compose)
    del compose["services"]["worker"]["comand"]


@pytest.mark.parametrize(
    ("service", "config_class"),
    [("kvstore", StoreConfig), ("worker", WorkerConfig), ("planner", PlannerConfig), ("frontend", FrontendConfig)],
)
def test_commands_are_understood(compose: dict[str, Any], service: str, config_class: type) -> None:
    argv = [argument for argument in compose["services"][service]["command"] if argument not in SUBCOMMANDS]
    config = from_namespace(config_class, parser_for(config_class, service, "").parse_args(argv))
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        assert str(getattr(config, name.replace("-", "_"))) in (value, f"{value}.0")


def test_the_gateway_takes_its_flags(compose: dict[str, Any]) -> None:
    known = subprocess.run([Path(sys.executable).parent / "smg", "launch", "--help"], capture_output=True, check=True)
    for argument in compose["services"]["gateway"]["command"]:
        assert f"{argument.partition('=')[0]} ".encode() in known.stdout


def test_images_and_services_fit(compose: dict[str, Any]) -> None:
    """Each service of ours is built from a stage of the Dockerfile, and reaches others by their names and ports."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    services = compose["services"]
    for service in services.values():
        if "build" in service:
            assert f" AS {service['build']['target']}\n" in dockerfile
    ports = {
        name: int(match.group(1))
        for name, service in services.items()
        if (match := re.search(r"=0\.0\.0\.0:(\d+)|--port=(\d+)", " ".join(service["command"]))) and match.group(1)
    }
    ports["frontend"] = 50051
    ports["redis"] = 6379
    for service in services.values():
        for name, port in re.findall(rf"\b({'|'.join(services)}):(\d+)", " ".join(map(str, service["command"]))):
            assert ports[name] == int(port)


def test_only_the_worker_has_torch() -> None:
    """And nobody else a compiler."""
    stages = re.split(r"^FROM ", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    with_torch = [stage.split(" AS ")[1].split("\n")[0] for stage in stages if "torch" in stage or "g++" in stage]
    assert with_torch == ["worker"]
