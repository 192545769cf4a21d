"""The vocabulary of number formats: canonical names, other spellings, bits per element.

Names only. What a format's bits mean is the business of the backend that implements it; this
module makes sure that one name means one thing to all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from quark_core.errors import UnknownNameError, did_you_mean


@dataclass(frozen=True)
class NumberFormat:
    """A number format by name.

    Attributes:
        name: Canonical spelling; equal names mean equal numerics.
        family: ``integer``, ``lpbq``, ``fixed``, ``float``, ``denorm``, ``log``, ``mx``,
            ``nvfp``, ``bfp``, ``sbfp``, ``msfp``, ``block_fp``, ``shared_microexponent``,
            ``block_minifloat``, ``block_log``, ``binary``, ``binary_residual`` or ``ternary``.
        bits: Bits one element's own code takes, shared scales left out.
        signed: Whether negative values can be represented.
        block: Elements that share a scale as part of the format, or None.
        shared_bits: Bits of everything a block shares (scale, exponent, microexponents).
        exponent: Exponent bits of a floating-point element, or None.
        mantissa: Stored mantissa bits (fraction bits of a fixed-point number), or None.
    """

    name: str
    family: str
    bits: int
    signed: bool = True
    block: int | None = None
    shared_bits: float = 0
    exponent: int | None = None
    mantissa: int | None = None

    @property
    def bits_per_element(self) -> float:
        """Average storage of one element in bits, its share of the block's scale included."""
        return self.bits + (self.shared_bits / self.block if self.block else 0)

    @property
    def is_block(self) -> bool:
        """Whether the format itself prescribes a shared scale for a block of elements."""
        return self.block is not None

    def packed_bytes(self, shape: tuple[int, ...], axis: int = -1) -> int:
        """Bytes of a bit-packed tensor of ``shape`` whose blocks run along ``axis``.

        A short block at the end of the axis has a scale of its own; the whole is rounded up to
        a byte once.
        """
        elements = 1
        for size in shape:
            elements *= size
        bits = float(elements * self.bits)
        if self.block and elements:
            length = shape[axis] if shape else 1
            bits += elements // length * ceil(length / self.block) * self.shared_bits
        return ceil(bits / 8)


_FLOATS = {
    # name: (exponent bits, mantissa bits)
    "float32": (8, 23),
    "float16": (5, 10),
    "bfloat16": (8, 7),
    "fp8_e4m3": (4, 3),
    "fp8_e5m2": (5, 2),
    "fp8_e4m3fnuz": (4, 3),
    "fp8_e5m2fnuz": (5, 2),
    "fp6_e3m2": (3, 2),
    "fp6_e2m3": (2, 3),
    "fp4_e2m1": (2, 1),
}
_MX_BLOCK = 32  # OCP Microscaling Formats v1.0, table 1
_MX_ELEMENTS = {
    "mxfp8_e4m3": (8, 4, 3),
    "mxfp8_e5m2": (8, 5, 2),
    "mxfp6_e3m2": (6, 3, 2),
    "mxfp6_e2m3": (6, 2, 3),
    "mxfp4_e2m1": (4, 2, 1),
    "mxint8": (8, None, None),
    "mxint4": (4, None, None),
    "mxint2": (2, None, None),
}
_MX_INTEGER_BITS = range(2, 17)
# Spellings of the OCP specification, torchao, microxcaling, dmx and torch, in lower case.
_ALIASES = {
    "fp32": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "fp8_e4m3",
    "fp8_e4m3fn": "fp8_e4m3",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "float8_e4m3fnuz": "fp8_e4m3fnuz",
    "float8_e5m2fnuz": "fp8_e5m2fnuz",
    "float6_e3m2": "fp6_e3m2",
    "float6_e2m3": "fp6_e2m3",
    "float4_e2m1fn": "fp4_e2m1",
    "float4_e2m1fn_x2": "fp4_e2m1",
    "e4m3": "fp8_e4m3",
    "e5m2": "fp8_e5m2",
    "e3m2": "fp6_e3m2",
    "e2m3": "fp6_e2m3",
    "e2m1": "fp4_e2m1",
    "fp4": "fp4_e2m1",
    "float4_e2m1": "fp4_e2m1",
    "mxfp8": "mxfp8_e4m3",
    "mxfp6": "mxfp6_e2m3",
    "mxfp4": "mxfp4_e2m1",
    "msfp": "msfp16",
    "minifloat_ieee": "fp[1|4|3]",
    "residual_sign": "binary_residual",
}
_MAX_INTEGER_BITS = 32


def _int(match: re.Match[str]) -> NumberFormat | None:
    bits = int(match["bits"])
    if not 1 <= bits <= _MAX_INTEGER_BITS:
        return None
    signed = not match["unsigned"]
    return NumberFormat(f"{'' if signed else 'u'}int{bits}", "integer", bits, signed)


def _fixed(match: re.Match[str]) -> NumberFormat | None:
    bits, fraction = int(match["bits"]), int(match["fraction"])
    if not 1 <= bits <= _MAX_INTEGER_BITS:
        return None
    signed = not match["unsigned"]
    letters = (match["letters"] or "c_n").upper()
    suffix = "" if letters == "C_N" else f"({letters})"
    name = f"{'' if signed else 'u'}fixed[{bits},{fraction}]{suffix}"
    return NumberFormat(name, "fixed", bits, signed, mantissa=fraction)


def _minifloat(match: re.Match[str]) -> NumberFormat | None:
    sign, exponent, mantissa = int(match["sign"]), int(match["exponent"]), int(match["mantissa"])
    if exponent > 8 or mantissa > 23:
        return None
    bias = f",{int(match['bias'])}" if match["bias"] else ""
    variant = {"fn": "flush", "_n": ""}.get(match["variant"] or "", match["variant"] or "")
    suffix = f"({variant})" if variant else ""
    return NumberFormat(
        f"fp[{sign}|{exponent}|{mantissa}{bias}]{suffix}",
        "float",
        sign + exponent + mantissa,
        bool(sign),
        exponent=exponent,
        mantissa=mantissa,
    )


def _denorm(match: re.Match[str]) -> NumberFormat | None:
    bits, exponent = int(match["bits"]), int(match["exponent"])
    if not 0 < exponent < bits - 1 or exponent > 8 or bits > 24:
        return None
    bias = f",{int(match['bias'])}" if match["bias"] else ""
    return NumberFormat(
        f"denorm[{bits}|{exponent}{bias}]",
        "denorm",
        bits,
        exponent=exponent,
        mantissa=bits - 1 - exponent,
    )


def _lpbq(match: re.Match[str]) -> NumberFormat | None:
    bits, decompressed, block = int(match["bits"]), int(match["wide"]), int(match["block"])
    if not 2 <= bits < decompressed <= _MAX_INTEGER_BITS or block < 1:
        return None
    return NumberFormat(
        f"lpbq[{bits}|{decompressed}]{{{block}}}",
        "lpbq",
        bits,
        block=block,
        shared_bits=decompressed - bits,
    )


def _mx(match: re.Match[str]) -> NumberFormat | None:
    element = _ALIASES.get(match["element"], match["element"])
    integer = re.fullmatch(r"mxint(\d+)", element)
    if integer and int(integer[1]) in _MX_INTEGER_BITS:
        bits, exponent, mantissa = int(integer[1]), None, None
    elif element in _MX_ELEMENTS:
        bits, exponent, mantissa = _MX_ELEMENTS[element]
    else:
        return None
    block = int(match["block"] or _MX_BLOCK)
    if block < 1:
        return None
    name = element if block == _MX_BLOCK else f"{element}{{{block}}}"
    return NumberFormat(
        name, "mx", bits, block=block, shared_bits=8, exponent=exponent, mantissa=mantissa
    )


def _dmx_mx(match: re.Match[str]) -> NumberFormat | None:
    element = f"mxfp{match['bits']}_{match['element']}"
    if element not in _MX_ELEMENTS:
        return None
    return parse_format(f"{element}{{{match['block']}}}")


def _bfp(match: re.Match[str]) -> NumberFormat | None:
    precision, block = int(match["precision"]), int(match["block"])
    if not 2 <= precision <= 24 or block < 1:
        return None
    letters = (match["letters"] or "sn").upper()
    suffix = "" if letters == "SN" else f"({letters})"
    return NumberFormat(
        f"bfp[{precision}|8]{{{block}}}{suffix}", "bfp", precision, block=block, shared_bits=8
    )


def _block_fp(match: re.Match[str]) -> NumberFormat | None:
    bits, exponent, block = int(match["bits"]), int(match["exponent"]), int(match["block"])
    if not 2 <= bits <= 24 or not 1 <= exponent <= 8 or block < 1:
        return None
    bias = f",{int(match['bias'])}" if match["bias"] else ""
    return NumberFormat(
        f"block_fp[{bits}|{exponent}{bias}]{{{block}}}",
        "block_fp",
        bits,
        block=block,
        shared_bits=exponent,
    )


def _dmx_bfp(match: re.Match[str]) -> NumberFormat | None:
    precision = int(match["total"]) - 8  # dmx counts the shared exponent's eight bits in
    letters = "(_n)" if match["asymmetric"] else ""
    return parse_format(f"bfp[{precision}|8]{{{match['block']}}}{letters}")


def _sbfp(match: re.Match[str]) -> NumberFormat | None:
    bits, block = int(match["bits"]), int(match["block"])
    exponent, mantissa = int(match["exponent"]), int(match["mantissa"])
    if not 2 <= bits <= 16 or not 1 <= exponent <= 8 or mantissa > 15 or block < 1:
        return None
    bias = f",{int(match['bias'])}" if match["bias"] else ""
    return NumberFormat(
        f"sbfp[{bits}|{exponent}|{mantissa}{bias}]{{{block}}}",
        "sbfp",
        bits,
        block=block,
        shared_bits=exponent + mantissa,
    )


def _dmx_sbfp(match: re.Match[str]) -> NumberFormat | None:
    bias = f",{match['bias']}" if match["bias"] else ""
    return (
        parse_format(f"sbfp[4|4|4{bias}]{{{match['block']}}}") if match["total"] == "12" else None
    )


def _msfp(match: re.Match[str]) -> NumberFormat | None:
    total = int(match["total"])
    if not 12 <= total <= 16:
        return None
    return NumberFormat(f"msfp{total}", "msfp", total - 8, block=16, shared_bits=8)


def _shared_microexponent(match: re.Match[str]) -> NumberFormat | None:
    # Rouhani et al. 2023, arXiv 2302.08007: 16 elements share 8 bits, each pair one bit more.
    element_bits = {"4": 3, "6": 5, "9": 8}[match["bits"]]
    return NumberFormat(
        f"mx{match['bits']}", "shared_microexponent", element_bits, block=16, shared_bits=16
    )


def _log(match: re.Match[str]) -> NumberFormat | None:
    bias = f",{int(match['bias'])}" if match["bias"] else ""
    bits = int(match["bits"])
    return NumberFormat(f"log[{bits}{bias}]", "log", bits) if bits >= 2 else None


def _block_minifloat(match: re.Match[str]) -> NumberFormat | None:
    bits, exponent = int(match["bits"]), int(match["exponent"])
    bias_bits, block = int(match["bias_bits"]), int(match["block"])
    if exponent >= bits or block < 1:
        return None
    return NumberFormat(
        f"block_minifloat[{bits}|{exponent}|{bias_bits}]{{{block}}}",
        "block_minifloat",
        bits,
        block=block,
        shared_bits=bias_bits,
        exponent=exponent,
        mantissa=bits - 1 - exponent,
    )


def _block_log(match: re.Match[str]) -> NumberFormat | None:
    bits, bias_bits, block = int(match["bits"]), int(match["bias_bits"]), int(match["block"])
    if bits < 2 or block < 1:
        return None
    return NumberFormat(
        f"block_log[{bits}|{bias_bits}]{{{block}}}",
        "block_log",
        bits,
        block=block,
        shared_bits=bias_bits,
    )


def _binary_residual(match: re.Match[str]) -> NumberFormat | None:
    levels = int(match["levels"])
    if not 1 <= levels <= 3:
        return None
    name = "binary_residual" if levels == 2 else f"binary_residual[{levels}]"
    return NumberFormat(name, "binary_residual", levels)


def _mase(match: re.Match[str]) -> NumberFormat | None:
    """MASE's quantizers with the arguments of its configurations, in its order."""
    scheme, values = match["scheme"], [part for part in match["arguments"].split(",") if part]
    block = match["block"] or match["brace"]
    tail = f"{{{block}}}" if block else ""
    if len(values) != {"integer": 2, "log": 2}.get(scheme, 3) or bool(block) != ("block" in scheme):
        return None
    bias = "" if values[-1] == "none" else f",{values[-1]}"
    if scheme == "minifloat_ieee":
        width, exponent = int(values[0]), int(values[1])
        return parse_format(f"fp[1|{exponent}|{width - 1 - exponent}{bias}]")
    names = {
        "integer": f"fixed[{values[0]},{values[1]}]",
        "log": f"log[{values[0]}{bias}]",
        "minifloat_denorm": f"denorm[{values[0]}|{values[1]}{bias}]",
        "block_fp": f"block_fp[{values[0]}|{values[1]}{bias}]{tail}",
        "block_minifloat": f"block_minifloat[{'|'.join(values)}]{tail}",
    }
    return parse_format(names[scheme])


_GRAMMAR: tuple[tuple[str, Callable[[re.Match[str]], NumberFormat | None]], ...] = (
    (r"(?P<unsigned>u)?int(?P<bits>\d+)", _int),
    (
        r"(?P<unsigned>u)?(?:fixed|xp)\[(?P<bits>\d+),(?P<fraction>[+-]?\d+)\]"
        r"(?:\((?P<letters>[c_][s_][ndus])\))?",
        _fixed,
    ),
    (
        r"fp\[(?P<sign>[01])\|(?P<exponent>\d+)\|(?P<mantissa>\d+)(?:,(?P<bias>-?\d+))?\]"
        r"(?:\((?P<variant>flush|ieee|nan|fnuz|fn|_n)\))?",
        _minifloat,
    ),
    (r"denorm\[(?P<bits>\d+)\|(?P<exponent>\d+)(?:,(?P<bias>-?\d+))?\]", _denorm),
    (r"lpbq\[(?P<bits>\d+)\|(?P<wide>\d+)\]\{(?P<block>\d+)\}", _lpbq),
    (r"(?P<element>mx(?:fp\d(?:_e\dm\d)?|int\d+))(?:\{(?P<block>\d+)\})?", _mx),
    (r"mxfp(?P<bits>\d)(?:\[|_)(?P<element>e\dm\d)(?:\]\{|k)(?P<block>\d+)\}?", _dmx_mx),
    (
        r"bfp\[(?P<precision>\d+)\|8\]\{(?P<block>\d+)(?:,-?\d+)?\}(?:\((?P<letters>[s_][ndus])\))?",
        _bfp,
    ),
    (r"bfp(?P<total>\d+)(?P<asymmetric>a)?_(?P<block>\d+)", _dmx_bfp),
    (
        r"sbfp\[(?P<bits>\d+)\|(?P<exponent>\d+)\|(?P<mantissa>\d+)(?:,(?P<bias>\d+))?\]"
        r"\{(?P<block>\d+)\}",
        _sbfp,
    ),
    (
        r"sbfp<xp\[(?P<bits>\d+),0\]\(csn\)><fp\[0\|(?P<exponent>\d+)\|(?P<mantissa>\d+)"
        r"(?:,(?P<bias>\d+))?\]\(fn\)>\{(?P<block>\d+)(?:,-?\d+)?\}",
        _sbfp,
    ),
    (r"sbfp(?P<total>\d+)_(?P<block>\d+)(?:_(?P<bias>\d+))?", _dmx_sbfp),
    (
        r"block_fp\[(?P<bits>\d+)\|(?P<exponent>\d+)(?:,(?P<bias>-?\d+))?\]\{(?P<block>\d+)\}",
        _block_fp,
    ),
    (r"msfp(?P<total>\d+)", _msfp),
    (r"mx(?P<bits>[469])", _shared_microexponent),
    (r"log\[(?P<bits>\d+)(?:,(?P<bias>-?\d+))?\]", _log),
    (
        r"block_minifloat\[(?P<bits>\d+)\|(?P<exponent>\d+)\|(?P<bias_bits>\d+)\]\{(?P<block>\d+)\}",
        _block_minifloat,
    ),
    (r"block_log\[(?P<bits>\d+)\|(?P<bias_bits>\d+)\]\{(?P<block>\d+)\}", _block_log),
    (r"binary_residual\[(?P<levels>\d)\]", _binary_residual),
    (
        r"(?P<scheme>integer|log|minifloat_ieee|minifloat_denorm|block_fp|block_minifloat)"
        r"\((?P<arguments>(?:-?\d+|none|,)+)\)(?:\[(?:1,)?(?P<block>\d+)\]|\{(?P<brace>\d+)\})?",
        _mase,
    ),
)
_PATTERNS = tuple((re.compile(pattern), build) for pattern, build in _GRAMMAR)
_SINGLES = {
    # With a float32 scale of the whole tensor beside those of the blocks, and without.
    **{
        name: NumberFormat(name, "nvfp", 4, block=16, shared_bits=8, exponent=2, mantissa=1)
        for name in ("nvfp4", "nvfp4_one_level")
    },
    # AMD's BFP16: eight 8-bit mantissas share an 8-bit exponent.
    "bfp16": NumberFormat("bfp16", "bfp", 8, block=8, shared_bits=8),
    # [unit]: the values are -1 and 1 themselves; [zero]: 0 and a mean instead of -1 and 1.
    **{name: NumberFormat(name, "binary", 1) for name in ("binary", "binary[unit]")},
    "binary[zero]": NumberFormat("binary[zero]", "binary", 1, signed=False),
    "binary_residual": NumberFormat("binary_residual", "binary_residual", 2),
    **{name: NumberFormat(name, "ternary", 2) for name in ("ternary", "ternary[unit]")},
    **{
        name: NumberFormat(
            name, "float", 1 + exponent + mantissa, exponent=exponent, mantissa=mantissa
        )
        for name, (exponent, mantissa) in _FLOATS.items()
    },
}
# One spelling of every family, for error messages and completion.
EXAMPLES: tuple[str, ...] = (
    "int8",
    "uint4",
    "lpbq[4|8]{64}",
    "fixed[8,4]",
    "ufixed[8,4]",
    *_FLOATS,
    "fp[1|3|2]",
    "fp[1|4|3](ieee)",
    "denorm[8|4]",
    *_MX_ELEMENTS,
    "nvfp4",
    "nvfp4_one_level",
    "bfp[8|8]{64}",
    "bfp[4|8]{16}(_N)",
    "sbfp[4|4|4,7]{16}",
    "block_fp[6|8]{16}",
    "bfp16",
    "msfp12",
    "mx4",
    "mx6",
    "mx9",
    "log[8]",
    "block_minifloat[8|4|8]{16}",
    "block_log[8|8]{16}",
    "binary",
    "binary[unit]",
    "binary[zero]",
    "binary_residual",
    "ternary",
    "ternary[unit]",
)


@lru_cache(maxsize=1024)
def parse_format(text: str) -> NumberFormat:
    """The format that ``text`` names, in any known spelling.

    Case, and blanks around or within the name, do not matter.

    Raises:
        UnknownNameError: Nothing is known by that name; the message holds near misses.
    """
    spelled = "".join(text.split()).lower().removeprefix("torch.")
    spelled = _ALIASES.get(spelled, spelled)
    if spelled in _SINGLES:
        return _SINGLES[spelled]
    for pattern, build in _PATTERNS:
        match = pattern.fullmatch(spelled)
        if match and (found := build(match)) is not None:
            return found
    hint = did_you_mean(spelled, [*EXAMPLES, *_ALIASES, *(f"int{n}" for n in (2, 3, 4, 6, 16))])
    raise UnknownNameError(
        f"unknown number format {text!r}",
        fix=hint or "Formats are spelled like int8, fp8_e4m3, mxfp4 or bfp[8|8]{64}",
    )


def with_block(fmt: NumberFormat, block: int) -> NumberFormat:
    """The same block format with another number of elements sharing a scale.

    Raises:
        UnknownNameError: The format has no block, or a fixed one.
    """
    if fmt.block == block:
        return fmt
    if fmt.family == "mx":
        return parse_format(f"{fmt.name.split('{')[0]}{{{block}}}")
    if fmt.block is not None and "{" in fmt.name:
        return replace(fmt, name=re.sub(r"\{\d+\}", f"{{{block}}}", fmt.name), block=block)
    raise UnknownNameError(
        f"the block size of {fmt.name!r} is not a choice", fix="Leave group:SIZE out"
    )
