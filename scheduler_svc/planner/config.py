"""Configuration of the planner."""

from dataclasses import dataclass

from albireo.allowances import TenantFlags
from albireo.config import flag
from albireo.kv.flags import KvFlags
from albireo.security import SecurityFlags
from albireo.tracing import OtlpFlags


@dataclass(frozen=True)
class PlannerConfig(KvFlags, TenantFlags, SecurityFlags, OtlpFlags):
    """Flags of ``python -m scheduler_svc planner``."""

    group: str = flag("127.0.0.1:50052", "the worker group's leader: host:port or unix:path")
    planner: str = flag("127.0.0.1:50053", "address for front ends: host:port or unix:path")
    depth: int = flag(2, "plans in flight at most; 1 is synchronous")
    max_num_batched_tokens: int = flag(0, "tokens of one step; 0: what the group takes")
    max_waiting: int = flag(4096, "sequences that may wait; more are refused with RESOURCE_EXHAUSTED")
    max_itl_ms: float = flag(
        0.0, "prompts are computed in chunks so small that running sequences wait no longer for a token; 0: no limit"
    )
    prefix_cache: str = flag("on", "sequences of a tenant that begin alike share KV blocks", ("on", "off"))
    recovery_timeout: float = flag(30.0, "seconds that sequences wait for a lost worker group before they fail")
    metrics_port: int = flag(0, "Prometheus metrics on this port of 127.0.0.1; 0: none")
    log_level: str = flag("info", "least level that is logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 8:
            raise ValueError(f"--depth {self.depth}: 1 to 8")
        if self.max_waiting < 1:
            raise ValueError(f"--max-waiting {self.max_waiting}: at least 1")
        if not self.max_itl_ms >= 0:
            raise ValueError(f"--max-itl-ms {self.max_itl_ms:g}: not negative")
        if self.kv_store and self.prefix_cache == "off":
            raise ValueError(f"--kv-store {self.kv_store}: needs --prefix-cache on")
        if not self.recovery_timeout >= 0:
            raise ValueError(f"--recovery-timeout {self.recovery_timeout:g}: not negative")
