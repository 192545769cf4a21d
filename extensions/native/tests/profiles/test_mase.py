from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from quark_native.profiles import mase

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FULL_SET = Path(__file__).resolve().parents[5] / "shared" / "golden" / "mase" / "quantizers.npz"
TOOLS = runpy.run_path(str(GOLDEN / "make_mase_aimet.py"))
TABLE = json.loads((GOLDEN / "mase_aimet.json").read_text())["mase"]
INPUTS = {name: torch.from_numpy(x) for name, x in np.load(GOLDEN / "mase.npz").items()}
KEYS = [
    f"{function}/{name}/{x}"
    for function, configurations in TABLE.items()
    for name, entry in configurations.items()
    for x in entry["outputs"]
]
FUNCTIONS = sorted(set(mase.__all__) - {"VERSION"})


@pytest.mark.parametrize("key", KEYS)
def test_golden(key: str) -> None:
    function, name, source = key.split("/")
    entry = TABLE[function][name]
    x = INPUTS[source].clone()
    found = getattr(mase, function)(x, **entry["arguments"])
    assert found.dtype == torch.float32
    assert found.shape[-x.ndim :] == x.shape
    np.testing.assert_array_equal(x, INPUTS[source])
    if TOOLS["digest"](found.numpy()) == entry["outputs"][source]:
        return
    report = key
    if FULL_SET.exists():
        expected = np.load(FULL_SET)[f"out/{key}"]
        report = f"{key}: {TOOLS['differences'](found.numpy(), expected, x.numpy())}"
    pytest.fail(report)


def test_every_function_has_golden_outputs() -> None:
    assert sorted(TABLE) == FUNCTIONS
    assert len(KEYS) >= 1820


@pytest.mark.parametrize(
    ("function", "shape", "arguments", "words"),
    [
        ("binary", (16, 64), {"bipolar": False}, "4 axes"),
        ("ternary", (16, 64), {"scaling_factor": False}, "4 axes"),
        ("residual_sign", (3,), {"levels": 4, "means": [1.0] * 4}, "1, 2 or 3 levels"),
        ("residual_sign", (3,), {"levels": 2, "means": [1.0]}, "as many means"),
        ("mxint", (7, 45), {"element_bits": 8, "block_size": 32}, "do not fill"),
        (
            "mxfp",
            (7, 45),
            {"block_size": 32, "element_exp_bits": 2, "element_frac_bits": 1},
            "do not fill",
        ),
        (
            "mxfp",
            (32,),
            {"block_size": 32, "element_exp_bits": 3, "element_frac_bits": 3},
            r"no MXFP of elements \(3, 3\)",
        ),
        ("minifloat_mx", (3,), {"exp_bits": 8, "frac_bits": 8}, "no minifloat of 8"),
        ("mxint_hardware", (6, 6), {"parallelism": [4, 3]}, "tiles of 4 x 3"),
        ("block_fp", (3, 4, 5), {"skip_first_dim": False}, "1 or 2 axes"),
        ("block_fp", (5,), {"skip_first_dim": True}, "2 or 3 axes"),
    ],
)
def test_refuses_what_mase_fails_on(
    function: str, shape: tuple[int, ...], arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(mase, function)(torch.ones(shape), **arguments)


# The documented defects, each with the values MASE returns.


def test_minifloat_codes_lose_carries_at_odd_fields_and_subnormals() -> None:
    x = torch.tensor([1.95, 1.9999, 500.0, 3.99, 2.0**-7, 2.0**-8])
    found = mase.minifloat_mx(x, exp_bits=4, frac_bits=3)
    assert found.tolist() == [1.0, 1.0, 256.0, 4.0, 0.0, 0.0]


def test_minifloats_clamp_where_they_should_carry() -> None:
    x = torch.tensor([1.99, 3.95])
    assert mase.minifloat_ieee(x, width=8, exponent_width=4).tolist() == [1.875, 3.75]
    assert mase.minifloat_denorm(x[:1], width=8, exponent_width=4).tolist() == [1.75]


def test_block_fp_saturates_at_exact_powers_of_two() -> None:
    found = mase.block_fp(torch.tensor([[1.0, 0.5]]), width=4, block_size=[1, 2])
    assert found.tolist() == [[0.875, 0.5]]


def test_block_minifloat_loses_small_blocks() -> None:
    x = torch.full((1, 16), 2.0**-6)
    found = mase.block_minifloat(
        x, width=8, exponent_width=4, exponent_bias_width=8, block_size=[1, 16]
    )
    assert not found.any()


def test_values_near_zero_come_back_unquantized() -> None:
    x = torch.tensor([[9e-9, 1.0]])
    assert mase.block_fp(x, width=4, block_size=[1, 2])[0, 0] == x[0, 0]
    assert mase.minifloat_ieee(x, width=8, exponent_width=4)[0, 0] == x[0, 0]


def test_log_has_no_zero() -> None:
    assert mase.log(torch.zeros(1), width=4).tolist() == [2.0**-3]


def test_search_of_mxint_compares_with_other_elements_off_the_last_axis() -> None:
    x = INPUTS["normal"]

    def error(**arguments: object) -> float:
        found = mase.mxint(x, block_size=16, element_bits=4, **arguments)
        return float((found - x).norm() / x.norm())

    plain = error(block_dim=0)
    assert error(block_dim=0, quantile_search=True) > 2 * plain
    assert error(quantile_search=True) <= error()


def test_stochastic_thresholds_come_from_the_global_generator() -> None:
    x = torch.linspace(-1.5, 1.5, 4001)
    torch.manual_seed(7)
    draws = torch.rand(4001)
    torch.manual_seed(7)
    found = mase.binary(x, stochastic=True, bipolar=True)
    assert torch.equal(found, torch.where(((x + 1) / 2).clamp(0, 1) >= draws, 1.0, -1.0))
    assert (found[x >= 1] == 1).all()
    assert abs(float(found.mean() - x.clamp(-1, 1).mean())) < 0.05


def test_stochastic_scaled_binary_ignores_its_draws() -> None:
    x = INPUTS["w4d"]
    found = mase.binary(x, stochastic=True)
    clipped = ((x + 1) / 2).clamp(0, 1)
    scale = clipped.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.equal(found, torch.where(clipped > 0, scale, 0.0))
