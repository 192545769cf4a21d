"""The compiled kernels equal the specification, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quark_native.formats import Format
from quark_native.kernels import cpu, library
from quark_native.kernels.dispatch import forced
from torch import Tensor

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=library.load()[1])

BLOCKS = (
    "mxfp8",
    "mxfp8_e5m2",
    "mxfp6",
    "mxfp6_e3m2",
    "mxfp4",
    "mxfp4{7}",
    "mxint8",
    "mxint4",
    "mxint2",
    "msfp12",
    "block_fp[6|8]{16}",
    "block_minifloat[8|4|8]{16}",
    "block_minifloat[6|3|4]{32}",
    "mxfp4/scale:even",
    "mxfp8/scale:ceil",
    "mxfp6/scale:rceil",
    "nvfp4",
    "nvfp4_one_level",
)
GIVEN = (
    "int8/tensor",
    "int8/channel",
    "int8/channel:1/asym",
    "int8/narrow",
    "uint4/group:32/asym",
    "int4/group:128",
    "int16/token",
    "int8/block:4x32",
    "lpbq[4|8]{32}",
    "fixed[8,4]",
    "ufixed[6,2]",
    "fp8_e4m3/tensor",
    "fp8_e5m2/channel",
    "fp4_e2m1/group:16",
    "fp[0|4|3]/channel",
    "fp[1|4|3]/unit",
    "denorm[8|4]",
)
ONE_ROUNDING = (
    "bfp[8|8]{64}",
    "bfp[4|8]{16}",
    "bfp[4|8]{16}(_N)",
    "bfp[16|8]{32}",
    "block_log[8|8]{16}",
    "block_log[4|8]{32}",
    "log[8]",
    "log[6]",
    "binary",
    "binary[unit]",
    "binary[zero]/group:16",
    "ternary",
    "ternary/group:32",
)
ROUNDINGS = ("nearest_away", "toward_zero", "floor", "ceil", "stochastic")
NAMES = (*BLOCKS, *GIVEN, *ONE_ROUNDING)
ROUNDED = tuple(f"{name}/{mode}" for name in (*BLOCKS[::3], *GIVEN[::3]) for mode in ROUNDINGS)


def make(name: str) -> Format:
    return Format.parse(name, role="output" if "/token" in name else "weight")


def assert_same(fmt: Format, x: Tensor, seed: int = 7) -> None:
    """Also the sign of zero; of NaN neither sign nor payload."""
    parameters = fmt.measure(x.float()) if fmt.call().given else None
    assert cpu.refusal(fmt, fmt.call(), x, parameters) is None
    with forced("cpu"):
        found = fmt.fake_quantize(x, parameters, seed=seed)
    expected = fmt.specification(x, parameters, seed)
    bits = torch.int32 if x.dtype == torch.float32 else torch.int16
    equal = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
    if not equal.all():
        place = tuple((~equal).nonzero()[0].tolist())
        values = [float(tensor[place]) for tensor in (x, found, expected)]
        pytest.fail(f"{fmt} at {place}: {values[0]!r} became {values[1]!r}, not {values[2]!r}")


def strata() -> Tensor:
    """float32 of every sign and exponent with mantissas at and around the edges, and random."""
    generator = np.random.default_rng(0)
    edges = [0, 1, 2, 3, 0x3504F3, 0x3504F4, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF]
    edges += [1 << place for place in range(23)] + [0x7FFFFF ^ (1 << place) for place in range(23)]
    mantissas = np.concatenate([edges, generator.integers(0, 1 << 23, 71)])
    heads = np.arange(512, dtype=np.uint32)[:, None] << 23
    return torch.from_numpy(
        (heads | mantissas.astype(np.uint32)).astype(np.uint32).view(np.float32)
    )


STRATA = strata()
MIXED = STRATA.flatten()[torch.randperm(STRATA.numel(), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("name", [*NAMES, *ROUNDED])
@pytest.mark.parametrize("arranged", ["by exponent", "mixed", "mixed, finite", "one magnitude"])
def test_float32_of_every_exponent(name, arranged):
    fmt = make(name)
    if arranged == "by exponent":
        x = STRATA
    elif arranged == "one magnitude":
        # Values of all exponents below the same maximum, for each maximum.
        finite = STRATA[:, 0].isfinite()
        x = STRATA[finite][::3] * 0.999
    else:
        x = MIXED.view(STRATA.shape)
        if "finite" in arranged:
            x = torch.where(x.isfinite(), x, 1.0)
    assert_same(fmt, x)


@pytest.mark.parametrize("name", [*NAMES, *ROUNDED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_numbers_of_16_bits(name, dtype):
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    fmt = make(name)
    assert_same(fmt, everything.view(256, 256))
    shuffled = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1))
    mixed = everything[shuffled]
    assert_same(fmt, torch.where(mixed.isfinite(), mixed, 0).view(128, 512))


@pytest.mark.parametrize("name", NAMES)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    axis=st.integers(-4, 3),
    seed=st.integers(0, 2**31),
    strided=st.booleans(),
)
def test_any_shape_axis_and_stride(name, shape, axis, seed, strided):
    if len(shape) != 2 and "block:" in name:
        shape = [*shape[:2]]
    if not any(word in name for word in ("tensor", "block:", "unit", "fixed", "denorm", "token")):
        if "channel" in name or name in ("int8/narrow", "binary", "ternary", "binary[unit]"):
            axis = axis if ":1" not in name else None
        axis = None if axis is None or not -len(shape) <= axis < len(shape) else axis
        fmt = Format.parse(name, axis=axis)
    else:
        fmt = make(name)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** (seed % 60 - 30)
    if strided:
        x = torch.stack([x, x + 1], -1)[..., 0].transpose(0, 1)
    assert_same(fmt, x)


@pytest.mark.parametrize(
    "name", ["mxfp4", "bfp[8|8]{64}", "int8/channel", "mxfp8/stochastic", "log[8]"]
)
def test_threads_do_not_matter(name):
    x = torch.randn(700, 500, generator=torch.Generator().manual_seed(0))
    fmt, threads = make(name), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(fmt.fake_quantize(x, seed=3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["mxfp4", "bfp[8|8]{64}", "int8/channel", "mxfp4{100}"])
@pytest.mark.parametrize("rows", [3, 20_000])
def test_results_go_where_they_are_wanted(name, rows):
    # The larger one is written around the caches.
    x = torch.randn(rows, 500, generator=torch.Generator().manual_seed(0))
    fmt = make(name)
    expected, out = fmt.fake_quantize(x), torch.empty_like(x)
    assert fmt.fake_quantize(x, out=out) is out
    assert torch.equal(out, expected)
    assert fmt.fake_quantize(x, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse2", "portable"])
def test_instruction_sets_agree(isa, tmp_path):
    program = """
import sys, torch
from quark_native.formats import Format
from quark_native.kernels import library
if library.load()[0] is None:
    sys.exit(77)
x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
found = {}
for name in sys.argv[2:]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for axis in (0, 1):
            fmt = Format.parse(name, axis=None if "tensor" in name else axis)
            found[f"{name} {dtype} {axis}"] = fmt.fake_quantize(x.to(dtype)).float()
packed = Format.parse("mxfp4").quantize(x)
found["packed"], found["unpacked"] = packed.codes, packed.dequantize()
packed = Format.parse("mxfp6").quantize(x)
found["packed 6"], found["unpacked 6"] = packed.codes, packed.dequantize()
torch.save(found, sys.argv[1])
"""
    names = (
        "mxfp8",
        "mxint8",
        "bfp[8|8]{64}",
        "nvfp4",
        "block_log[8|8]{16}",
        "int8/tensor",
        "log[8]",
    )
    results = []
    for kernel in ({"QUARK_NATIVE_ISA": isa}, {"QUARK_NATIVE_KERNEL": "torch"}):
        file = tmp_path / f"{len(results)}.pt"
        command = [sys.executable, "-c", program, str(file), *names]
        code = subprocess.run(command, env={**os.environ, **kernel}, check=False).returncode
        if code == 77:
            pytest.skip(f"this machine has no {isa}")
        assert code == 0
        results.append(torch.load(file))
    for key, expected in results[1].items():
        assert torch.equal(results[0][key], expected), key


def _in_child(x: Tensor, queue: multiprocessing.SimpleQueue) -> None:
    # Nothing else here may be parallel: torch's own threads do not survive a fork.
    queue.put(Format.parse("mxfp4").fake_quantize(x)[-1, -100:].tolist())


def test_threads_survive_a_fork():
    x, threads = torch.randn(512, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = Format.parse("mxfp4").fake_quantize(x)[-1, -100:].tolist()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(x, queue), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == expected
    finally:
        torch.set_num_threads(threads)
