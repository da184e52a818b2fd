"""What a Mac finds out when it builds a kernel's pipeline, after the source has compiled.

A GPU below Apple7 lacks functions that the compiler's front end takes: building the pipeline fails
there (ggml-org/llama.cpp#2564). Which family has what is in Apple's table of Metal features.
"""
import os
import re

from tinyvllm.metalsim.source import MAX_THREADS, strip_comments

MOST_THREADS = 1024
# What a source uses, the first family of Apple's GPUs that has it, and whether Mac2 (Intel Macs) has it.
FEATURES = [
    (r'simdgroup_(?:matrix|multiply\w*|load|store|\w+8x8)\b', 7, False),
    (r'simd_(?:sum|product|min|max|and|or|xor|prefix\w+)\b', 7, True),
    (r'simd_shuffle_and_fill\w*', 8, False),
    (r'simd_(?:shuffle\w*|broadcast\w*|ballot|all|any|vote|is_first)\b', 6, True),
    (r'quad_\w+', 4, True),
    (r'\bbfloat\w*', 6, False)]


def parse_family(
    arch: str, # tinygrad's name of a family: Apple9, Mac2
) -> tuple[str, int]: # ('Apple', 9)
    "Split a family's name. What has no number is older than all."
    name, number = re.fullmatch(r'([A-Za-z]*)(\d*)', arch).groups()
    return name, int(number or 0)


def missing_feature(
    source: str, # Metal
    arch: str, # tinygrad's name of the GPU's family
) -> str | None: # such as `simd_sum`
    "The first function of a source that a GPU lacks; None if it has all."
    (kind, number), text = parse_family(arch), strip_comments(source)
    for pattern, first, on_mac in FEATURES:
        has = on_mac and number >= 2 if kind == 'Mac' else number >= first
        found = None if has else re.search(pattern, text)
        if found:
            return found.group(0)


def build_pipeline(
    source: str, # Metal
    name: str, # of the kernel
    arch: str, # tinygrad's name of the GPU's family
) -> int: # most threads of a threadgroup
    """Build a pipeline as a Mac's driver does. Raises `RuntimeError`, as tinygrad does.

    $METALSIM_REFUSE names kernels that are refused. $METALSIM_MAX_THREADS is what the registers allow
    a kernel that declares no maximum; one that does is built for so many.
    """
    if feature := missing_feature(source, arch):
        raise RuntimeError(f'Encountered unlowered function call to air.{feature}')
    if name in os.environ.get('METALSIM_REFUSE', '').split(','):
        raise RuntimeError(f'{name}: Compiler encountered an internal error')
    declared = MAX_THREADS.findall(strip_comments(source))
    return int(declared[-1] if declared else os.environ.get('METALSIM_MAX_THREADS', MOST_THREADS))
