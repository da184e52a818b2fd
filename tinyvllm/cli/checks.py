"The table of `tinyvllm doctor`: which kernel runs on which devices, and which operation gives its cases."
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from tinyvllm.cli.cases import far, products, sampling, steps
from tinyvllm.cli.cases.far import FarAttentionCases, FarEmbedCases, FarProductCases, FarWriteCases
from tinyvllm.cli.cases.products import FORMAT_NAMES, ProductCases, RowCases, SwigluCases
from tinyvllm.errors import BadInput
from tinyvllm.kernels import cases as operations
from tinyvllm.kernels.cases import AttentionCases, MatmulCases

__all__ = ['CHECKS', 'FAR_CHECKS', 'LONG_CHECKS', 'TOLERANCE', 'Check', 'checks_for', 'find']

TOLERANCE = {'float16': 2e-3, 'float32': 1e-5, 'int32': 0}  # of max |got - want| / max |want|
HALF, SINGLE, EXACT = ('float16',), ('float32',), ('int32',)
GPUS = 'METAL', 'CUDA'
ALL = 'CPU', *GPUS


@dataclass(frozen=True)
class Check:
    "A kernel: on which devices it runs, and which operation gives its cases."
    kernel: str                 # module and launcher, such as 'softmax.decode'; with a folder if that is not kernels
    operation: object           # `make_case`, `make_load`, `shapes` and `variant`, as in `tinyvllm.kernels.cases`
    devices: tuple[str, ...]    # for which it has a source
    rung: str = ''              # one of the launcher's kernels, such as 'flash.FLASH_TILED'; '': its own choice
    part: int | None = None     # positions of a part, for split contexts; None: the launcher's choice
    dtypes: tuple[str, ...] = HALF + SINGLE
    most: int | None = None     # cases, where one takes long; None: as many as are asked for

    @property
    def name(self) -> str:
        "The launcher, and in brackets which of its variants, as in `simd.matvec[rows]`."
        words = [self.rung.split('_')[-1].lower(), f'part={self.part}' if self.part else '', self.operation.variant]
        variant, launcher = ' '.join(filter(None, words)), '.'.join(self.kernel.split('.')[-2:])
        return f'{launcher}[{variant}]' if variant else launcher

    def launcher(self) -> Callable:
        "Import the launcher and bind its variant."
        options = dict(rung=find(self.rung)) if self.rung else {}
        return partial(find(self.kernel), **options | (dict(part=self.part) if self.part else {}))


def find(path: str) -> object:
    "Import what a path such as 'softmax.decode' or 'runner.inputs.PREPARE' names."
    module, _, name = path.rpartition('.')
    return getattr(import_module(f'tinyvllm.{module}' if '.' in module else f'tinyvllm.kernels.{module}'), name)


PACKED = tuple(name for name in FORMAT_NAMES if name != 'bf16')       # which kernels of GPUs read
HALVES = tuple(name for name in PACKED if name != 'f32')              # those whose products are of halves
ONCE, SINGLE_ONCE = dict(dtypes=HALF, most=1), dict(dtypes=SINGLE, most=1)
CHECKS = (
    *(Check('simd.matvec', operations.MATVEC, GPUS, f'simd.MATVEC_{rung}')
      for rung in ('NAIVE', 'COALESCED', 'VECTOR', 'ROWS')),
    Check('simd.kv_write', operations.KV_WRITE, GPUS),
    Check('simd.decode_simple', operations.DECODE, GPUS),
    Check('softmax.decode', operations.DECODE, GPUS),
    Check('softmax.decode_split', operations.DECODE, GPUS),
    Check('softmax.decode_split', operations.DECODE, GPUS, part=32),
    Check('flash.flash', operations.PREFILL_STARTS, GPUS, 'flash.FLASH_TILED'),
    Check('flash.flash', operations.PREFILL_STARTS, ('METAL',), 'flash.FLASH_MATRIX', dtypes=HALF),
    Check('flash.flash', operations.PREFILL_STARTS, ('CUDA',), 'flash_cuda.FLASH_CUDA', dtypes=HALF),
    Check('cpu.matvec', operations.MATVEC, ('CPU',)),
    Check('cpu.matmul', operations.MATMUL, ('CPU',)),
    Check('cpu.kv_write', operations.KV_WRITE, ('CPU',)),
    Check('cpu.attend', operations.DECODE, ('CPU',)),
    Check('cpu.attend', operations.PREFILL, ('CPU',)),
    *(Check('linear_gpu.gpu_linear', ProductCases(name, 'lanes'), GPUS,
            dtypes=HALF + SINGLE * (name in ('f32', 'f16', 'int4-g32'))) for name in PACKED),
    *(Check('linear_gpu.gpu_linear', ProductCases(name, 'tiles'), GPUS, dtypes=HALF) for name in HALVES),
    *(Check('linear_gpu.gpu_linear', ProductCases(name, 'stream'), ('CUDA',), dtypes=HALF) for name in HALVES),
    Check('linear_gpu.gpu_swiglu', SwigluCases(PACKED, 'lanes'), GPUS),
    Check('linear_gpu.gpu_swiglu', SwigluCases(HALVES, 'tiles'), GPUS, dtypes=HALF),
    Check('linear_gpu.gpu_swiglu', SwigluCases(HALVES, 'stream'), ('CUDA',), dtypes=HALF),
    Check('linear_gpu.gpu_embed', RowCases(PACKED, unknown='clamped'), GPUS),
    Check('linear_gpu.launch_rows', RowCases(PACKED, picked=False), GPUS),
    Check('linear_tiles.rms_norm', products.RMS_NORM, GPUS),
    *(Check('linear_cpu.cpu_linear', ProductCases(name), ('CPU',), dtypes=SINGLE) for name in FORMAT_NAMES),
    Check('linear_cpu.cpu_swiglu', SwigluCases(FORMAT_NAMES), ('CPU',), dtypes=SINGLE),
    Check('rows_cpu.cpu_embed', RowCases(FORMAT_NAMES, unknown='zeros'), ('CPU',), dtypes=SINGLE),
    Check('models.fused.rope_write', steps.ROPE_WRITE, ALL),
    Check('runner.inputs.PREPARE', steps.PREPARE, ALL, dtypes=EXACT),
    Check('masks.apply_constraints', sampling.CONSTRAINTS, ALL, dtypes=SINGLE),
    Check('penalties.apply_penalties', sampling.PENALTIES, ALL, dtypes=SINGLE),
    Check('sampler.sample_tokens', sampling.SAMPLE, ALL, dtypes=SINGLE),
    Check('top_tokens.find_top_tokens', sampling.TOP_TOKENS, ALL, dtypes=SINGLE),
    Check('runner.sampled_tokens.PUBLISH', steps.PUBLISH, ALL, dtypes=EXACT),
)
LONG_DECODE, LONG_PREFILL = AttentionCases(context=8192), AttentionCases(True, True, context=4096)
LONG_CHECKS = (
    *(Check(kernel, LONG_DECODE, GPUS, **ONCE) for kernel in ('simd.decode_simple', 'softmax.decode')),
    Check('softmax.decode_split', LONG_DECODE, GPUS, part=4096, **ONCE),
    Check('flash.flash', LONG_PREFILL, GPUS, 'flash.FLASH_TILED', **ONCE),
    Check('flash.flash', LONG_PREFILL, ('METAL',), 'flash.FLASH_MATRIX', **ONCE),
    Check('flash.flash', LONG_PREFILL, ('CUDA',), 'flash_cuda.FLASH_CUDA', **ONCE),
    *(Check('simd.matvec', MatmulCases(columns=16384), GPUS, f'simd.MATVEC_{rung}', **ONCE)
      for rung in ('NAIVE', 'COALESCED', 'VECTOR', 'ROWS')),
    *(Check('linear_gpu.gpu_linear', ProductCases(name, rung, columns), devices, dtypes=HALF, most=2)
      for rung, columns, devices, names in (('lanes', 16384, GPUS, ('f16', 'int4-g32', 'q6_k')),
                                            ('tiles', 4096, GPUS, ('f16', 'int4-g32', 'q6_k')),
                                            ('stream', 16384, ('CUDA',), ('f16', 'int4-g32'))) for name in names),
)
FAR_CHECKS = (
    *(Check(kernel, FarAttentionCases(elements=elements), GPUS, **ONCE) for elements in (far.FAR, far.FARTHER)
      for kernel in ('simd.decode_simple', 'softmax.decode')),
    Check('softmax.decode_split', FarAttentionCases(), GPUS, part=32, **ONCE),
    Check('flash.flash', FarAttentionCases(True), GPUS, 'flash.FLASH_TILED', **ONCE),
    Check('flash.flash', FarAttentionCases(True), ('METAL',), 'flash.FLASH_MATRIX', **ONCE),
    Check('flash.flash', FarAttentionCases(True), ('CUDA',), 'flash_cuda.FLASH_CUDA', **ONCE),
    Check('cpu.attend', FarAttentionCases(), ('CPU',), **ONCE),
    *(Check('simd.kv_write', FarWriteCases(elements), GPUS, **ONCE) for elements in (far.FAR, far.FARTHER)),
    Check('cpu.kv_write', FarWriteCases(), ('CPU',), **ONCE),
    Check('models.fused.rope_write', far.FAR_ROPE, ALL, **ONCE),
    *(Check('linear_gpu.gpu_embed', FarEmbedCases(name), GPUS, **ONCE) for name in ('f16', 'int4-g32', 'q6_k')),
    *(Check('rows_cpu.cpu_embed', FarEmbedCases(name), ('CPU',), **SINGLE_ONCE)
      for name in ('f16', 'int4-g32', 'q6_k')),
    *(Check('linear_gpu.gpu_linear', FarProductCases(name, rung), devices, **ONCE)
      for rung, name, devices in (('lanes', 'f16', GPUS), ('lanes', 'int4-g32', GPUS), ('tiles', 'f16', GPUS),
                                  ('tiles', 'int4-g32', ('METAL',)), ('stream', 'int4-g32', ('CUDA',)))),
    Check('linear_cpu.cpu_linear', FarProductCases('int4-g32'), ('CPU',), **SINGLE_ONCE),
    Check('linear_gpu.launch_rows', far.FAR_ROWS, GPUS, **ONCE),
    Check('linear_tiles.rms_norm', far.FAR_NORM, GPUS, **ONCE),
    Check('masks.apply_constraints', far.FAR_CONSTRAINTS, GPUS, **SINGLE_ONCE),
    Check('penalties.apply_penalties', far.FAR_PENALTIES, GPUS, **SINGLE_ONCE),
    Check('sampler.sample_tokens', far.FAR_SAMPLE, GPUS, **SINGLE_ONCE),
    Check('top_tokens.find_top_tokens', far.FAR_TOP_TOKENS, GPUS, **SINGLE_ONCE),
)
CHECKS += LONG_CHECKS + FAR_CHECKS


def checks_for(
    device: str, # tinygrad's name
    kernel: str | None = None, # only this: a module, a function, 'module.function', or a name of the table
) -> list[Check]:
    "Return the checks for a device. Raises `BadInput` where there are none."
    kind = device.split(':')[0]
    here = [check for check in CHECKS if kind in check.devices]
    if not here:
        known = sorted({d for check in CHECKS for d in check.devices})
        raise BadInput(f'no kernel of tinyvllm runs on {device}, so there is nothing to check; '
                       f'{", ".join(known)} have some')
    found = [check for check in here
             if kernel in (None, check.name, check.name.split('[')[0], *check.kernel.split('.'))]
    if not found:
        raise BadInput(f'no kernel {kernel!r} on {device}; there are {", ".join(check.name for check in here)}')
    return found
