"""One thread: the tensors are tiny, and ranks share the machine. Makes `sampler_ranks` importable."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
