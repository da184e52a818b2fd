"Rules about kernels: their parameters, attributes, buffers and threadgroup variables."
import re
from collections.abc import Iterator
from itertools import combinations

from tinyvllm.metalsim.lint_types import FUNCTIONS, class_name, return_type
from tinyvllm.metalsim.opencl import Complaints, Unit
from tinyvllm.metalsim.syntax_tree import Node, number

MAX_BUFFERS = 31
MAX_THREADGROUP_BYTES = 32768  # of Apple GPUs, in one threadgroup
POSITIONS = ('thread_position_in_grid', 'threads_per_grid', 'thread_position_in_threadgroup',
             'threads_per_threadgroup', 'dispatch_threads_per_threadgroup', 'threadgroup_position_in_grid',
             'threadgroups_per_grid', 'grid_origin', 'grid_size')
INDICES = ('thread_index_in_threadgroup', 'thread_index_in_simdgroup', 'thread_index_in_quadgroup',
           'simdgroup_index_in_threadgroup', 'quadgroup_index_in_threadgroup', 'simdgroups_per_threadgroup',
           'quadgroups_per_threadgroup', 'dispatch_simdgroups_per_threadgroup', 'dispatch_quadgroups_per_threadgroup',
           'threads_per_simdgroup', 'thread_execution_width')
SAME_TYPE = [('thread_position_in_grid', 'threads_per_grid'),
             *combinations(('thread_position_in_threadgroup', 'threads_per_threadgroup',
                            'dispatch_threads_per_threadgroup'), 2)]
NUMBER = re.compile(r'(bool|half|float|bfloat|(?:unsigned |u)?(?:char|short|int|long))'
                    r'(?: *__attribute__\(\(ext_vector_type\((\d)\)\)\))?')


def is_kernel(function: Node) -> bool:
    "Is it a kernel, or an instance of one?"
    return function.kind == 'FunctionDecl' and 'kernel' in function.annotations()


def kernels(unit: Unit) -> Iterator[tuple[Node, list[Node]]]:
    "Yield the kernels of a source, each with its parameters."
    for node in unit.nodes:
        if node.line and is_kernel(node):
            yield node, [child for child in node.children if child.kind == 'ParmVarDecl']


def number_of(parameter: Node) -> tuple[str, int] | None:
    "Return element and number of components, if the parameter is a number or a vector."
    found = NUMBER.fullmatch(re.sub(r'\b(?:const|__private)\b ?', '', parameter.types[-1]).strip())
    return (re.sub(r'^u(?!n)', 'unsigned ', found.group(1)), int(found.group(2) or 1)) if found else None


def names(unit: Unit) -> Complaints:
    "A kernel returns nothing, and is not called `main`. MSL 5.1.3, 1.4.4."
    for kernel, _ in kernels(unit):
        if kernel.name == 'main':
            yield kernel.line, 'a kernel cannot be called main'
        if return_type(kernel.types[0]).strip() != 'void':
            yield kernel.line, f'kernel {kernel.name} must return void'


def parameters(unit: Unit) -> Complaints:
    "A parameter points into device, constant or threadgroup memory, or is a position or an index. MSL 5.2."
    classes = {class_name(node) for node in unit.nodes if node.kind == 'CXXRecordDecl'}
    for _, found in kernels(unit):
        for p in found:
            written, attributes = p.types[-1], set(p.annotations())
            pointee = re.match(r'[^*&]*', written).group() if re.search('[*&]', written) else ''
            if '__private' in pointee:
                yield p.line, f"parameter '{p.name}' points into thread memory"
            elif '__local' in pointee and 'threadgroup' not in attributes:
                yield p.line, f"parameter '{p.name}' in threadgroup memory has no [[threadgroup(n)]]"
            elif not pointee and number_of(p) and not attributes & {*POSITIONS, *INDICES}:
                yield p.line, f"parameter '{p.name}' is a number, but no position or index of a thread"
            elif not pointee and set(re.findall(r'\w+', written)) & classes and 'stage_in' not in attributes:
                yield p.line, f"parameter '{p.name}' is a struct, neither a pointer nor a reference"


def positions(unit: Unit) -> Complaints:
    "Positions, sizes and indices of threads: type, components, each once. MSL 5.2.3.6."
    for _, found in kernels(unit):
        seen = {}
        for p in found:
            for attribute in set(p.annotations()) & {*POSITIONS, *INDICES}:
                if attribute in seen:
                    yield p.line, f'[[{attribute}]] is given twice'
                if re.search('[*&]', p.types[-1]):
                    yield p.line, f'[[{attribute}]] is a number, neither a pointer nor a reference'
                if number_of(p):
                    seen[attribute] = *number_of(p), p.line
        yield from position_types(seen)


def position_types(
    seen: dict[str, tuple[str, int, int]], # attribute -> element, components, line
) -> Complaints:
    "Compare the types of a kernel's attributes."
    for attribute, (element, n, line) in seen.items():
        is_position = attribute in POSITIONS
        if element not in ('unsigned int', 'unsigned short') or n > (3 if is_position else 1):
            yield line, f"[[{attribute}]] is a uint or ushort{', or a vector of 2 or 3' * is_position}"
    sizes = {n for attribute, (_, n, _) in seen.items() if attribute in POSITIONS}
    if len(sizes) > 1:
        line = max(line for _, _, line in seen.values())
        yield line, 'positions and sizes must all have the same number of components'
    for a, b in SAME_TYPE:
        if a in seen and b in seen and seen[a][:2] != seen[b][:2]:
            yield seen[b][2], f'[[{a}]] and [[{b}]] must be of the same type'
    index, position = seen.get('thread_index_in_threadgroup'), seen.get('thread_position_in_threadgroup')
    if index and position and position[0] == 'unsigned int' != index[0]:
        yield index[2], '[[thread_index_in_threadgroup]] is a uint where [[thread_position_in_threadgroup]] is one'


def buffers(unit: Unit) -> Complaints:
    "Buffers have indices from 0 to 30, each its own; a function constant may choose between two. MSL 5.2.1."
    for kernel, found in kernels(unit):
        seen = set()
        for p in found:
            attributes = p.annotations()
            for what in ('buffer', 'threadgroup'):
                index = attributes.get(what)
                if index is not None and not 0 <= index < MAX_BUFFERS:
                    yield p.line, f'{what} index {index}, the last one is {MAX_BUFFERS - 1}'
                if (what, index) in seen and 'function_constant' not in attributes:
                    yield p.line, f'two parameters have {what} index {index}'
                if index is not None:
                    seen.add((what, index))
        count = sum(bool(re.search(r'__(?:global|constant)\b[^*&]*[*&]', p.types[-1])) for p in found)
        if count > MAX_BUFFERS:
            yield kernel.line, f'{count} buffers ({MAX_BUFFERS} allowed)'


def calls(unit: Unit) -> Complaints:
    "No function calls a kernel. MSL 5.1."
    ours = {kernel.id: kernel.name for kernel, _ in kernels(unit)}
    for node in unit.nodes:
        found = re.search(r'Function (0x\w+)', node.text) if node.kind == 'DeclRefExpr' else None
        if found and found.group(1) in ours and node.above(FUNCTIONS):
            yield node.line, f'call of kernel {ours[found.group(1)]}'


def threadgroup_variables(unit: Unit) -> Complaints:
    "Threadgroup variables belong to kernels, and fit into 32 KB. MSL 4.4; Apple, when the pipeline is built."
    for node in unit.nodes:
        if node.kind == 'VarDecl' and node.line and any('__local threadgroup_type_' in t for t in node.types):
            function = node.above(FUNCTIONS)
            if function and not is_kernel(function):
                yield node.line, f"threadgroup variable '{node.name}' outside of a kernel"
    for kernel, _ in kernels(unit):
        size = threadgroup_bytes(kernel)
        if size > MAX_THREADGROUP_BYTES:
            yield kernel.line, f'{size} bytes of threadgroup variables ({MAX_THREADGROUP_BYTES} allowed)'


def threadgroup_bytes(node: Node) -> int:
    "Add up the threadgroup variables below a node, in bytes."
    if node.kind == 'EnumConstantDecl' and node.name.startswith('threadgroup_size_'):
        return number(node) or 0
    return sum(map(threadgroup_bytes, node.children))
