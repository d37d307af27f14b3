"""The kernels of this machine."""

import pytest

from albireo_kernels.cpu import Library, load_library


@pytest.fixture(scope="session")
def library() -> Library:
    return load_library()
