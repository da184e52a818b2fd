"""Print, as JSON, what lint says of every source that engines of all kinds hand to METAL's compiler.

Run it as a program of its own: nothing is compiled or run, each step samples a 1, and tinygrad would remember that.
"""
import json
import os
from types import SimpleNamespace

import numpy as np

os.environ['METALSIM_LINT'] = '0'  # a refusal would only make the engine take another kernel

import tinyvllm  # noqa: E402,F401  before tinygrad
from tinyvllm.cli.coverage import KINDS, record_engines  # noqa: E402
from tinyvllm.metalsim import capturing, device, lint  # noqa: E402
from tinyvllm.metalsim.capture import note_source  # noqa: E402
from tinyvllm.runner.sampled_tokens import SampledTokenBuffer  # noqa: E402


class Unbuilt:
    "The kernels of a source that is not compiled."

    def __init__(self, source, check):
        self.source = source

    def __getitem__(self, name):
        return SimpleNamespace(library=self)


def main():
    device.library = lambda *_: None
    device.Library = Unbuilt
    device.MetalProgram.dispatch = lambda self, *_, **__: note_source(self.kernel.library.source)
    SampledTokenBuffer.read = lambda self, step: np.ones(self.size, np.int32)
    with capturing() as sources:
        record_engines('METAL', KINDS)
    print(json.dumps({'sources': len(sources), 'kernels': sources.kernels,
                      'refused': {source: found for source, found in zip(sources, map(lint, sources)) if found}}))


if __name__ == '__main__':
    main()
