"""PTX text to basic blocks of instructions, and registers to rows of arrays."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SIZES = {"pred": 1, **{f"{k}{n}": n // 8 for k in "bus" for n in (8, 16, 32, 64)}, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
PARAM_BASE, SHARED_BASE = 0x100, 0x400  # addresses of the first parameter and of the first byte of shared memory
IGNORED = {  # compute nothing
    *("fence", "membar", "bra", "ret", "exit", "bar", "barrier", "griddepcontrol", "prefetch", "createpolicy"),
}
_WITHOUT_RESULT = {*IGNORED, "st", "stmatrix", "cp"}


@dataclass(slots=True)
class Address:
    """``[base + offset]``."""

    base: str
    offset: int


@dataclass(slots=True)
class Instruction:
    """``guard``: register and whether it is negated; ``args``: strings, lists of strings, `Address`."""

    line: int
    text: str
    source: str
    guard: tuple[str, bool] | None
    op: list[str]
    args: list[Any]

    def read(self) -> Iterator[str]:
        """Names it reads, registers among them."""
        if self.guard:
            yield self.guard[0]
        accumulates = self.op[0] == "wgmma"  # reads what it writes
        for arg in self.args[self.op[0] not in _WITHOUT_RESULT and not accumulates :]:
            yield from _names(arg)

    def written(self) -> Iterator[str]:
        """Names it writes."""
        if self.op[0] not in _WITHOUT_RESULT and self.args:
            yield from _names(self.args[0])


def _names(arg: Any) -> list[str]:
    if isinstance(arg, Address):
        return [arg.base]
    if isinstance(arg, list):
        return [x.lstrip("!") for x in arg]
    return arg.lstrip("!").split("|")


@dataclass(slots=True)
class Block:
    """Straight-line code; ``end``: how it ends, one of fall, jump, branch, ret, bar."""

    first: int  # index of its first instruction
    instructions: list[Instruction] = field(default_factory=list)
    end: str = "fall"
    target: int | str = -1
    run: Callable[[Any, Any], None] | None = None


@dataclass
class Kernel:
    """``registers``: bank (p, 16, 32, 64) and row; ``rows``: how many rows a bank has."""

    name: str
    params: dict[str, tuple[int, str]]  # offset and type
    param_bytes: int
    threads: int
    registers: dict[str, tuple[str, int]]
    rows: dict[str, int]
    blocks: list[Block]
    instructions: list[Instruction]


_PARAM = re.compile(r"\.param\s+\.(\w+)[^,)]*?\s(\w+)(?:\[\d+\])?\s*[,)]?\s*$")
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(.+)")
_MANY = re.compile(r"\s*(%?\w+)<(\d+)>")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_LABEL = re.compile(r"(\$?[\w$]+):$")
_GUARD = re.compile(r"@(!?)(%?\w+)\s+")
_COMMA = re.compile(r",(?![^{\[]*[}\]])\s*")  # none inside of braces or brackets


def _operand(text: str) -> Any:
    if text[0] == "{":
        return [x.strip() for x in text[1:-1].split(",")]
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    return text


def parse(ptx: str) -> Kernel:
    """The only kernel of a module."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M))
    banks: dict[str, str] = {}  # of every register
    params: dict[str, tuple[int, str]] = {}
    at, threads, name, source, inside, pending = 0, 0, "", "", False, ""
    items: list[Any] = []  # instructions and labels
    for number, raw in enumerate(ptx.splitlines(), 1):
        line = raw.partition("//")[0].strip()
        if not line:
            continue
        if not inside:
            if m := re.match(r"\.visible\s+\.entry\s+(\w+)", line):
                name = m[1]
            elif m := _PARAM.match(line):
                size = SIZES[m[1]]
                at = -(-at // size) * size
                params[m[2]] = (at, m[1])
                at += size
            elif m := re.match(r"\.reqntid\s+(\d+)", line):
                threads = int(m[1])
            elif line == "{":
                inside = True
            continue
        if raw[0] == "}":
            break
        if m := _LOCATION.match(line):
            source = f"{files.get(m[1], m[1])}:{m[2]}"
            continue
        if m := _LABEL.match(line):
            items.append(m[1])
            continue
        *whole, pending = f"{pending} {line}".split(";")
        if not pending.strip(" }"):
            pending = ""
        for statement in whole:
            statement = statement.lstrip("{} \t").rstrip()
            if m := _REGISTER.match(statement):
                banks |= _declared(m[1], m[2])
            elif statement and statement[0] != ".":  # .pragma
                items.append(_instruction(number, statement, source))
    blocks, instructions = _blocks(items)
    return Kernel(name, params, at, threads, *_rows(banks, blocks), blocks, instructions)


def _declared(kind: str, names: str) -> dict[str, str]:
    bank = {"pred": "p", "b8": "16", "b16": "16"}.get(kind) or str(8 * SIZES[kind])
    found: dict[str, str] = {}
    for each in names.split(","):
        if many := _MANY.match(each):
            found |= {f"{many[1]}{i}": bank for i in range(int(many[2]))}
        else:
            found[each.strip()] = bank
    return found


def _instruction(line: int, statement: str, source: str) -> Instruction:
    guard = None
    if statement[0] == "@" and (m := _GUARD.match(statement)):
        guard, statement = (m[2], bool(m[1])), statement[m.end() :]
    op, *rest = statement.split(None, 1)
    args = [_operand(x) for x in _COMMA.split(rest[0])] if rest else []
    return Instruction(line, statement, source, guard, op.split("."), args)


def _blocks(items: list[Any]) -> tuple[list[Block], list[Instruction]]:
    labels: dict[str, int] = {}
    targets = {x.args[0] for x in items if isinstance(x, Instruction) and x.op[0] == "bra"}
    blocks, instructions = [Block(0)], []
    for item in items:
        label = isinstance(item, str)
        if (blocks[-1].end != "fall" or (label and item in targets)) and blocks[-1].instructions:
            blocks.append(Block(len(instructions)))
        block = blocks[-1]
        if label:
            labels[item] = len(blocks) - 1
            continue
        block.instructions.append(item)
        instructions.append(item)
        if item.op[0] in ("bra", "ret", "exit"):
            block.end = "branch" if item.guard else ("jump" if item.op[0] == "bra" else "ret")
            block.target = item.args[0] if item.op[0] == "bra" else "exit"
        elif item.op[0] in ("bar", "barrier") and item.op[1] != "warp":
            block.end = "bar"
    labels["exit"] = len(blocks)
    for block in blocks:
        if isinstance(block.target, str):
            block.target = labels[block.target]
    return blocks, instructions


def _rows(banks: dict[str, str], blocks: list[Block]) -> tuple[dict[str, tuple[str, int]], dict[str, int]]:
    """A row for every register. Those that live within one block share rows: PTX has thousands, each assigned once."""
    homes: dict[str, int] = {}  # the block of a register, -1 where it has several or is read before it is written
    last: dict[str, Instruction] = {}
    for number, block in enumerate(blocks):
        for instruction in block.instructions:
            for name in instruction.read():
                homes[name] = number if homes.get(name) == number else -1
                last[name] = instruction
            for name in instruction.written():
                known = homes.get(name, -1 if instruction.guard else number)
                homes[name] = number if known == number else -1
                last[name] = instruction
    rows = dict.fromkeys(("p", "16", "32", "64"), 0)
    registers: dict[str, tuple[str, int]] = {}
    for name, bank in banks.items():
        if homes.get(name) == -1:
            registers[name] = bank, rows[bank]
            rows[bank] += 1
    free: dict[str, list[int]] = {bank: [] for bank in rows}
    for block in blocks:
        for instruction in block.instructions:
            names = [x for x in (*instruction.read(), *instruction.written()) if homes.get(x, -1) >= 0 and x in banks]
            for name in names:
                if name not in registers:
                    bank = banks[name]
                    if not free[bank]:
                        free[bank].append(rows[bank])
                        rows[bank] += 1
                    registers[name] = bank, free[bank].pop()
            for name in set(names):
                if last[name] is instruction:
                    bank, row = registers[name]
                    free[bank].append(row)
    return registers, rows
