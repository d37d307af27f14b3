"""What tenants may take: flags, and a file with the exceptions."""

from pathlib import Path

import pytest

from albireo.allowances import Allowance, Allowances, TenantFlags, load_allowances
from albireo.errors import ConfigError


def test_a_tenant_has_what_its_table_says_and_the_flags_for_the_rest(tmp_path: Path):
    file = tmp_path / "tenants.toml"
    file.write_text('[acme]\nmax_waiting = 3\ntokens_per_s = 10\n["spiffe://a.b"]\ncache_blocks = 0\n')
    allowances = load_allowances(TenantFlags(7, 2.5, 9, str(file)))
    assert allowances.of("acme") == Allowance(3, 10, 9)
    assert allowances.of("spiffe://a.b") == Allowance(7, 2.5, 0)
    assert allowances.of("") == allowances.of("whoever") == Allowance(7, 2.5, 9)
    assert allowances.have_rates


def test_without_flags_nothing_is_limited():
    assert load_allowances(TenantFlags()) == Allowances()
    assert not Allowances().have_rates


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[acme]\nmax_waiting = -1", "[acme] max_waiting -1: a whole number, not negative"),
        ("[acme]\ncache_blocks = 1.5", "[acme] cache_blocks 1.5: a whole number, not negative"),
        ("[acme]\ncache_blocks = true", "[acme] cache_blocks True: a whole number, not negative"),
        ("[acme]\ntokens_per_s = nan", "[acme] tokens_per_s nan: a number, not negative"),
        ("[acme]\ntokens_per_s = inf", "[acme] tokens_per_s inf: a number, not negative"),
        ('[acme]\ntokens_per_s = "9"', "[acme] tokens_per_s '9': a number, not negative"),
        ("[acme]\nwaiting = 1", "[acme] waiting: not known; one of max_waiting, tokens_per_s, cache_blocks"),
        ("acme = 1", "acme: a table is needed, [acme]"),
        ("[acme", "Expected"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, reason: str):
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_allowances(TenantFlags(tenants=str(file)))
    assert f"--tenants {file}: " in str(raised.value)
    assert reason in str(raised.value)


def test_what_is_wrong_with_a_flag_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="--tenant-max-waiting -1: a whole number, not negative"):
        load_allowances(TenantFlags(tenant_max_waiting=-1))
    with pytest.raises(ConfigError, match=f"--tenants {tmp_path}/absent: No such file"):
        load_allowances(TenantFlags(tenants=f"{tmp_path}/absent"))
