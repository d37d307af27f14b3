"""``albireo serve`` with a KV store: who is told of it, and what does not fit together."""

from pathlib import Path

import pytest

from albireo.cli.run_dir import RunDir
from albireo.cli.serve import ServeConfig, check_config, child_processes
from albireo.errors import ConfigError


def value_of(argv: list[str], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


def test_the_store_that_is_started_is_the_one_that_scheduler_and_ranks_use(tmp_path: Path):
    config = ServeConfig(model="/m", kv_store_gib=2, swap="always", metrics_port=9000, frontends=2)
    children = {child.name: list(child.argv) for child in child_processes(config, RunDir(tmp_path, keep=True))}
    store, worker, scheduler = children["kvstore"], children["worker"], children["scheduler"]
    assert value_of(scheduler, "--kv-store") == value_of(store, "--listen")
    assert value_of(worker, "--kv-store") == f"unix:{value_of(store, '--run-dir')}/kv-arena.sock"
    assert value_of(store, "--arena-gib") == "2"
    assert value_of(store, "--metrics-port") == "9004"
    assert value_of(scheduler, "--swap") == "always"


def test_the_url_of_redis_which_may_hold_a_password_is_on_no_command_line(tmp_path: Path):
    url = "redis://kv:password@r:6379"
    children = child_processes(ServeConfig(model="/m", kv_store_gib=2, redis=url), RunDir(tmp_path, keep=True))
    assert not any(url in word for child in children for word in child.argv)
    assert {child.name: (child.env or {}).get("ALBIREO_REDIS") for child in children} == {
        "kvstore": url,
        "worker": None,
        "scheduler": None,
    }


def test_another_hosts_store_is_reached_over_the_network_by_all(tmp_path: Path):
    config = ServeConfig(model="/m", kv_store="store:50054")
    children = {child.name: list(child.argv) for child in child_processes(config, RunDir(tmp_path, keep=True))}
    assert "kvstore" not in children
    assert {value_of(argv, "--kv-store") for argv in children.values()} == {"store:50054"}


def test_without_a_store_nobody_hears_of_one(tmp_path: Path):
    children = child_processes(ServeConfig(model="/m"), RunDir(tmp_path, keep=True))
    assert [child.name for child in children] == ["worker", "scheduler"]
    assert not any("--kv-store" in child.argv for child in children)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kv_store_gib": -1.0}, "--kv-store-gib -1"),
        ({"kv_store_gib": 1.0, "kv_store": "h:1"}, "--kv-store h:1 with --kv-store-gib 1: one of them"),
        ({"redis": "redis://r"}, "--redis: only a store"),
        ({"kv_store": "unix:/s"}, "--kv-store unix:/s: host:port"),
        ({"kv_store_gib": 1.0, "prefix_cache": "off"}, "--prefix-cache off"),
        ({"kv_secret_file": "/none"}, "--kv-secret-file /none"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(flags: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_config(ServeConfig(**flags))
