"A small vLLM you can read: LLM inference on tinygrad, written as notebooks."
__version__ = "0.1.0"

from tinyvllm.device import setup as _setup

_setup()
