from __future__ import annotations

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quark_native.profiles import aimet
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FULL_SET = Path(__file__).resolve().parents[5] / "shared" / "golden" / "aimet"
TOOLS = runpy.run_path(str(GOLDEN / "make_mase_aimet.py"))
TABLE = json.loads((GOLDEN / "mase_aimet.json").read_text())["aimet"]
INPUTS = {name: torch.from_numpy(x) for name, x in np.load(GOLDEN / "aimet.npz").items()}
KEYS = [
    f"{file}/{case}/{field}"
    for file, cases in TABLE.items()
    for case, entry in cases.items()
    for field in entry["outputs"]
]
CLASSES = {"_MXFP4QuantizeDequantize": aimet.mxfp4, "_NVFP4QuantizeDequantize": aimet.nvfp4}
EDGES = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38, 0.125, 0.375])


def functional(x: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    scale, offset = torch.tensor(arguments["scale"]), torch.tensor(float(arguments["offset"]))
    grid = {"qmin": arguments["qmin"], "qmax": arguments["qmax"]}
    return {
        "q": aimet.quantize(x, scale=scale, offset=offset, **grid),
        "qdq": aimet.quantize_dequantize(x, scale=scale, offset=offset, **grid),
    }


def gradients(given: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    x, low, high = (given[name].clone().requires_grad_() for name in ("x", "min", "max"))
    symmetric = arguments["symmetric"]
    qmin, qmax = aimet.grid(arguments["bitwidth"], symmetric=symmetric)
    scale, offset = aimet.scale_offset(low, high, qmin=qmin, qmax=qmax, symmetric=symmetric)
    qdq = aimet.quantize_dequantize(
        x, scale=scale, offset=offset, qmin=qmin, qmax=qmax, learned=True
    )
    (qdq * given["g"]).sum().backward()
    return {"qdq": qdq.detach(), "grad_x": x.grad, "grad_min": low.grad, "grad_max": high.grad}


def affine(given: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    if "scale" in arguments:
        return functional(given["x"], arguments)
    if "g" in given:
        return gradients(given, arguments)
    arguments = dict(arguments)
    dtype = getattr(torch, arguments.pop("input_dtype", "torch.float32").removeprefix("torch."))
    x = given["x"].to(dtype)
    symmetric = arguments["symmetric"]
    if "bitwidth" in arguments:
        expected = aimet.grid(arguments["bitwidth"], symmetric=symmetric)
        stated = (arguments.pop("qmin", expected[0]), arguments.pop("qmax", expected[1]))
        assert stated == expected
    else:
        expected = (arguments["qmin"], arguments["qmax"])
    qmin, qmax = expected
    qdq = aimet.affine(x, **arguments)
    assert qdq.dtype == dtype
    blocks = {"block_size": arguments.get("block_size")}
    low, high = aimet.min_max(
        x,
        steps=qmax - qmin - (arguments.get("zero_point_shift") == 0.5),
        symmetric=symmetric,
        shape=arguments["shape"],
        **blocks,
    )
    scale, offset = aimet.scale_offset(low, high, qmin=qmin, qmax=qmax, symmetric=symmetric)
    assert list(scale.shape) == list(offset.shape) == arguments["shape"]
    found = {"min": low, "max": high, "scale": scale, "offset": offset, "qdq": qdq.float()}
    if dtype == torch.float32:
        q = aimet.quantize(x, scale=scale, offset=offset, qmin=qmin, qmax=qmax, **blocks)
        found |= {"q": q, "dq": aimet.dequantize(q, scale=scale, offset=offset, **blocks)}
    return found


def lpbq(given: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    x, bits = given["x"], arguments["bitwidth"]
    qmin, qmax = aimet.grid(bits, symmetric=True)
    blocks = {"shape": arguments["shape"], "block_size": arguments["block_size"]}
    low, high = aimet.min_max(x, steps=qmax - qmin, symmetric=True, **blocks)
    raw, _ = aimet.scale_offset(low, high, qmin=qmin, qmax=qmax, symmetric=True)
    scale, shared, multiples = aimet.lpbq_scales(
        raw,
        bitwidth=bits,
        decompressed_bw=arguments["decompressed_bw"],
        block_grouping=arguments["block_grouping"],
    )
    return {
        "min": low,
        "max": high,
        "raw_scale": raw,
        "scale": scale,
        "per_channel_scale": shared,
        "per_block_int_scale": multiples,
        "qdq": aimet.lpbq(x, **arguments),
    }


def floats(
    given: dict[str, Tensor], arguments: dict[str, Any], *, calibrated: bool
) -> dict[str, Tensor]:
    arguments = dict(arguments)
    x, name = given["x"], arguments.pop("cls", None)
    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    if name is not None:
        e2m1 = {"exponent_bits": 2, "mantissa_bits": 1, "finite": True}
        scale, maxval = aimet.float_scale(x, power_of_two="MX" in name, **e2m1, **arguments)
        return {"scale": scale, "maxval": maxval, "qdq": CLASSES[name](x, **arguments)}
    if calibrated:
        scale, maxval = aimet.float_scale(x, **arguments)
        qdq = aimet.float_quantize_dequantize(x, **arguments)
        return {"scale": scale, "maxval": maxval, "qdq": qdq}
    qdq = aimet.float_quantize_dequantize(x, scale=torch.ones(()), **arguments)
    return {"maxval": torch.tensor(aimet.float_max(**arguments)), "qdq": qdq}


@cache
def outputs(file: str, case: str) -> dict[str, Tensor]:
    entry = TABLE[file][case]
    given = {field: INPUTS[name].clone() for field, name in entry["inputs"].items()}
    if file == "float":
        found = floats(given, entry["arguments"], calibrated="scale" in entry["outputs"])
    else:
        found = {"affine": affine, "lpbq": lpbq}[file](given, entry["arguments"])
    for field, name in entry["inputs"].items():
        np.testing.assert_array_equal(given[field], INPUTS[name])
    assert found["qdq"].shape == given["x"].shape
    return found


@pytest.mark.parametrize("key", KEYS)
def test_golden(key: str) -> None:
    file, case, field = key.split("/")
    entry = TABLE[file][case]
    found = outputs(file, case)[field]
    assert found.dtype == torch.float32
    if TOOLS["digest"](found.numpy()) == entry["outputs"][field]:
        return
    report = key
    full = FULL_SET / f"{file}.npz"
    if full.exists():
        expected = np.load(full)[f"{case}/{field}"]
        x = INPUTS[entry["inputs"]["x"]].numpy()
        x = x if x.shape == expected.shape else expected
        report = f"{key}: {TOOLS['differences'](found.numpy(), expected, x)}"
    pytest.fail(report)


def test_every_file_has_golden_outputs() -> None:
    assert sorted(TABLE) == ["affine", "float", "lpbq"]
    assert len(KEYS) >= 541


def test_torch_kernel_sends_nan_to_the_lowest_integer_and_the_formula_keeps_it() -> None:
    grid = {"scale": torch.tensor(0.25), "offset": torch.tensor(0.0), "qmin": -8, "qmax": 7}
    plain = aimet.quantize_dequantize(EDGES, **grid)
    learned = aimet.quantize_dequantize(EDGES, learned=True, **grid)
    assert plain.tolist() == [0.0, 0.0, 1.75, -2.0, -2.0, 0.0, 1.75, 0.0, 0.5]
    assert learned.isnan().tolist() == EDGES.isnan().tolist()
    assert torch.equal(learned[~EDGES.isnan()], plain[~EDGES.isnan()])


def test_two_bits_divide_the_maximum_by_one_step_more() -> None:
    x = torch.tensor([-1.0, 1.0])
    low, high = aimet.min_max(x, steps=3, symmetric=True)
    assert (float(low), float(high)) == (-1.0, 0.5)
    low, high = aimet.min_max(x, steps=255, symmetric=True)
    assert float(high) == 1.0
    assert float(low) == pytest.approx(-128 / 127)


def test_ranges_include_zero_and_scales_never_vanish() -> None:
    low, high = aimet.min_max(torch.tensor([2.0, 3.0]), steps=255, symmetric=False)
    assert (float(low), float(high)) == (0.0, 3.0)
    low, high = aimet.min_max(torch.zeros(4), steps=255, symmetric=False)
    scale, offset = aimet.scale_offset(low, high, qmin=0, qmax=255, symmetric=False)
    assert float(scale) == pytest.approx(torch.finfo(torch.float32).eps)
    assert float(offset) == 0.0
    assert not aimet.affine(torch.zeros(4), bitwidth=8, symmetric=True).any()


def test_minifloats_have_one_binade_more_than_ieee_ones() -> None:
    e4m3 = {"exponent_bits": 4, "mantissa_bits": 3, "scale": torch.ones(())}
    x = torch.tensor([2.0**-10, 1.5 * 2.0**-10, 2.0**-12, 1e9])
    assert aimet.float_quantize_dequantize(x, **e4m3).tolist() == [
        2.0**-10,
        2.0**-9,
        0.0,
        240.0,
    ]


def test_formats_without_mantissa_cut_the_maximum_to_an_integer() -> None:
    scale, maxval = aimet.float_scale(torch.tensor([3.9]), exponent_bits=3, mantissa_bits=0)
    assert (float(scale), float(maxval)) == (3 / 8, 3.0)
    small = aimet.float_quantize_dequantize(
        torch.tensor([0.9, 0.0]), exponent_bits=3, mantissa_bits=0
    )
    assert float(small[0]) == 0.0
    assert small[1].isnan()


def test_mxfp4_saturates_just_above_powers_of_two() -> None:
    blocks = {"shape": [2, 1], "block_size": [1, 2]}
    x = torch.tensor([[8.0, 1.0], [9.0, 1.0]])
    assert aimet.mxfp4(x, **blocks).tolist() == [[6.0, 1.0], [8.0, 1.0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: aimet.affine(x, symmetric=True), "either a bitwidth"),
        (lambda x: aimet.affine(x, symmetric=True, bitwidth=8, qmin=0, qmax=3), "either a bitw"),
        (lambda x: aimet.affine(x, symmetric=True, bitwidth=0), "at least 1 bit"),
        (lambda x: aimet.affine(x, symmetric=True, bitwidth=8, shape=[3, 1]), "no scales of"),
        (
            lambda x: aimet.affine(x, symmetric=True, bitwidth=8, shape=[4, 3], block_size=[1, 3]),
            "do not cover",
        ),
        (
            lambda x: aimet.affine(
                x[0], symmetric=True, bitwidth=8, shape=[4, 1], block_size=[1, 8]
            ),
            "do not cover",
        ),
        (
            lambda x: aimet.quantize(
                x.half(), scale=torch.ones(()), offset=torch.zeros(()), qmin=0, qmax=65535
            ),
            "cannot hold",
        ),
        (
            lambda x: aimet.lpbq(x, shape=[4, 2], bitwidth=8, decompressed_bw=4, block_size=[1, 4]),
            "below bitwidth",
        ),
        (lambda x: aimet.float_quantize_dequantize(x, exponent_bits=4), "give exponent_bits and"),
        (
            lambda x: aimet.float_quantize_dequantize(
                x, exponent_bits=4, mantissa_bits=3, dtype=torch.float8_e4m3fn
            ),
            "give either",
        ),
        (
            lambda x: aimet.float_quantize_dequantize(
                x, exponent_bits=3, mantissa_bits=2, finite=True
            ),
            "no e3m2 of that kind",
        ),
    ],
)
def test_refuses_what_aimet_has_not(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(torch.ones(4, 8))
