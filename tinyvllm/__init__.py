"A small vLLM you can read: LLM inference on tinygrad, written as notebooks."
__version__ = "0.1.0"

from importlib import import_module as _import_module

from tinyvllm.device import setup as _setup
from tinyvllm.metalsim import install as _install_metal

_setup()
_install_metal()

_HOMES = {'LLM': 'engine.llm', 'LLMEngine': 'engine.llm', 'AsyncLLM': 'engine.async_llm', 'AsyncEngine': 'engine.async_llm',
          'RequestOutput': 'engine.outputs', 'CompletionOutput': 'engine.outputs', 'SamplingParams': 'sampling.params', 'BadInput': 'errors'}
__all__ = list(_HOMES)


def __getattr__(name: str):
    "Load a public name from its module when it is first used: importing tinygrad takes a second."
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(_import_module(f'{__name__}.{_HOMES[name]}'), name)
