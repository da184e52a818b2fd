"""Command buffers and strings, held as tinygrad holds Metal's: they die with the thread that made them.

By reading tinygrad 0.14 (`ops_metal.py`, `graph/metal.py`, `support/objc.py`); no Mac was at hand.
- `commandBuffer()`, `computeCommandEncoder()`, `indirectComputeCommandAtIndex()` return objects that belong
  to the autorelease pool of the calling thread. tinygrad's `.retained()` sends no `retain`: it only lets
  Python release the object once more, when its wrapper dies. One reference, two releases.
- A thread's pool drains when the thread ends. What Python has released by then, such as the encoder of
  every dispatch, is released again: the process crashes there (tw93/Kaku#325, llama.cpp#4970). What
  Python still holds is freed, and the next message to it or its release crashes.
- `to_ns_str` keeps strings for the whole process and retains none: they are freed with the pool of the
  thread that was first to ask. (On arm64 some strings of up to 11 letters live in the pointer itself and
  survive; nothing can rely on that, so here none does.)
- The pool of the main thread never drains.
So a thread that has used METAL may not end before the process does. Here the first use after such an end
raises `MetalError`, once for each thread; so does every use of a dead object.
"""
import os
import threading
import time
from collections.abc import Callable, Iterable

from tinyvllm.metalsim.compiler import MetalError

GPU_TIMEOUT = 5.0  # seconds: macOS stops a command buffer that takes longer (exo-explore/exo#1620 and others)
TIMEOUT_ERROR = ('Execution of the command buffer was aborted due to an error during execution. '
                 'Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)')
# The slowest GPU that is served, an M1 with 8 cores: 68 GB/s, 2.6 TFLOP/s in float32 (Apple's numbers).
M1_BANDWIDTH, M1_FLOPS = 68e9, 2.6e12
SHARE = 0.3  # of both that our kernels are credited with; llama.cpp has 60 % in prefill (its discussion 4167)

_pools: dict[threading.Thread, int] = {}  # how many objects each thread's pool will release
_strings: dict[str, 'NSString'] = {}  # that `to_ns_str` keeps


def has_ended(thread: threading.Thread) -> bool:
    "Has its autorelease pool drained? That of the main thread never does, not even at exit."
    return thread is not threading.main_thread() and not thread.is_alive()


def autorelease(
    count: int = 1, # objects
) -> threading.Thread: # the calling one
    "Put objects into the pool of the calling thread."
    thread = threading.current_thread()
    _pools[thread] = _pools.get(thread, 0) + count
    return thread


class AutoreleasedObject:
    "What an Objective-C call returns without a reference of its own: it lives as long as its thread."

    def __init__(self,
        name: str, # for messages
    ):
        self.name, self.thread = name, autorelease()

    def check_alive(self) -> None:
        "Raise `MetalError` if the thread that made it has ended."
        if has_ended(self.thread):
            raise MetalError(f'{type(self).__name__} {self.name!r} is used after its end: '
                             f'the autorelease pool of thread {self.thread.name} drained when it ended')


class NSString(AutoreleasedObject):
    "A string of Metal's, such as a label."

    @property
    def text(self) -> str:
        "Its characters. Raises `MetalError` after the end of its thread."
        self.check_alive()
        return self.name


def to_ns_str(s: str) -> NSString:
    "A string for Metal; the same one for the same text, whichever thread made it."
    if s not in _strings:
        _strings[s] = NSString(s)
    return _strings[s]


class MTLCommandBuffer(AutoreleasedObject):
    """Commands that the GPU runs in one go, after those of the command buffers before it.

    They have run when it is committed. With $METALSIM_DEFER=1 they run when somebody waits, as late as
    they may on a GPU: what the host changes meanwhile, they see changed.
    """

    def __init__(self,
        label: NSString, # name of a kernel, or `batched n`
        queue: list['MTLCommandBuffer'], # of its device: those that were committed and have not run
    ):
        super().__init__(label.text)
        self.queue, self.commands = queue, []
        self.error, self.seconds, self.start, self.end = None, 0.0, 0.0, 0.0

    @property
    def label(self) -> str:
        "Its label. Raises `MetalError` after the end of its thread."
        self.check_alive()
        return self.name

    def commit(self,
        commands: Iterable[tuple[Callable, float]], # what runs each, and its simulated seconds
    ) -> None:
        "Put the commands into the queue."
        self.commands = list(commands)
        self.queue.append(self)
        if os.environ.get('METALSIM_DEFER', '0') == '0':
            self.wait_until_completed()

    def wait_until_completed(self) -> None:
        "Run what is in the queue, up to these commands."
        while self in self.queue:
            self.queue.pop(0).run()

    def run(self) -> None:
        "Run the commands; those that begin after the GPU's timeout do not run any more."
        self.start = time.perf_counter()
        for run, seconds in self.commands:
            self.seconds += seconds
            if self.seconds > GPU_TIMEOUT:
                self.error = TIMEOUT_ERROR
                break
            run()
        self.commands, self.end = [], time.perf_counter()


def wait_check(cbuf: MTLCommandBuffer) -> None:
    "Wait until a command buffer has ended. Raises its error as tinygrad does, a `RuntimeError`."
    cbuf.check_alive()
    cbuf.wait_until_completed()
    if cbuf.error:
        raise RuntimeError(cbuf.error)


def estimate_seconds(
    ops: float, # arithmetic operations
    nbytes: float, # read and written
) -> float:
    "How long an M1 would take for a kernel, whichever of both is slower."
    return max(ops / M1_FLOPS, nbytes / M1_BANDWIDTH) / SHARE


def check_pools() -> None:
    """Raise `MetalError` for a thread that has used METAL and has ended since: once for each.

    The process goes on as if it had been started again: without the strings of that thread.
    """
    for thread in filter(has_ended, list(_pools)):
        count = _pools.pop(thread)
        for text in [text for text, string in list(_strings.items()) if string.thread is thread]:
            del _strings[text]
        raise MetalError(f'a Mac would have crashed: the autorelease pool of thread {thread.name} drained '
                         f'when it ended, and released {count} objects that tinygrad releases itself')
