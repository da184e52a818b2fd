"What tinygrad finds in place of its `tinygrad.runtime.ops_metal`; see `install`."
from tinyvllm.metalsim.device import MetalAllocator, MetalBuffer, MetalCompiler, MetalDevice, MetalProgram

__all__ = ['MetalAllocator', 'MetalBuffer', 'MetalCompiler', 'MetalDevice', 'MetalProgram']
