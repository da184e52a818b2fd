"Counts of kernels that ran: on how many threads, and what they read and wrote of each buffer."
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple


class Traffic(NamedTuple):
    """Accesses to device memory, as the compiler leaves them: what it keeps in a register is read once.

    Those of one vector, such as a `float4`, are one; an atomic operation is one write.
    """
    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: 'Traffic') -> 'Traffic':
        return Traffic(*map(sum, zip(self, other)))

    @property
    def bytes(self) -> int:
        "Bytes read and written."
        return self.bytes_read + self.bytes_written


@dataclass
class Dispatch:
    "One kernel that has run; without checks its traffic was not counted."
    name: str
    grid: tuple[int, int, int]  # threadgroups
    threads: tuple[int, int, int]  # in one of them
    buffers: dict[str, Traffic] = field(default_factory=dict)  # by parameter; without `constant T&`

    @property
    def num_threads(self) -> int:
        "Threads of all threadgroups."
        return prod(self.grid) * prod(self.threads)

    @property
    def total(self) -> Traffic:
        "Sum over all buffers."
        return sum(self.buffers.values(), Traffic())


class Counts(list[Dispatch]):
    "The dispatches of a `with counting()` block, in order."

    def __init__(self):
        super().__init__()
        self.graphs: list[int] = []  # how many kernels each graph call had

    @property
    def total(self) -> Traffic:
        "Sum over all dispatches."
        return sum((d.total for d in self), Traffic())


@contextmanager
def collecting(
    collectors: list, # those of the blocks that are open
    new, # what this block collects in
) -> Iterator:
    "Keep a collector among the open ones while the block runs, and yield it."
    collectors.append(new)
    try:
        yield new
    finally:
        collectors[:] = [c for c in collectors if c is not new]


_open: list[Counts] = []


@contextmanager
def counting() -> Iterator[Counts]:
    "Count dispatches inside the block: afterwards `counts[0].total.reads`, `counts.total.bytes`."
    with collecting(_open, Counts()) as counts:
        yield counts


def note(dispatch: Dispatch) -> None:
    "Record a kernel that has run in the open counts."
    for counts in _open:
        counts.append(dispatch)


def note_graph(
    kernels: int, # that it replays
) -> None:
    "Record a call of a graph in the open counts."
    for counts in _open:
        counts.graphs.append(kernels)
