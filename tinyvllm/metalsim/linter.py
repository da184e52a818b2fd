"""What Metal's own compiler would refuse, although C++ takes it.

Three looks: words that the language lacks; declarations without an address space; and a compilation
with numbered address spaces, where mixing them is an error and a cast between them leaves a trace.
"""
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinyvllm.metalsim.compiler import compiler, complaints
from tinyvllm.metalsim.source import POSITIONS, Signature, rewritten, signatures, strip_comments

MAX_BUFFERS = 31
FORBIDDEN = [
    (r'\bdouble\b', 'double is not in MSL'),
    (r'\blong\s+double\b', 'long double is not in MSL'),
    (r'\bgoto\b', 'goto is not in MSL'),
    (r'\bnew\b|\bdelete\b', 'new/delete are not in MSL'),
    (r'\bthrow\b|\btry\b|\bcatch\b', 'exceptions are not in MSL'),
    (r'\bvirtual\b|\bdynamic_cast\b|\btypeid\b', 'virtual/RTTI are not in MSL'),
    (r'\bstd::', 'std:: is not in MSL'),
    (r'\bthread_local\b', 'thread_local is not in MSL'),
    (r'#include\s*<(?!metal_)', 'only <metal_*> headers exist'),
    (r'\[[&=]?\]\s*\(', 'no lambdas before Metal 3.2'),
    (r'\bsigned_char\d', 'no such vector type (tinygrad int8 vectors)')]
BUILTIN_TYPE = (r'(?:void|float|half|bfloat|int|uint|char|uchar|short|ushort|long|ulong|bool'
                r'|u?int(?:8|16|32|64)_t)[234]?')
POINTER = re.compile(rf'(?<![\w:<])((?:\b(?:const|volatile)\s+)*)\b{BUILTIN_TYPE}\s*(?:const\s*)?[*&]+\s*'
                     r'(?:const\s+|restrict\s+)*[A-Za-z_]\w*\s*(?=[=;,)\[])')
CONSTANT = re.compile(r'^[ \t]*(?:static\s+)?(?:constexpr|const)\s[^(;{]*[;={]', re.M)
ADDRESS_SPACE = re.compile(r'\b(device|constant|threadgroup|thread)\b')


def lint(
    source: str, # Metal
    name: str = 'kernel.metal', # of the source, for messages
) -> list[str]: # complaints, each with its line; empty if there are none
    "List what Metal's compiler would refuse."
    text = strip_comments(source)
    found = [f'{name}:{text.count(chr(10), 0, at) + 1}: {why}'
             for look in (forbidden, constants, pointers) for at, why in look(text)]
    found += [f'{name}: kernel {k.name}: {why}' for k in signatures(source) for why in parameters(k)]
    return found + address_spaces(source, name)


def forbidden(text: str) -> Iterator[tuple[int, str]]:
    "Find words that the language lacks."
    for pattern, why in FORBIDDEN:
        for m in re.finditer(pattern, text):
            yield m.start(), why


def constants(text: str) -> Iterator[tuple[int, str]]:
    "Find variables outside of functions that are not `constant`."
    depth, outside = 0, []
    for c in text:
        depth += (c == '{') - (c == '}')
        outside.append(c if depth == 0 or c == '\n' else ' ')
    for m in CONSTANT.finditer(''.join(outside)):
        if not re.search(r'\bconstant\b', m.group(0)):
            yield m.start(), 'program-scope variable must be `constant`'


def pointers(text: str) -> Iterator[tuple[int, str]]:
    "Find pointers and references to built-in types without an address space."
    for m in POINTER.finditer(text):
        before = re.split(r'[;{}(,]', text[:m.start()])[-1]
        is_declaration = re.fullmatch(r'\s*(const|volatile|\s)*', before)
        if is_declaration and not ADDRESS_SPACE.search(before + m.group(1)):
            yield m.start(), f'pointer or reference without an address space: `{m.group(0).strip()}`'


def parameters(kernel: Signature) -> Iterator[str]:
    "Check a kernel's parameters: address spaces, indices, numbers of components."
    sizes = {re.sub(r'\D', '', p.type.replace('const', '')) for p in kernel.parameters if p.builtin in POSITIONS}
    if len(sizes) > 1:
        yield 'grid position/size attributes must all have the same number of components'
    for p in kernel.parameters:
        if not p.builtin and not re.search(r'\b(device|constant|threadgroup)\b', p.type):
            yield f"parameter '{p.name}' has no address space"
    indices = [p.index for p in kernel.parameters if p.index is not None]
    if len(indices) > MAX_BUFFERS:
        yield f'{len(indices)} buffers ({MAX_BUFFERS} allowed)'
    if len(set(indices)) < len(indices):
        yield 'two parameters share a buffer index'


def address_spaces(source: str, name: str) -> list[str]:
    "Compile with each address space as a type of its own; return the errors and casts."
    text = f'#include <metal_stdlib>\n#line 1 "{name}"\n{rewritten(source)}\n'
    flags = [*compiler().flags, '-DMSL_LINT', '-O0', '-gline-tables-only', '-S', '-emit-llvm', '-o']
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'lint.ll')
        done = compiler().run([*flags, str(path)], text)
        if done.returncode:
            return complaints(done.stderr, name)
        code = path.read_text()
    # An explicit cast is legal C++ but not Metal: it leaves an addrspacecast in the intermediate code.
    lines = dict(re.findall(r'^(!\d+) = !DILocation\(line: (\d+)', code, re.M))
    casts = re.finditer(r'addrspacecast[^\n]*?(?:!dbg (!\d+))?$', code, re.M)
    return [f"{name}:{lines.get(m.group(1), '?')}: cast between address spaces" for m in casts]
