"Rules about types: where pointers point, which objects have methods, what is converted without a cast."
import re

from tinyvllm.metalsim.lint_words import in_words_of_metal, line_at
from tinyvllm.metalsim.opencl import Complaints, Unit
from tinyvllm.metalsim.syntax_tree import Node

SPACE = re.compile(r'__(?:global|local|private|constant)\b')
ELSEWHERE = re.compile(r'__(?:global|local|constant)\b')  # not thread memory
CASTS = 'CStyleCastExpr', 'CXXFunctionalCastExpr', 'CXXStaticCastExpr', 'CXXReinterpretCastExpr'
DECLARATIONS = 'VarDecl', 'ParmVarDecl', 'FieldDecl', 'TypedefDecl', 'TypeAliasDecl'
FUNCTIONS = 'FunctionDecl', 'CXXMethodDecl', 'CXXConstructorDecl'


def pointers(unit: Unit) -> Complaints:
    "Each pointer and reference says where it points. MSL 4; Apple: 'must have explicit address space qualifier'."
    for node in unit.nodes:
        if not node.line or not node.types or node.is_implicit or node.parent and node.parent.is_implicit:
            continue
        if node.kind in FUNCTIONS:
            bad = points_anywhere(return_type(node.types[0]))
        else:
            bad = node.kind in (*DECLARATIONS, *CASTS) and all(map(points_anywhere, node.types))
        if bad and not is_array(unit, node):
            what = in_words_of_metal(node.types[0]) if node.kind in CASTS else node.name
            yield node.line, f"pointer or reference without an address space: '{what}'"


def unwritten(unit: Unit) -> Complaints:
    "The same of what clang does not print with a star: `(float&)x`, and `float*` as the argument of a template."
    for node in unit.nodes:
        is_lvalue = node.kind in CASTS and "' lvalue" in node.text and '__generic' in node.types[0]
        is_argument = node.kind == 'TemplateArgument' and re.search(r'__generic [^*&]*[*&]', node.text)
        line = node.parent.line if is_argument and node.parent else node.line
        if line and (is_lvalue or is_argument):
            yield line, f"pointer or reference without an address space: '{in_words_of_metal(node.types[0])}'"


def is_array(unit: Unit, node: Node) -> bool:
    "Is it a parameter such as `float x[4]`, which clang takes for a pointer? Apple's compiler takes it (MLX)."
    here = unit.lines[node.line - 1][node.column - 1:] if node.kind == 'ParmVarDecl' else ''
    return re.match(r'\w+\s*\[', here) is not None


def return_type(function: str) -> str:
    "Return the first part of a function's type, up to its parameters."
    depth = 0
    for i, c in enumerate(function):
        depth += (c == '<') - (c == '>')
        if c == '(' and depth == 0 and function[i + 1:i + 2] not in '*&':
            return function[:i]
    return function


def points_anywhere(written: str) -> bool:
    "Is there a `*` or a `&` behind a type that names no address space?"
    written = re.sub(r'\[[^\]]*\]|decltype\(.*\)', '', written)
    found = re.search(r'<([^<>]*)>', written)
    if found:
        return is_bare(found.group(1)) or points_anywhere(written[:found.start()] + written[found.end():])
    return is_bare(written)


def is_bare(written: str) -> bool:
    "The same without templates. Functions need no address space, nor does a `T*&` (MLX); `N * 2` is a product."
    for m in re.finditer(r'[*&]', written):
        before, behind = written[:m.start()].rstrip(), written[m.end():]
        is_function = re.search(r'\((?:__\w+)?$', before) and re.match(r'[^()]*\)\s*\(', behind)
        is_product = re.match(r'\s*(?!const\b|__)[\w(!~+-]', behind)
        pointee = re.split(r'[(,]', before.rstrip('('))[-1]
        to_pointer = m.group() == '&' and '*' in pointee or before.endswith('&')
        if not (is_function or is_product or to_pointer or SPACE.search(re.split(r'[*&]', pointee)[-1])):
            return True
    return False


def deduced(unit: Unit) -> Complaints:
    "`auto&` and `auto*` say where they point, too. Apple, as above; MLX writes `thread auto&`."
    for m in re.finditer(r'\bauto\b\s*(?:const\b\s*)?[&*]', unit.source):
        before = re.split(r'[;{}(,]', unit.source[:m.start()])[-1]
        if not re.search(r'\b(?:device|constant|threadgroup|thread)\b', before):
            yield line_at(unit.source, m.start()), "pointer or reference without an address space: 'auto'"


def methods(unit: Unit) -> Complaints:
    "A method works on objects in thread memory, unless it names another address space. MSL 4.7."
    ours = {node.id for node in unit.nodes if node.kind == 'CXXMethodDecl' and node.line}
    for node, cast in conversions(unit):
        member = cast.parent
        is_call = member is not None and member.kind == 'MemberExpr' and member.text.split()[-1] in ours
        if is_call and ELSEWHERE.search(node.types[0]):
            yield node.line, f"a method for objects in thread memory, called on '{in_words_of_metal(node.types[0])}'"


def halves(unit: Unit) -> Complaints:
    "half and bfloat become each other by a cast only. MSL 2.1, 3.1."
    for node, cast in conversions(unit):
        kinds = {re.sub(r'__\w+ |\bconst |_Float16', '', kind) or 'bfloat' for kind in (node.types[-1], cast.types[-1])}
        if kinds == {'half', 'bfloat'}:
            yield node.line, 'half and bfloat are converted by a cast only'


def conversions(unit: Unit) -> list[tuple[Node, Node]]:
    "Return what is converted without a cast, each with its conversion."
    return [(node, node.parent) for node in unit.nodes
            if node.line and node.types and node.parent and node.parent.is_conversion and node.parent.types]


def components(unit: Unit) -> Complaints:
    "The components of a vector are x, y, z, w or r, g, b, a; clang also knows `v.lo` and `v.s0`. MSL 2.2.2."
    for node in unit.nodes:
        if node.kind == 'ExtVectorElementExpr' and node.line:
            component = re.split(r"[' ]", node.text)[-1]
            if not re.fullmatch('[xyzw]+|[rgba]+', component):
                yield node.line, f"a vector of Metal has no component '{component}'"


def derived(unit: Unit) -> Complaints:
    "A class is derived from none of ours, but an empty template. MSL 1.4.4; MLX derives from `bool_constant`."
    ours = {class_name(node) for node in unit.nodes if node.kind == 'CXXRecordDecl' and node.line}
    filled = {class_name(node.parent) for node in unit.nodes if node.kind == 'FieldDecl' and node.parent}
    for node in unit.nodes:
        if node.kind in ('public', 'protected', 'private') and node.types and node.parent and node.parent.line:
            name, _, template = node.types[-1].rpartition('::')[2].partition('<')
            if name in filled or name in ours and not template:
                yield node.parent.line, f'derived classes are not in MSL: base {name}'


def class_name(declaration: Node) -> str:
    "Return the name of a class."
    found = re.search(r'\b(?:struct|class|union) (\w+)', declaration.text)
    return found.group(1) if found else ''
