"""``albireo bench sampling``: starts ``python -m albireo_kernels.bench.sampling``, which this package
must not import."""

from collections.abc import Sequence

from albireo.cli.bench_kernels import start

_MODULE = "albireo_kernels.bench.sampling"


def run(argv: Sequence[str]) -> int:
    """Passes the arguments on, and returns the child's exit status."""
    status, _ = start(_MODULE, argv)
    return status
