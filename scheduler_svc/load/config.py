"""Configuration of the load."""

from dataclasses import dataclass

from albireo.config import flag


@dataclass(frozen=True)
class LoadConfig:
    """Flags of ``python -m scheduler_svc load``; one of ``planner`` and ``target`` is needed."""

    planner: str = flag("", "attach to this planner as a front end without clients: host:port or unix:path")
    target: str = flag("", "call front ends as clients do: host:port or unix:path, several separated by commas")
    listen: str = flag("", "with --planner: serve the ledger here, as a front end does")
    name: str = flag("load", "name in logs and at the planner")
    streams: int = flag(32, "sequences that run at once; when one ends, the next begins")
    prompt_tokens: int = flag(32, "tokens of each prompt")
    output_tokens: int = flag(32, "tokens of each output; the first ones are shorter, so that they end one by one")
    channels: int = flag(4, "with --target: connections to each front end")
    report: str = flag("", "on SIGUSR1, what came since the last one is written to this file, as JSON")
    startup_timeout: float = flag(120.0, "seconds to wait for the planner or the front ends")
    log_level: str = flag("info", "least level that is logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if bool(self.planner) == bool(self.target):
            raise ValueError("exactly one of --planner and --target is needed")
        for name in ("streams", "prompt_tokens", "output_tokens", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")

    @property
    def targets(self) -> list[str]:
        return [each for each in self.target.split(",") if each]

    def first_output_tokens(self, stream: int) -> int:
        """So many tokens has the first output of this stream: from then on, sequences end at an even pace."""
        return 1 + stream * self.output_tokens // self.streams
