"""The check of two tenants in its small form."""

from manylora.loadtest.checks.tenants import Sizes, check


def test_neither_tenant_sees_anything_of_the_other() -> None:
    found = check(Sizes(requests=300, streams=16, kills=1, spent_between=8))
    assert not any(found.values()), found
