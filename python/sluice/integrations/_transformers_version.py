"""Refuses, when it is imported, a transformers that sluice.integrations.transformers was not made for."""

import transformers
from packaging.version import Version

from .._error import Error

OLDEST = "5.24.0"
"""The first with the seams that are used: quantizers that see the model in update_weight_conversions(), and
transformers.distributed.expert_parallel."""

if Version(transformers.__version__) < Version(OLDEST):
    raise Error("unsupported", f"transformers {transformers.__version__}: sluice.integrations.transformers needs "
                               f"{OLDEST} or newer")
