"""Settings that all tests share."""

from hypothesis import settings

# A loaded machine is slow, not wrong; and a run in CI must not depend on its luck.
settings.register_profile("albireo", deadline=None, derandomize=True)
settings.load_profile("albireo")
