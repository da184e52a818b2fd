"What tinygrad finds in place of its `tinygrad.runtime.ops_metal`; see `install`."
from tinyvllm.metalsim.command_buffers import to_ns_str, wait_check
from tinyvllm.metalsim.device import MetalAllocator, MetalBuffer, MetalCompiler, MetalDevice, MetalProgram

__all__ = ['MetalAllocator', 'MetalBuffer', 'MetalCompiler', 'MetalDevice', 'MetalProgram', 'to_ns_str', 'wait_check']
