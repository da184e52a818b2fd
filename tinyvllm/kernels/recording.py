"Which kernels are called: `tinyvllm doctor` records an engine's, and checks that it knows them all."
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from tinyvllm.metalsim.counts import collecting


class RecordedKernels(dict[Hashable, set[str]]):
    "Kernel -> the sources with which it was called, in the order in which kernels were first seen."

    @property
    def names(self) -> list[str]:
        "Names of the kernels, each once."
        return list(dict.fromkeys(kernel.signature.name for kernel in self))


_open: list[RecordedKernels] = []


@contextmanager
def recording() -> Iterator[RecordedKernels]:
    "Collect every kernel of ours that is put into a graph inside the block, on whatever device."
    with collecting(_open, RecordedKernels()) as calls:
        yield calls


def note_call(
    kernel: Hashable, # a `Kernel`: two with the same texts are one
    source: str, # in the device's language, with its constants
) -> None:
    "Record a call in the open recordings."
    for calls in _open:
        calls.setdefault(kernel, set()).add(source)
