"What clang says of a source: its errors, and the nodes of its syntax tree, read from the text that clang prints."
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

FILE = 'METAL'  # how the source is called in clang's messages and in its syntax tree
MESSAGE = re.compile(r'^(\S+?):(\d+):\d+: (error|fatal error|warning|note): (.*)$', re.M)
LINE = re.compile(r'([|`\- ]*)(value: |\w+)(?: (0x\w+))?(?: (?:parent|prev) 0x\w+)*(.*)')
RANGE = re.compile(r' <((?:[^<>]|<[^<>]*>)*)>( (?:\S*:)?\d+:\d+| col:\d+)?')
PLACE = re.compile(r'(?:(line|[^\s,<]+|<[^<>]*>):(\d+):|col:)(\d+)')
CONVERSIONS = '<AddressSpaceConversion>', '<FloatingCast>'
CALLED = ' Function 0x'
KINDS = frozenset('''VarDecl ParmVarDecl FieldDecl FunctionDecl CXXMethodDecl TypedefDecl TypeAliasDecl CXXRecordDecl
    EnumDecl EnumConstantDecl AnnotateAttr ConstantExpr value CStyleCastExpr CXXFunctionalCastExpr
    CXXStaticCastExpr CXXReinterpretCastExpr MemberExpr ExtVectorElementExpr TemplateArgument
    public protected private ClassTemplateSpecializationDecl CXXConstructorDecl'''.split())


@dataclass
class Message:
    "An error or a warning of clang, with the notes that follow it."
    line: int  # of the source; 0 if unknown
    text: str
    is_error: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass
class Node:
    "A node of the syntax tree."
    kind: str  # such as VarDecl
    line: int  # of the source; 0 outside of it
    column: int
    text: str  # what clang prints of it, from its name on
    id: str = ''
    parent: 'Node | None' = None
    children: list['Node'] = field(default_factory=list)

    @property
    def types(self) -> list[str]:
        "Its type as it is written, and as it is without aliases, if that differs."
        found = re.search(r"'([^']*)'(?::'([^']*)')?", self.text)
        return [t for t in found.groups() if t] if found else []

    @property
    def name(self) -> str:
        "The last word before its type."
        return (self.text.partition("'")[0].split() or [''])[-1]

    @property
    def is_conversion(self) -> bool:
        "Does it change an address space, or the precision, unasked?"
        return self.kind == 'ImplicitCastExpr' and self.text.endswith(CONVERSIONS)

    @property
    def is_implicit(self) -> bool:
        "Has clang made it?"
        return self.text.startswith('implicit')

    def above(self, kinds: tuple[str, ...]) -> 'Node | None':
        "The nearest node around it that is of one of these kinds."
        node = self.parent
        while node and node.kind not in kinds:
            node = node.parent
        return node

    def annotations(self) -> dict[str, int | None]:
        "Its attributes, with their number, if there is one."
        return {word(a): number(a) for a in self.children if a.kind == 'AnnotateAttr'}


def word(annotation: Node) -> str:
    "The name of an attribute."
    return annotation.text.strip().strip('"').split('"')[0].split()[0]


def number(node: Node) -> int | None:
    "The constant below a node, such as the number of an attribute `buffer(0)`."
    found = re.search(r'Int (-?\d+)', node.text) if node.kind == 'value' else None
    if found:
        return int(found.group(1))
    return next((n for n in map(number, node.children) if n is not None), None)


def messages(printed: str) -> Iterator[Message]:
    "Collect errors; the place of one in our header is that of the line which led there. Warnings are left out."
    message = None
    for place, line, kind, text in MESSAGE.findall(printed):
        if kind == 'note':
            message.notes.append(text)
            message.line = message.line or (int(line) if place == FILE else 0)
            continue
        if message and message.is_error:
            yield message
        message = Message(int(line) if place == FILE else 0, text, kind != 'warning')
    if message and message.is_error:
        yield message


def nodes(dump: str) -> Iterator[Node]:
    "Read clang's text of a syntax tree: the nodes of `KINDS`, in order."
    file, line, column, above = '', 0, 0, []
    for printed in dump.splitlines():
        if printed.endswith('<<<NULL>>>'):
            continue
        tree, kind, identity, rest = LINE.match(printed).groups()
        found = RANGE.match(rest)
        for name, number, col in PLACE.findall(found.group(0)) if found else ():
            file, line, column = file if name in ('', 'line') else name, int(number or line), int(col)
        while above and above[-1][0] >= len(tree):
            above.pop()
        parent = above[-1][1] if above else None
        is_kept = kind.rstrip(': ') in KINDS or rest.endswith(CONVERSIONS) or kind == 'DeclRefExpr' and CALLED in rest
        if not is_kept and not (parent and parent.is_conversion):
            continue
        text = rest[found.end():] if found else rest
        node = Node(kind.rstrip(': '), line if file == FILE else 0, column, text.strip(), identity or '', parent)
        if parent:
            parent.children.append(node)
        above.append((len(tree), node))
        yield node
