"""The former name of `sdnb.layers`, for what has not moved yet."""

import sys
from importlib import import_module

from sdnb.layers import *  # noqa: F403

for _name in ("calls", "coverage", "form", "probe", "small_configs", "trace", "weights", "wiring"):
    sys.modules[f"{__name__}.{_name}"] = import_module(f"sdnb.layers.{_name}")
