"""One module a family of quantizers: from our configuration to theirs."""

from __future__ import annotations

import logging

# torchao logs, whenever it is imported on a machine without certain GPUs, that their extensions
# cannot be loaded. Nobody can act on that; anything else it has to say comes later.
_level = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    import torchao.quantization.pt2e  # noqa: F401
finally:
    logging.disable(_level)
