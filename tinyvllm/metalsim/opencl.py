"""Metal in clang's C++ for OpenCL, which knows address spaces as Apple's compiler does.

`device` is OpenCL's global memory, `threadgroup` local, `thread` private. Metal's library is declared in
metal_opencl.h, and kept precompiled. clang reads a source for its errors and its syntax tree; no code is made.
"""
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tinyvllm.device import short_hash, stamp, writable_dir
from tinyvllm.metalsim.compiler import compiler
from tinyvllm.metalsim.source import split_commas, strip_comments
from tinyvllm.metalsim.syntax_tree import FILE, Message, Node, messages, nodes

HEADER = Path(__file__).with_name('metal_opencl.h')
FLAGS = ['-cc1', '-triple', 'spir64-unknown-unknown', '-x', 'clcpp', '-cl-std=clc++2021',
         '-cl-single-precision-constant',
         '-cl-ext=-__opencl_c_device_enqueue,-__opencl_c_program_scope_global_variables,+cl_khr_fp16,'
         '+__cl_clang_function_pointers', '-fnative-half-type',
         '-fno-caret-diagnostics', '-ferror-limit', '0',
         '-Werror=vla', '-Werror=c++11-narrowing', '-Werror=zero-length-array']
PREAMBLE = ''.join(f'#pragma OPENCL EXTENSION {name} : enable\n' for name in (
    'cl_khr_fp16', '__cl_clang_function_pointers'))
LINE_DIRECTIVE = re.compile(r'^[ \t]*#[ \t]*line[ \t]+(\d+)(?:[ \t]+"([^"]*)")?.*$', re.M)
METAL_HEADER = re.compile(r'^([ \t]*)#[ \t]*include[ \t]*<(?:metal_\w+|simd/simd\.h)>', re.M)
ATTRIBUTES = re.compile(r'\[\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\]')
THREADGROUP = re.compile(r'(?:\balignas\s*\([^()]*\)\s*)?\bthreadgroup\b(?!_)')
VARIABLE = re.compile(r'\s*(?:alignas\s*\([^()]*\)\s*)?(?:const\s+)?(.*?)([A-Za-z_]\w*)\s*((?:\[[^\]]*\]\s*)*)'
                      r'(?:__attribute__\s*\(.*\)\s*)?$', re.DOTALL)
STANDARD_ATTRIBUTES = {'unlikely', 'likely', 'fallthrough', 'maybe_unused', 'nodiscard', 'deprecated', 'noreturn'}
NUMBERED_ATTRIBUTES = {'buffer', 'threadgroup'}
# A number without a suffix, which would be double in a template, or with the one of bfloat.
FLOAT = re.compile(r'(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(bf|BF)?(?![\w.])')
FUNCTION_POINTER = re.compile(r'[\w:<>&*\s]+?\(\s*\*\s*(\w+)\s*\)\s*\([^()]*\)')
FUNCTION_CONSTANT = re.compile(r'(__attribute__\(\(annotate\("function_constant"\)\)\)\s*);')


class OpenCLMissing(RuntimeError):
    "This compiler cannot read C++ for OpenCL."


def dialect(
    source: str, # Metal
) -> str: # the same in C++ for OpenCL, line by line
    "Rewrite what clang reads in another way: headers, numbers, attributes, declarations of threadgroup variables."
    text = LINE_DIRECTIVE.sub('', METAL_HEADER.sub(r'\1', strip_comments(source)))
    text = FLOAT.sub(lambda m: f'bfloat({m[1]}f)' if m[2] else f'{m[1]}f', text)
    text = ATTRIBUTES.sub(annotations, text)
    text = FUNCTION_CONSTANT.sub(r'\1 = {};', text)
    return storage(re.sub(r'(?<=\btemplate)(\s*<[^{};]*?>)(?=\s*(?:\w|\[|//))', function_parameters, text))


def function_parameters(header: re.Match) -> str:
    "Let a template take any function: clang does not find a pointer's type in `template <void (*f)(thread float&)>`."
    parts = split_commas(header.group(1).strip()[1:-1])
    kept = [FUNCTION_POINTER.sub(r' auto \1', part) if '(' in part else part for part in parts]
    return header.group(1).partition('<')[0] + f"<{','.join(kept)}>"


def annotations(attributes: re.Match) -> str:
    "Turn `[[a, b(1)]]` into annotations, which the syntax tree shows; the standard's own attributes stay."
    kept = []
    for attribute in split_commas(attributes.group(1)):
        name, _, argument = attribute.strip().partition('(')
        name = name.strip()
        if name in STANDARD_ATTRIBUTES or '::' in name:
            kept.append(f'[[{attribute}]]')
        elif name != 'host_name':
            number = f', {argument.strip()[:-1]}' if name in NUMBERED_ATTRIBUTES else ''
            kept.append(f'__attribute__((annotate("{name}"{number})))')
    return f" {' '.join(kept)} " + ''.join(re.findall(r'\\?\n', attributes.group(0)))


def storage(text: str) -> str:
    "Turn each `threadgroup T x[4];` into `MSL_TG(x, [4], T);`, which any function may hold, so that it is looked at."
    out, done = [], 0
    for m in THREADGROUP.finditer(text):
        end = declaration_end(text, m.end()) if m.start() >= done else None
        variables = [VARIABLE.match(part) for part in split_commas(text[m.end():end])] if end else [None]
        if all(variables) and variables[0].group(1).strip():
            kind = ' '.join(variables[0].group(1).split())
            macros = [f"MSL_TG({v.group(2)}, {' '.join(v.group(3).split())}, {kind})" for v in variables]
            out.append(text[done:m.start()] + ' '.join(macros) + '\n' * text.count('\n', m.start(), end))
            done = end + 1
    return ''.join(out) + text[done:]


def declaration_end(text: str, start: int) -> int | None:
    "Where the declaration of variables that begins at `start` ends; None if it is none, or one of pointers."
    at = start
    while at < len(text) and text[at] != ';':
        if text[at] in '[<' or text[at] == '(' and re.search(r'(?:alignas|__attribute__)\s*$', text[start:at]):
            at = closing(text, at)
        elif text[at] in '(){}=*&' or text[at] == ':' != text[at + 1] and text[at - 1] != ':':
            return None
        at += 1
    return at


def closing(text: str, start: int) -> int:
    "The place of the bracket that closes the one at `start`; the end of the text if none does."
    opens, closes, depth = text[start], {'[': ']', '<': '>', '(': ')'}[text[start]], 0
    for at in range(start, len(text)):
        depth += (text[at] == opens) - (text[at] == closes)
        if depth == 0:
            return at
    return len(text) - 1


Complaints = Iterator[tuple[int, str]]  # what a rule yields: a line of the source, what is wrong


@dataclass
class Unit:
    "A source that clang has read."
    source: str  # Metal, without comments
    lines: list[str]  # as clang has read them
    messages: list[Message]
    nodes: list[Node]


def read(
    source: str, # Metal
) -> Unit:
    "Let clang read a source. Raises `OpenCLMissing`."
    text = dialect(source)
    done = run(['-include-pch', str(precompiled()), '-fsyntax-only', '-ast-dump', '-'],
               f'{PREAMBLE}#line 1 "{FILE}"\n{text}\n')
    found = list(messages(done.stderr))
    if bool(done.returncode) != bool(found):
        raise OpenCLMissing(f'{compiler().command} failed: {done.stderr.strip()[:300]}')
    return Unit(strip_comments(source), text.split('\n'), found, list(nodes(done.stdout)))


def run(
    flags: list[str], # besides `FLAGS`
    text: str = '', # given on standard input
) -> subprocess.CompletedProcess:
    "Run clang's compiler proper; in the ziglang wheel it goes by zig's name."
    command = [compiler().command]
    if compiler().is_zig:
        command = [str(Path(importlib.util.find_spec('ziglang').origin).with_name('zig')), 'clang']
    return subprocess.run([*command, *FLAGS, *flags], input=text, capture_output=True, text=True)


@cache
def precompiled() -> Path:
    "Precompile our header once, in the cache folder. Raises `OpenCLMissing`."
    folder = writable_dir() / 'metalsim'
    key = repr((FLAGS, str(HEADER), HEADER.read_text(), stamp(compiler().command)))
    path = folder / f'opencl-{short_hash(key)}.pch'
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build:
            done = run(['-emit-pch', '-fno-pch-timestamp', '-o', f'{build}/header.pch', str(HEADER)])
            if done.returncode:
                raise OpenCLMissing(f'{compiler().command} reads no C++ for OpenCL: {done.stderr.strip()[:300]}')
            os.replace(f'{build}/header.pch', path)
    return path
