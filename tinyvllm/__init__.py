__version__ = "0.1.0"

from tinyvllm.device import setup as _setup

_setup()
