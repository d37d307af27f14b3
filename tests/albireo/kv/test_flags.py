"""The secret that keys the names of blocks."""

from pathlib import Path

import pytest

from albireo.block_hash import root_hash
from albireo.errors import ConfigError
from albireo.kv.flags import KvFlags, load_secret


def test_without_a_file_there_is_no_secret():
    assert load_secret(KvFlags()) == b""


def test_a_secret_changes_every_name_and_tenants_stay_apart(tmp_path: Path):
    file = tmp_path / "secret"
    file.write_bytes(b"s" * 32)
    secret = load_secret(KvFlags(kv_secret_file=str(file)))
    roots = [root_hash(tenant, key) for tenant in ("a", "b", "") for key in (secret, b"t" * 32, b"")]
    assert len(set(roots)) == 9
    assert {len(root) for root in roots} == {32}


@pytest.mark.parametrize("num_bytes", [0, 15, 65])
def test_a_secret_of_another_size_is_refused_by_name(tmp_path: Path, num_bytes: int):
    file = tmp_path / "secret"
    file.write_bytes(bytes(num_bytes))
    with pytest.raises(ConfigError, match=rf"--kv-secret-file .*: {num_bytes} bytes; 16 to 64"):
        load_secret(KvFlags(kv_secret_file=str(file)))


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--kv-secret-file .*No such file"):
        load_secret(KvFlags(kv_secret_file=str(tmp_path / "none")))
