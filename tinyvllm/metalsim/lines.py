"""Which line of the source an address of the compiled kernel belongs to, without binutils.

The compiler leaves a table in the shared object: a program for a little machine with an address and
a line (section 6.2 of DWARF 4), whose instructions mostly say "so many bytes, so many lines on".
"""
import struct
from collections.abc import Iterator
from pathlib import Path

HEADERS, ENTRY = 0x28, struct.Struct('<II4Q')  # ELF: offset of the section table; start of an entry
COPY, ADVANCE_PC, ADVANCE_LINE, CONST_ADD_PC, FIXED_ADVANCE_PC = 1, 2, 3, 8, 9
END_SEQUENCE, SET_ADDRESS = 1, 2  # extended: after a zero and a length


class ByteReader:
    "Reads numbers from bytes, one after the other."

    def __init__(self, data: bytes, at: int = 0):
        self.data, self.at = data, at

    def number(self, size: int) -> int:
        "Read an unsigned number of `size` bytes, little end first."
        self.at += size
        return int.from_bytes(self.data[self.at - size:self.at], 'little')

    def leb(self, signed: bool = False) -> int:
        "Read a number in groups of seven bits (LEB128)."
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 0x7f) << shift
            shift += 7
            if byte < 0x80:
                return value - (1 << shift) if signed and byte & 0x40 else value


class LineProgram:
    "The line table of one compilation: iterate for addresses and lines; line 0 where a run of code ends."

    def __init__(self,
        data: bytes, # with its length in front
    ):
        self.reader = reader = ByteReader(data, at=4)
        version = reader.number(2)
        if version >= 5:
            reader.at += 2  # sizes of addresses and of segments
        start = reader.number(4) + reader.at
        self.step = reader.number(1)  # bytes of the shortest instruction of the processor
        reader.at += 2 if version >= 4 else 1
        self.line_base, self.line_range, self.first = reader.number(1) - 256, reader.number(1), reader.number(1)
        self.operands = [reader.number(1) for _ in range(self.first - 1)]
        reader.at, self.address, self.line = start, 0, 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while self.reader.at < len(self.reader.data):
            code = self.reader.number(1)
            if code >= self.first:
                self.address += (code - self.first) // self.line_range * self.step
                self.line += self.line_base + (code - self.first) % self.line_range
                yield self.address, self.line
            elif code == COPY:
                yield self.address, self.line
            elif code:
                self.run_standard(code)
            elif (yield from self.run_extended()):
                self.address, self.line = 0, 1

    def run_standard(self, code: int) -> None:
        "Run an instruction that moves the address or the line; skip any other, with its operands."
        if code == ADVANCE_PC:
            self.address += self.reader.leb() * self.step
        elif code == ADVANCE_LINE:
            self.line += self.reader.leb(signed=True)
        elif code == CONST_ADD_PC:
            self.address += (255 - self.first) // self.line_range * self.step
        elif code == FIXED_ADVANCE_PC:
            self.address += self.reader.number(2)
        else:
            for _ in range(self.operands[code - 1]):
                self.reader.leb()

    def run_extended(self) -> Iterator[tuple[int, int]]:
        "Run an instruction with its length in front; returns whether a run of code ends."
        end = self.reader.leb() + self.reader.at
        kind = self.reader.number(1)
        if kind == END_SEQUENCE:
            yield self.address, 0
        elif kind == SET_ADDRESS:
            self.address = self.reader.number(8)
        self.reader.at = end
        return kind == END_SEQUENCE


def line_of(
    path: Path, # a shared object
    address: int, # in it
) -> int: # 0 if the table has none
    "Find the line of the source that an address belongs to."
    start = line = 0
    for unit in units(section(path.read_bytes(), b'.debug_line')):
        for end, next_line in LineProgram(unit):
            if start <= address < end and line:
                return line
            start, line = end, next_line
    return 0


def section(
    elf: bytes, # a file, 64 bits, little end first
    name: bytes, # such as `.debug_line`
) -> bytes: # empty if there is none
    "Find a section of a file in ELF format."
    start, = struct.unpack_from('<Q', elf, HEADERS)
    size, count, names = struct.unpack_from('<HHH', elf, HEADERS + 18)
    entries = [ENTRY.unpack_from(elf, start + i * size) for i in range(count)]
    if not entries:
        return b''
    strings = entries[names][4]
    for label, _, _, _, offset, length in entries:
        if elf[strings + label:elf.index(b'\0', strings + label)] == name:
            return elf[offset:offset + length]
    return b''


def units(table: bytes) -> Iterator[bytes]:
    "Split a table into line programs: the length of each stands in front of it."
    at = 0
    while at < len(table):
        end = at + 4 + int.from_bytes(table[at:at + 4], 'little')
        yield table[at:end]
        at = end
