"The Metal sources that METAL compiles and runs: what an engine hands to the compiler, tinygrad's own kernels too."
from collections.abc import Iterator
from contextlib import contextmanager

from tinyvllm.metalsim.counts import collecting
from tinyvllm.metalsim.source import signatures


class Sources(dict[str, list[str]]):
    "Source -> the names of its kernels, in the order in which they were first seen."

    @property
    def kernels(self) -> list[str]:
        "Names of all kernels, each once."
        return list(dict.fromkeys(name for names in self.values() for name in names))


_open: list[Sources] = []


@contextmanager
def capturing() -> Iterator[Sources]:
    """Collect every source that METAL compiles or runs inside the block, each once.

    What tinygrad compiled before, and only runs now, is collected as well.
    """
    with collecting(_open, Sources()) as sources:
        yield sources


def note_source(
    source: str, # Metal
) -> None:
    "Record a source that is compiled, or whose kernel runs, in the open captures."
    for sources in _open:
        if source not in sources:
            sources[source] = [kernel.name for kernel in signatures(source)]
