"""What a kernel's text becomes before registers are given out: operations by kind, and arrays that stay in memory.

Apple's compiler is a clang, and so is ours; up to LLVM's intermediate code both do the same. Here a loop is written out
only where the source asks for it (`unrolled`, `#pragma unroll`). What is counted is therefore what the text promises:
Apple's compiler may write out more. How many registers it needs, and what it spills, this cannot say.
"""
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tinyvllm.metalsim.compiler import MetalCompileError, compiler, complaints
from tinyvllm.metalsim.source import rewritten

FLAGS = ['-DMSL_LINT', '-O2', '-ffp-contract=on', '-fno-math-errno', '-fno-unroll-loops', '-fno-vectorize',
         '-fno-slp-vectorize', '-fno-discard-value-names', '-mllvm', '-inline-threshold=100000',
         '-S', '-emit-llvm', '-o']
# The headers go through a vector's numbers in loops, which an instruction of a GPU does not.
LIBRARY = '#define for _Pragma("unroll") for\n#include <metal_stdlib>\n#undef for\n#include <opaque.h>\n'
# Names that opaque.h declares.
OPAQUE = re.compile(r'\b(?:(fast)::|precise::|metal::)?(exp2?|rsqrt|threadgroup_barrier'
                    r'|simdgroup_(?:load|store|multiply_accumulate)'
                    r'|simd_(?:sum|max|min|broadcast|shuffle(?:_xor|_down)?))\b')
ARRAY = re.compile(r'%([\w.]+) = alloca ([^\n]*?), align')
OPERATION = re.compile(r'^  (?:%[\w.]+ = |)(?:tail |)([a-z]+)\b(.*)$', re.M)
KINDS = {'fadd': 'float', 'fsub': 'float', 'fmul': 'float', 'fdiv': 'float', 'fneg': 'float', 'fcmp': 'float',
         'br': 'branch', 'switch': 'branch', 'select': 'select', 'getelementptr': 'address',
         **dict.fromkeys(('add', 'sub', 'mul', 'shl', 'lshr', 'ashr', 'and', 'or', 'xor', 'icmp'), 'int'),
         **dict.fromkeys(('sdiv', 'udiv', 'srem', 'urem'), 'division'),
         **dict.fromkeys(('fptrunc', 'fpext', 'sitofp', 'uitofp', 'fptosi', 'fptoui'), 'convert')}
CALLS = {'simd_': 'simd', 'matrix_': 'matrix', 'barrier': 'barrier', 'fast_exp': 'fast exp', 'exp': 'exp',
         'rsqrt': 'rsqrt', 'llvm.fm': 'float', 'llvm.max': 'float', 'llvm.min': 'float', 'llvm.smin': 'int',
         'llvm.smax': 'int', 'llvm.umin': 'int', 'llvm.umax': 'int'}
CALLED = re.compile(f"@[\\w.]*?({'|'.join(map(re.escape, CALLS))})")
VECTOR = re.compile(r'<(\d+) x ')
SPACES = {'1': 'device', '2': 'constant', '3': 'threadgroup', None: 'thread'}


@dataclass(frozen=True)
class Operations:
    "Operations of a source, by kind, each as often as it stands there; one on a vector counts for each number."
    kinds: Counter[str]
    arrays: tuple[str, ...]  # of a thread, that stay in memory, with their types

    @property
    def total(self) -> int:
        "All operations."
        return self.kinds.total()


def count_operations(
    source: str, # Metal
    name: str = 'kernel.metal', # of the source, for messages
) -> Operations:
    "Compile a source to LLVM's intermediate code and count; raises `MetalCompileError`."
    code, kinds = intermediate(source, name), Counter()
    for what, times in filter(None, map(kind, OPERATION.finditer(code))):
        kinds[what] += times
    return Operations(kinds, tuple(f'{n} {t}' for n, t in ARRAY.findall(code) if t.startswith('[')))


def intermediate(source: str, name: str) -> str:
    "Compile to LLVM's intermediate code, with address spaces as on a GPU."
    text = OPAQUE.sub(lambda m: 'opaque::' + 'fast_' * bool(m.group(1)) + m.group(2), rewritten(source))
    text = f'{LIBRARY}#line 1 "{name}"\n{text}\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'kernel.ll')
        done = compiler().run([*compiler().flags, *FLAGS, str(path)], text)
        if done.returncode:
            raise MetalCompileError('\n'.join(complaints(done.stderr, name)))
        return path.read_text()


def kind(operation: re.Match) -> tuple[str, int] | None:
    "What an operation is, and of how many numbers; None if it only names or moves registers."
    opcode, rest = operation.groups()
    if opcode in ('load', 'store'):
        return memory(rest), 1
    called = CALLED.search(rest) if opcode == 'call' else None
    found = CALLS[called.group(1)] if called else KINDS.get(opcode)
    if found == 'int' and re.search(r'\bi64\b', rest) or opcode in ('sext', 'zext') and ' to i64' in rest:
        found = 'long'
    width = VECTOR.search(rest) if found in ('float', 'int', 'long', 'convert', 'select') else None
    return (found, int(width.group(1)) if width else 1) if found else None


def memory(operands: str) -> str:
    "The address space of a load or a store."
    space = re.search(r'addrspace\((\d)\)\*? %', operands)
    return SPACES[space.group(1) if space else None]
