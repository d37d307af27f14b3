"""The rate of a growing count."""

from scheduler_svc.planner.throughput import Throughput


def test_the_rate_is_that_of_the_last_seconds() -> None:
    """It follows a change within four seconds, and is exactly 0 when nothing has come for as long."""
    throughput = Throughput()
    assert throughput.observe(1000, now=50.0) == 0, "what came before is not known"
    rates = [throughput.observe(1000 + 25 * i, now=50.0 + 0.25 * i) for i in range(1, 41)]
    assert rates == [100.0] * 40
    slower = [throughput.observe(2000 + 5 * i, now=60.0 + 0.25 * i) for i in range(1, 17)]
    assert slower == sorted(slower, reverse=True)
    assert (slower[0] > 90, slower[-1]) == (True, 20.0)
    idle = [throughput.observe(2080, now=64.0 + 0.25 * i) for i in range(1, 17)]
    assert idle[-1] == 0


def test_a_long_pause_between_two_looks_counts() -> None:
    throughput = Throughput()
    throughput.observe(0, now=0.0)
    assert throughput.observe(100, now=10.0) == 10
