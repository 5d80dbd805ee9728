"""Basic blocks of PTX to Python functions over numpy arrays.

A register is a row ``[lanes]``; ``u32[7]``, ``i32[7]``, ``f32[7]`` are views of the same one. A block's function takes the
batch ``s`` and the mask ``m`` of active lanes (``True``: all). ``k`` is the mask of one instruction, with its guard. A block is
translated when it first runs: most of the blocks of a kernel never do.
"""

import re
from typing import Any

import numpy as np

from . import arithmetic
from .parser import IGNORED, PARAM_BASE, SHARED_BASE, SIZES, Address, Block, Instruction, Kernel

VIEWS = ("p", "u16", "i16", "f16", "u32", "i32", "f32", "u64", "i64", "f64")
_COMPARE = {
    **{"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"},
    **{"lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal"},
}
_UNARY = {
    **{"neg": "np.negative", "abs": "np.abs", "ex2": "np.exp2", "lg2": "np.log2", "sqrt": "np.sqrt", "sin": "np.sin"},
    **{"cos": "np.cos", "tanh": "np.tanh", "rcp": "np.reciprocal", "rsqrt": "reciprocal_root", "not": "np.invert"},
}
PACKED = ("f16x2", "bf16x2")
_ROUNDING = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}
_SPECIAL = re.compile(r"%(tid|ctaid|ntid|nctaid|laneid|warpid)(?:\.([xyz]))?$")
_SCOPE = {
    **{"np": np, **{n: getattr(arithmetic, n) for n in dir(arithmetic) if n[0] != "_"}},
    **{f"t_{n}{b}": np.dtype(f"{n}{b // 8}").type for n in "ui" for b in (8, 16, 32, 64)},
    **{f"t_f{b}": np.dtype(f"f{b // 8}").type for b in (16, 32, 64)},
}


def view_of(kind: str) -> str:
    """Name of the view that holds a PTX type."""
    if kind == "pred":
        return "p"
    letter = {"b": "u", "s": "i"}.get(kind[0], kind[0])
    return "u16" if kind == "bf16" else f"{letter}{8 * SIZES[kind]}"


class Compiler:
    """Translates the blocks of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.lines: list[str] = []
        self.constants: list[Any] = []
        for block in kernel.blocks:
            self._compile_on_first_run(block)

    def _compile_on_first_run(self, block: Block) -> None:
        def run(batch: Any, mask: Any) -> None:
            block.run = self._compiled(block)
            block.run(batch, mask)

        block.run = run

    def _compiled(self, block: Block) -> Any:
        self.lines, self.constants = [], []
        for self.at, instruction in enumerate(block.instructions, block.first):
            try:
                self._instruction(instruction)
            except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
                where = f"{self.kernel.name}, PTX line {instruction.line}: {instruction.text}"
                raise NotImplementedError(f"{where}: {type(error).__name__} {error}") from error
        body = "\n ".join(self.lines) or "pass"
        head = "".join(f"{view} = s.{view}; " for view in VIEWS if f"{view}[" in body)
        scope = {**_SCOPE, "c": self.constants}
        exec(compile(f"def block(s, m):\n {head}\n {body}\n", f"<{self.kernel.name} {block.first}>", "exec"), scope)
        return scope["block"]

    # operands

    def _constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"c[{len(self.constants) - 1}]"

    def _immediate(self, text: str, kind: str) -> str:
        if kind == "pred":
            return str(bool(int(text, 0)))
        if text[:2] in ("0f", "0F", "0d", "0D"):
            single = text[1] in "fF"
            bits = np.array([int(text[2:], 16)], "u4" if single else "u8")
            wanted = {"f32": "f4", "f64": "f8"}.get(kind, "")
            if wanted:
                bits = bits.view("f4" if single else "f8").astype(wanted).view(wanted.replace("f", "u"))
            number = int(bits[0])
        elif text in self.kernel.params:
            number = PARAM_BASE + self.kernel.params[text][0]
        elif text == "global_smem":
            number = SHARED_BASE
        elif "f" in kind:
            raise ValueError(f"{text} where a float is expected")
        else:
            number = int(text.rstrip("U"), 0)
        size = SIZES[kind]
        value = np.array([number % 2 ** (8 * size)], f"u{size}")
        return self._constant(value.view(f"{view_of(kind)[0]}{size}")[0])

    def src(self, arg: str, kind: str) -> str:
        """An operand as an array of its type's view, bfloat16 as its bits."""
        if arg[0] == "!":
            return f"~{self.src(arg[1:], kind)}"
        if special := _SPECIAL.match(arg):
            name = f"s.special['{special[1]}{special[2] or ''}']"
            return name if SIZES[kind] == 4 else f"{name}.astype(t_{view_of(kind)})"
        if arg not in self.kernel.registers:
            return self._immediate(arg, kind)
        bank, row = self.kernel.registers[arg]
        if bank == "p":
            return f"p[{row}]"
        if 8 * SIZES[kind] == int(bank):
            return f"{view_of(kind)}[{row}]"
        return f"u{bank}[{row}].astype(t_u{8 * SIZES[kind]}).view(t_{view_of(kind)})"

    def sources(self, args: list[str], kind: str) -> str:
        """Operands, separated by commas."""
        return ", ".join(self.src(a, kind) for a in args)

    def number(self, arg: str, kind: str, flush: bool = False) -> str:
        """An operand whose value is a number of numpy: bfloat16 as float32."""
        value = self.src(arg, kind)
        value = f"from_bf16({value})" if kind == "bf16" else value
        return f"ftz({value})" if flush and kind == "f32" else value

    def put(self, arg: str, kind: str, value: str) -> None:
        """``value`` into a register, where ``k``."""
        if arg == "_":
            return
        bank, row = self.kernel.registers[arg]
        if bank == "p" or 8 * SIZES[kind] == int(bank):
            view = "p" if bank == "p" else view_of(kind)
        else:  # a narrow value in a wide register, extended by its sign
            view, value = f"{'i' if kind[0] == 's' else 'u'}{bank}", f"np.asarray({value}).astype(t_{view_of(kind)})"
        self.lines.append(f"np.copyto({view}[{row}], {value}, where=k, casting='unsafe')")

    def put_number(self, arg: str, kind: str, value: str, flush: bool = False) -> None:
        """A floating-point result: bfloat16 comes as float32."""
        if flush and kind == "f32":
            value = f"ftz({value})"
        self.put(arg, kind, f"bf16_bits({value})" if kind == "bf16" else value)

    def ufunc(self, name: str, arg: str, kind: str, values: str) -> None:
        """``name`` written in place where the register has the very type."""
        bank, row = self.kernel.registers[arg]
        if bank != "p" and int(bank) == 8 * SIZES[kind]:
            self.lines.append(f"{name}({values}, out={view_of(kind)}[{row}], where=k)")
        else:
            self.put(arg, kind, f"{name}({values})")

    def rows(self, args: Any) -> str:
        """Registers to be written, as a list of rows."""
        names = args if isinstance(args, list) else [args]
        registers = [None if n == "_" else self.kernel.registers[n] for n in names]
        return "[" + ", ".join("None" if r is None else f"u{r[0]}[{r[1]}]" for r in registers) + "]"

    def values(self, args: Any, kind: str) -> str:
        """Registers to be read, as a list."""
        return f"[{self.sources(args if isinstance(args, list) else [args], kind)}]"

    def address(self, arg: Address, space: str = "") -> str:
        """Expression of the full address: uint64 if global, int64 if shared."""
        wide = self.kernel.registers.get(arg.base, ("32", 0))[0] == "64"
        base = self.src(arg.base, "b64" if wide else "b32")
        if space == "global":
            return f"{base} + {self._constant(np.uint64(arg.offset % 2**64))}" if arg.offset else base
        return f"np.asarray({base}).astype(np.int64) + {arg.offset}"

    # instructions

    def _instruction(self, ins: Instruction) -> None:
        if ins.op[0] in IGNORED:
            return
        self.lines.append(f"# {ins.line}: {ins.text}")
        if ins.guard:
            row = self.kernel.registers[ins.guard[0]][1]
            self.lines.append(f"k = {'~' if ins.guard[1] else ''}p[{row}]\n if m is not True: k = k & m")
        else:
            self.lines.append("k = m")
        if ins.op[0] in _UNARY:
            self._unary(ins.op[0], ins.op[1:], ins.args)
        else:
            getattr(self, f"_{ins.op[0]}")(ins.op[1:], ins.args)

    def _packed(self, name: str, op: list[str], args: list[str]) -> bool:
        """Instructions on two halves of 32 bits."""
        if op[-1] not in PACKED:
            return False
        kind = op[-1][:-2]
        for shift in (0, 16):
            value = f"{name}({', '.join(self._half(a, kind, shift) for a in args[1:])})"
            bits = f"bf16_bits({value})" if kind == "bf16" else f"np.asarray({value}).astype(t_f16).view(t_u16)"
            self.lines.append(f"h{shift} = {bits}.astype(t_u32)")
        self.put(args[0], "b32", "h0 | (h16 << t_u32(16))")
        return True

    def _half(self, arg: str, kind: str, shift: int) -> str:
        """The number in the lower (0) or upper (16) half of a register."""
        bits = f"((np.asarray({self.src(arg, 'b32')}) >> t_u32({shift})).astype(t_u16))"
        return f"from_bf16({bits})" if kind == "bf16" else f"{bits}.view(t_f16)"

    def _binary(self, name: str, op: list[str], args: list[str], integers: str = "") -> None:
        kind, flush = op[-1], "ftz" in op
        if self._packed(name, op, args):
            return
        if "f" in kind:
            values = ", ".join(self.number(a, kind, flush) for a in args[1:])
            if flush or kind == "bf16" or not name.startswith("np."):
                self.put_number(args[0], kind, f"{name}({values})", flush)
            else:
                self.ufunc(name, args[0], kind, values)
        elif integers and not integers.startswith("np."):
            self._function(integers, op, args)
        else:
            self.ufunc(integers or name, args[0], kind, self.sources(args[1:], kind))

    def _function(self, name: str, op: list[str], args: list[str]) -> None:
        self.put(args[0], op[-1], f"{name}({self.sources(args[1:], op[-1])})")

    def _add(self, op: list[str], args: list[str]) -> None:
        self._binary("np.add", op, args)

    def _sub(self, op: list[str], args: list[str]) -> None:
        self._binary("np.subtract", op, args)

    def _mul(self, op: list[str], args: list[str]) -> None:
        if op[0] == "wide":
            wide = f"{op[1][0]}{16 * SIZES[op[1]]}"
            self.put(args[0], wide, f"np.multiply({self.sources(args[1:], op[1])}, dtype=t_{view_of(wide)})")
        elif op[0] == "hi":
            self._function("mul_hi", op, args)
        else:
            self._binary("np.multiply", op, args)

    def _mad(self, op: list[str], args: list[str]) -> None:
        mode, kind = op
        factors, wide = self.sources(args[1:3], kind), f"{kind[0]}{16 * SIZES[kind]}"
        if mode == "wide":
            self.ufunc("np.add", args[0], wide, f"np.multiply({factors}, dtype=t_{view_of(wide)}), {self.src(args[3], wide)}")
        else:
            product = {"lo": "np.multiply", "hi": "mul_hi"}[mode]
            self.ufunc("np.add", args[0], kind, f"{product}({factors}), {self.src(args[3], kind)}")

    def _fma(self, op: list[str], args: list[str]) -> None:
        kind, flush = op[-1], "ftz" in op
        if self._packed("fma32", op, args):
            return
        values = ", ".join(self.number(a, kind, flush) for a in args[1:])
        self.put_number(args[0], kind, f"{'fma64' if kind == 'f64' else 'fma32'}({values})", flush)

    def _div(self, op: list[str], args: list[str]) -> None:
        self._binary("np.divide", op, args, integers="int_div")

    def _rem(self, op: list[str], args: list[str]) -> None:
        self._function("int_rem", op, args)

    def _min(self, op: list[str], args: list[str]) -> None:
        self._binary("np.minimum" if "NaN" in op else "minimum", op, args, integers="np.minimum")

    def _max(self, op: list[str], args: list[str]) -> None:
        self._binary("np.maximum" if "NaN" in op else "maximum", op, args, integers="np.maximum")

    def _logic(self, name: str, op: list[str], args: list[str]) -> None:
        if op[0] == "pred":
            self.put(args[0], "pred", f"np.logical_{name}({self.sources(args[1:], 'pred')})")
        else:
            self.ufunc(f"np.bitwise_{name}", args[0], op[0], self.sources(args[1:], op[0]))

    def _and(self, op: list[str], args: list[str]) -> None:
        self._logic("and", op, args)

    def _or(self, op: list[str], args: list[str]) -> None:
        self._logic("or", op, args)

    def _xor(self, op: list[str], args: list[str]) -> None:
        self._logic("xor", op, args)

    def _shift(self, name: str, op: list[str], args: list[str]) -> None:
        kind = op[-1]
        amount = f"np.minimum({self.src(args[2], 'u32')}, t_u32({8 * SIZES[kind]})).astype(t_{view_of(kind)})"
        self.put(args[0], kind, f"np.{name}({self.src(args[1], kind)}, {amount})")

    def _shl(self, op: list[str], args: list[str]) -> None:
        self._shift("left_shift", op, args)

    def _shr(self, op: list[str], args: list[str]) -> None:
        self._shift("right_shift", op, args)

    def _shf(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], "b32", f"shf('{op[0]}', '{op[1]}', {self.sources(args[1:], 'u32')})")

    def _popc(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], "b32", f"np.bitwise_count({self.src(args[1], op[0])})")

    def _clz(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], "b32", f"clz({self.src(args[1], op[0])})")

    def _brev(self, op: list[str], args: list[str]) -> None:
        self._function("brev", op, args)

    def _prmt(self, op: list[str], args: list[str]) -> None:
        if op != ["b32"]:
            raise ValueError("mode")
        self._function("prmt", op, args)

    def _lop3(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], "b32", f"lop3({self.sources(args[1:4], 'b32')}, {int(args[4], 0)})")

    def _bfe(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], op[0], f"bfe({self.src(args[1], op[0])}, {self.sources(args[2:], 'u32')})")

    def _bfi(self, op: list[str], args: list[str]) -> None:
        if op != ["b32"]:
            raise ValueError("width")
        self._function("bfi", op, args)

    def _unary(self, name: str, op: list[str], args: list[str]) -> None:
        kind, flush, function = op[-1], "ftz" in op, _UNARY[name]
        if self._packed(function, op, args):
            return
        if kind == "pred":
            self.put(args[0], kind, f"np.logical_not({self.src(args[1], kind)})")
        elif "f" not in kind:
            kind = kind if name == "not" else f"s{8 * SIZES[kind]}"
            self.ufunc(function, args[0], kind, self.src(args[1], kind))
        elif kind == "bf16" and name in ("neg", "abs"):
            change = "^ t_u16(0x8000)" if name == "neg" else "& t_u16(0x7fff)"
            self.put(args[0], "b16", f"{self.src(args[1], 'b16')} {change}")
        else:
            value = self.number(args[1], kind, flush)
            once = kind == "f32" and name not in ("neg", "abs", "sqrt")  # rounded once
            value = f"{function}(np.asarray({value}).astype(t_f64)).astype(t_f32)" if once else f"{function}({value})"
            self.put_number(args[0], kind, value, flush)

    def _setp(self, op: list[str], args: list[str]) -> None:
        relation, kind = op[0], op[-1]
        if kind in PACKED:  # a predicate for each half
            for out, shift in zip(args[0].split("|"), (0, 16), strict=True):
                self.lines.append(
                    f"v = {self._compared(relation, kind, *(self._half(x, kind[:-2], shift) for x in args[1:3]))}"
                )
                self.put(out, "pred", "v")
            return
        value = self._compared(relation, kind, *(self.number(x, kind, "ftz" in op) for x in args[1:3]))
        combined = {"and": " & ", "or": " | ", "xor": " ^ "}.get(op[1], "")
        combined += self.src(args[3], "pred") if combined else ""
        self.lines.append(f"v = {value}")
        true, _, false = args[0].partition("|")
        if false:
            self.put(false, "pred", f"~v{combined}")
        self.put(true, "pred", f"v{combined}")

    @staticmethod
    def _compared(relation: str, kind: str, a: str, b: str) -> str:
        nan = f"(np.isnan({a}) | np.isnan({b}))"
        if relation in ("num", "nan"):
            return nan if relation == "nan" else f"~{nan}"
        unordered = "f" in kind and relation[-1] == "u"
        name = relation[:-1] if unordered else relation
        value = f"np.{_COMPARE[name]}({a}, {b})"
        if unordered and name != "ne":  # numpy's != is true of NaN, its other relations are not
            return f"{value} | {nan}"
        return f"{value} & ~{nan}" if "f" in kind and relation == "ne" else value

    def _selp(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], op[0], f"np.where({self.src(args[3], 'pred')}, {self.sources(args[1:3], op[0])})")

    def _mov(self, op: list[str], args: list[Any]) -> None:
        kind = op[0]
        bits = 8 * SIZES[kind]
        if isinstance(args[0], list):
            width = bits // len(args[0])
            self.lines.append(f"w = np.asarray({self.src(args[1], f'b{bits}')}).copy()")
            for i, name in enumerate(args[0]):
                self.put(name, f"b{width}", f"(w >> t_u{bits}({i * width})).astype(t_u{width})")
        elif isinstance(args[1], list):
            width = bits // len(args[1])
            parts = [f"(np.asarray({self.src(a, f'b{width}')}).astype(t_u{bits}) << t_u{bits}({i * width}))"
                     for i, a in enumerate(args[1])]  # fmt: skip
            self.put(args[0], f"b{bits}", " | ".join(parts))
        else:
            self.put(args[0], kind, self.src(args[1], kind))

    def _cvta(self, op: list[str], args: list[str]) -> None:
        self.put(args[0], op[-1], self.src(args[1], op[-1]))

    def _cvt(self, op: list[str], args: list[str]) -> None:
        to, of = op[-2:]
        flush, float_to, float_of = "ftz" in op, "f" in to, "f" in of
        if {"sat", "relu", "rz", "rm", "rp"} & set(op):
            raise ValueError("mode")
        if to in PACKED:
            bits = "bf16_bits({})" if to == "bf16x2" else "np.asarray({}).astype(t_f16).view(t_u16)"
            high, low = (bits.format(self.number(a, "f32")) for a in args[1:3])
            self.put(args[0], "b32", f"({high}.astype(t_u32) << t_u32(16)) | {low}")
            return
        value = self.number(args[1], of, flush)
        if float_of and not float_to:
            self.put(args[0], to, f"float_to_int({value}, t_{view_of(to)}, np.{_ROUNDING[op[0]]})")
        elif float_of and op[0] in _ROUNDING:
            self.put_number(args[0], to, f"np.{_ROUNDING[op[0]]}({value})", flush)
        else:
            self.put_number(args[0], to, f"np.asarray({value}).astype(t_{'f32' if to == 'bf16' else view_of(to)})", flush)

    # memory

    def _ld(self, op: list[str], args: list[Any]) -> None:
        kind, width = op[-1], SIZES[op[-1]]
        if op[0] == "param":
            if args[1].base in self.kernel.params:
                offset = self.kernel.params[args[1].base][0] + args[1].offset
                self.put(args[0], kind, f"s.param_views[{width}][{offset // width}].view(t_{view_of(kind)})")
            else:
                self.lines.append(f"v = s.load_param(k, {self.at}, {width}, {self.address(args[1])})")
                self.put(args[0], kind if kind[0] == "s" else f"b{8 * width}", "v")
            return
        space = _space(op)
        self.lines.append(
            f"s.load_{space}(k, {self.at}, {width}, {self.rows(args[0])}, {self.address(args[1], space)}, {kind[0] == 's'})"
        )

    def _st(self, op: list[str], args: list[Any]) -> None:
        width, space = SIZES[op[-1]], _space(op)
        values = self.values(args[1], f"b{8 * width}")
        self.lines.append(f"s.store_{space}(k, {self.at}, {width}, {values}, {self.address(args[0], space)})")

    def _cp(self, op: list[str], args: list[Any]) -> None:
        what = op[1] if op[0] == "async" else ""
        if what == "commit_group":
            self.lines.append("s.async_commit(k)")
        elif what == "wait_group":
            self.lines.append(f"s.async_wait(k, {int(args[0], 0)})")
        elif what == "wait_all":
            self.lines.append("s.async_commit(k); s.async_wait(k, 0)")
        elif what in ("cg", "ca"):
            given = self.src(args[3], "u32") if len(args) > 3 else "None"
            to, of = self.address(args[0], "shared"), self.address(args[1], "global")
            self.lines.append(f"s.async_copy(k, {self.at}, {int(args[2], 0)}, {to}, {of}, {given})")
        else:
            raise ValueError("kind")

    # warps

    def _shfl(self, op: list[str], args: list[Any]) -> None:
        out, _, valid = args[0].partition("|")
        self.lines.append(f"v, ok = s.shuffle(k, {self.at}, '{op[1]}', {self.sources(args[1:4], 'u32')})")
        self.put(out, "b32", "v")
        if valid:
            self.put(valid, "pred", "ok")

    def _redux(self, op: list[str], args: list[Any]) -> None:
        name = {"min": "minimum", "max": "maximum", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
        function = f"np.{name.get(op[1], op[1])}"
        self.put(args[0], op[2], f"s.reduce_warp(k, {self.at}, {function}, {self.src(args[1], op[2])})")

    def _vote(self, op: list[str], args: list[Any]) -> None:
        self.put(args[0], op[2], f"s.vote(k, '{op[1]}', {self.src(args[1], 'pred')})")

    def _ldmatrix(self, op: list[str], args: list[Any]) -> None:
        self.lines.append(f"s.load_matrix(k, {self.at}, {_matrices(op)}, {self.rows(args[0])}, {self.address(args[1])})")

    def _stmatrix(self, op: list[str], args: list[Any]) -> None:
        values = self.values(args[1], "b32")
        self.lines.append(f"s.store_matrix(k, {self.at}, {_matrices(op)}, {values}, {self.address(args[0])})")

    def _mma(self, op: list[str], args: list[Any]) -> None:
        kind = op[6]
        if op[3:] != ["row", "col", "f32", kind, kind, "f32"]:
            raise ValueError("kind")
        if op[2] != {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}[kind]:
            raise ValueError("shape")
        a, b, c = (self.values(x, "b32") for x in args[1:4])
        self.lines.append(f"s.mma(k, {self.at}, '{kind}', {self.rows(args[0])}, {a}, {b}, {c})")

    def _wgmma(self, op: list[str], args: list[Any]) -> None:
        if op[0] in ("commit_group", "wait_group"):
            self.lines.append(f"s.wgmma_{op[0][:-6]}({', '.join(args)})")
        elif op[0] == "mma_async":
            shape, kind = re.fullmatch(r"m64n(\d+)k\d+", op[3]), op[5]
            if shape is None or op[4] != "f32" or kind not in ("f16", "bf16", "tf32") or args[4:6] != ["1", "1"]:
                raise ValueError("kind")
            of_registers = isinstance(args[1], list)
            a = self.values(args[1], "b32") if of_registers else self.src(args[1], "b64")
            across = [int(x) for x in args[6:]] or [0, 0]
            if of_registers:
                across = [0, across[-1]]
            b, scale = self.src(args[2], "b64"), self.src(args[3], "pred")
            self.lines.append(f"s.wgmma(k, {self.at}, {shape[1]}, '{kind}', {self.rows(args[0])}, {a}, {b}, {scale}, {across})")
        elif op[0] != "fence":
            raise ValueError("kind")


def _space(op: list[str]) -> str:
    return "global" if "global" in op else next(x for x in op if x.startswith("shared")).partition("::")[0]


def _matrices(op: list[str]) -> str:
    """How many 8x8 matrices, and whether transposed."""
    if "m8n8" not in op or "b16" not in op:
        raise ValueError("shape")
    return f"{next(x for x in op if x in ('x1', 'x2', 'x4'))[1:]}, {'trans' in op}"
