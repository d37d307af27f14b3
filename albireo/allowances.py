"""What one tenant may take of a server: flags for all tenants, and a TOML file with the exceptions.

[acme]                # a tenant's name; quoted where it has dots
max_waiting = 100     # what is absent is as for all tenants
tokens_per_s = 5000
cache_blocks = 2000
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from albireo.config import flag
from albireo.errors import ConfigError


@dataclass(frozen=True)
class TenantFlags:
    """Flags of whatever starts a planner."""

    tenant_max_waiting: int = flag(0, "sequences of one tenant that may wait; 0: no limit")
    tenant_tokens_per_s: float = flag(0.0, "tokens of prompts and outputs that one tenant is served; 0: no limit")
    tenant_cache_blocks: int = flag(0, "unused blocks that the prefix cache keeps of one tenant; 0: no limit")
    tenants: str = flag("", "TOML with a table per tenant whose limits differ: max_waiting, tokens_per_s, cache_blocks")


TENANT_FLAGS = tuple(each.name for each in fields(TenantFlags))


@dataclass(frozen=True)
class Allowance:
    """Of one tenant; 0: no limit.

    Attributes:
        max_waiting: sequences in the queue.
        tokens_per_s: of prompts that are computed and of outputs.
        cache_blocks: free blocks that the prefix cache finds.
    """

    max_waiting: int = 0
    tokens_per_s: float = 0.0
    cache_blocks: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            is_number = type(value) is int or (each.type is float and isinstance(value, float))
            if not is_number or not 0 <= value < math.inf:
                kind = "number" if each.type is float else "whole number"
                raise ValueError(f"{each.name} {value!r}: a {kind}, not negative")


@dataclass(frozen=True)
class Allowances:
    """Of all tenants."""

    default: Allowance = Allowance()
    exceptions: Mapping[str, Allowance] = field(default_factory=dict)

    def of(self, tenant: str) -> Allowance:
        return self.exceptions.get(tenant, self.default)

    @property
    def have_rates(self) -> bool:
        return any(each.tokens_per_s for each in (self.default, *self.exceptions.values()))


def parse_exceptions(text: str, default: Allowance) -> dict[str, Allowance]:
    """Raises ValueError, which names tenant, key and value."""
    return {name: _allowance(name, table, default) for name, table in tomllib.loads(text).items()}


def _allowance(tenant: str, table: Any, default: Allowance) -> Allowance:
    if not isinstance(table, dict):
        raise ValueError(f"{tenant}: a table is needed, [{tenant}]")
    known = [each.name for each in fields(Allowance)]
    for key in table:
        if key not in known:
            raise ValueError(f"[{tenant}] {key}: not known; one of {', '.join(known)}")
    try:
        return dataclasses.replace(default, **table)
    except ValueError as error:
        raise ValueError(f"[{tenant}] {error}") from None


def load_allowances(flags: TenantFlags) -> Allowances:
    """Raises ConfigError where a flag or the file cannot be used."""
    try:
        default = Allowance(flags.tenant_max_waiting, flags.tenant_tokens_per_s, flags.tenant_cache_blocks)
    except ValueError as error:
        raise ConfigError(f"--tenant-{str(error).replace('_', '-')}") from error
    if not flags.tenants:
        return Allowances(default)
    try:
        return Allowances(default, parse_exceptions(Path(flags.tenants).read_text(encoding="utf-8"), default))
    except OSError as error:
        raise ConfigError(f"--tenants {flags.tenants}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--tenants {flags.tenants}: {error}") from error
