"""On what a model runs when nobody says: the device, and the number of ranks."""

import os
from pathlib import Path

from albireo.errors import ConfigError
from albireo.model_spec import load_model_spec, resolve_model

_NVIDIA_DRIVER = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia"))


def may_have_gpu() -> bool:
    """Whether an NVIDIA driver is there. Whether torch can use a GPU takes it seconds to say."""
    return any(path.exists() for path in _NVIDIA_DRIVER)


def choose_tp(model: str, engine: str, device: str) -> int:
    """How many ranks ``--tp 0`` means: 2 on a CPU of at least 2 cores, if the model can be split; otherwise 1.

    Half a model on half the cores takes as long as the whole on all, and sampling is split as well; more ranks would
    have too few cores each.
    """
    on_gpu = device == "cuda" or (device == "auto" and may_have_gpu())
    if engine == "stub" or on_gpu or len(os.sched_getaffinity(0)) < 2:
        return 1
    try:
        load_model_spec(resolve_model(model)).check_tp(2)
    except ConfigError:
        return 1  # what is wrong with a model is said by whoever serves it
    return 2
