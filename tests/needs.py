"""What a machine may lack; the tests that need it are left out, and the last lines of a run say so."""

import shutil

import pytest

NO_REDIS = "redis-server is not installed"
needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason=NO_REDIS)
