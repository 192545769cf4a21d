"""Recipes give what direct calls of EthosUQuantizer gave, on two fixed networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quark_pt2e import schemes
from quark_pt2e.backends.arm import EthosUBackend
from quark_pt2e.config.arm import EthosUConfig
from quark_pt2e.graph.encodings import conversion, is_dequantize, is_quantize
from torch import fx, nn

from quark_core.batch import Batch

GOLDEN = Path(__file__).parent / "golden"
INT8, A16W8, UINT8 = schemes.int8(), schemes.a16w8(), schemes.uint8_io()
ENDS = ({"io": "input"}, {"io": "output"})
TWO_RULES = [{"name": "block1", **INT8}, {"type": "Block", **A16W8}]
CONFIGS: dict[str, dict[str, Any]] = {
    "int8_global": INT8,
    "int8_global_per_tensor": schemes.int8(per_channel=False),
    "int8_set_io_uint8": {**INT8, "rules": [{**end, **UINT8} for end in ENDS]},
    "io_only": {"rules": [{**end, **INT8} for end in ENDS]},
    "name_none_block1": {**INT8, "rules": [{"name": "block1", "skip": True}]},
    "name_block1_pw_a16w8": {**INT8, "rules": [{"name": "block1.pw", **A16W8}]},
    "type_conv2d_only": {"rules": [{"type": "Conv2d", **INT8}]},
    "type_linear_none": {**INT8, "rules": [{"type": "torch.nn.Linear", "skip": True}]},
    "type_block_a16w8": {**INT8, "rules": [{"type": "Block", **A16W8}]},
    "name_then_type": {**INT8, "rules": TWO_RULES},
    "name_then_type_legacy": {
        **INT8,
        "rules": TWO_RULES,
        "precedence": "executorch",
        "composable": False,
    },
    "a16w8_global": A16W8,
    "a8w4_global": schemes.a8w4(),
}
THEIRS = [
    name
    for name, config in CONFIGS.items()
    if "rules" in config and "precedence" not in config and name != "io_only"
]


@pytest.fixture(scope="module")
def tables() -> Any:
    """Scale and zero point of each quantize and dequantize node."""
    return json.loads((GOLDEN / "tables.json").read_text())


@pytest.fixture(scope="module")
def outputs() -> Any:
    """Outputs of the converted graphs on the test images."""
    return np.load(GOLDEN / "outputs.npz")


@pytest.fixture(scope="module")
def weights() -> Any:
    """Integer weights and biases."""
    return np.load(GOLDEN / "weights.npz")


def _table(graph: fx.GraphModule, prefix: str = "") -> dict[str, list[Any]]:
    rows = {}
    for node in graph.graph.nodes:
        if is_quantize(node) or is_dequantize(node):
            row = conversion(node)
            assert row is not None
            assert row.scale is not None
            assert row.zero_point is not None
            numbers = [row.scale.tolist(), row.zero_point.tolist(), row.low, row.high]
            rows[prefix + node.name] = [*numbers, str(row.dtype)]
    for name, inner in graph.named_children():
        if isinstance(inner, fx.GraphModule):
            rows |= _table(inner, f"{prefix}{name}.")
    return rows


def _quantize(model: nn.Module, images: np.ndarray, **config: Any) -> Any:
    quantizer = EthosUBackend(EthosUConfig(name="ethos-u", target="ethos-u85-256", **config))
    return quantizer.quantize(model, [torch.from_numpy(image[None]) for image in images])


def _codes(graph: fx.GraphModule) -> dict[str, np.ndarray]:
    """Frozen integers by the operation that reads them, as the reference keys them."""
    found = {}
    for node in graph.graph.nodes:
        for role, argument in zip(("input", "weight", "bias"), node.args, strict=False):
            source = argument.args[0] if is_dequantize(argument) else None
            if role != "input" and isinstance(source, fx.Node) and source.op == "get_attr":
                found[f"{node.name}.{role}"] = getattr(graph, source.target).numpy()
    return found


def _assert_close(found: np.ndarray, expected: np.ndarray, quantized: Any) -> None:
    """Equal but for what another order of float sums does.

    The last bit of a range moves with it, and values near to a rounding boundary by a step, in one
    layer after the other. Direct calls in the same process are compared bit for bit elsewhere.
    """
    steps = [row[0] for row in _table(quantized.graph).values() if isinstance(row[0], float)]
    apart = np.abs(found - expected) / steps[-1]
    assert apart.max() <= 3.01
    assert apart.mean() <= 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_same_as_direct_calls(
    name: str, golden_model: nn.Module, golden_inputs: Any, tables: Any, outputs: Any, weights: Any
) -> None:
    quantized = _quantize(golden_model, golden_inputs["calib"], **CONFIGS[name])
    if name in tables:
        found, wanted = _table(quantized.graph), {row[0]: row[1:] for row in tables[name]}
        assert found.keys() == wanted.keys()
        for node, row in wanted.items():
            # Sums of floats come in another order on another processor, and sometimes after other
            # work in the same process: a range may differ in its last bit.
            np.testing.assert_allclose(found[node][0], row[0], rtol=1e-6, err_msg=node)
            assert found[node][1:] == row[1:], node
    codes = _codes(quantized.graph)
    expected = {
        key.partition("/")[2]: weights[key] for key in weights.files if key.startswith(f"{name}/")
    }
    for key, values in expected.items():
        # A bias is counted in steps of input times weight scale, so it may move by one with them.
        steps = int(key.endswith("bias"))
        assert np.abs(codes[key].astype(np.int64) - values.astype(np.int64)).max() <= steps, key
    with torch.no_grad():
        results = quantized(torch.from_numpy(golden_inputs["test"])).numpy()
    _assert_close(results, outputs[name], quantized)


@pytest.mark.parametrize("name", THEIRS)
def test_executorchs_own_precedence_agrees_where_ours_does(
    name: str, golden_model: nn.Module, golden_inputs: Any, outputs: Any
) -> None:
    config = {**CONFIGS[name], "precedence": "executorch"}
    quantized = _quantize(golden_model, golden_inputs["calib"], **config)
    with torch.no_grad():
        found = quantized(torch.from_numpy(golden_inputs["test"])).numpy()
    _assert_close(found, outputs[name], quantized)


@pytest.mark.parametrize("batch", ["static", "dynamic"])
def test_branches(
    batch: str, cond_model: nn.Module, golden_inputs: Any, tables: Any, outputs: Any
) -> None:
    data = [
        Batch((torch.from_numpy(image[None]), torch.from_numpy(flag)))
        for image, flag in zip(golden_inputs["calib_x"], golden_inputs["calib_flag"], strict=True)
    ]
    config = EthosUConfig(name="ethos-u", target="ethos-u85-256", batch=batch, **INT8)
    quantized = EthosUBackend(config).quantize(cond_model, data)
    assert quantized.record["branches"] == {"cond.true": 8, "cond.false": 8}
    found, expected = _table(quantized.graph), {row[0]: row[1:] for row in tables["cond_int8"]}
    assert found.keys() == expected.keys()
    for node, row in expected.items():
        # The linear layer's sums come in another order here: one scale differs in the last bit.
        np.testing.assert_allclose(found[node][0], row[0], rtol=1e-6)
        assert found[node][1:] == row[1:]
    with torch.no_grad():
        results = [
            quantized(torch.from_numpy(image[None]), torch.from_numpy(flag)).numpy()
            for image, flag in zip(golden_inputs["test_x"], golden_inputs["test_flag"], strict=True)
        ]
    np.testing.assert_allclose(np.concatenate(results), outputs["cond_int8"], rtol=0, atol=1e-6)
    assert any("through torch.cond" in warning for warning in quantized.plan.warnings)


def test_branches_left_float(
    cond_model: nn.Module, golden_inputs: Any, tables: Any, outputs: Any
) -> None:
    data = [
        Batch((torch.from_numpy(image[None]), torch.from_numpy(flag)))
        for image, flag in zip(golden_inputs["calib_x"], golden_inputs["calib_flag"], strict=True)
    ]
    config = EthosUConfig(
        name="ethos-u", target="ethos-u85-256", batch="static", branches="float", **INT8
    )
    quantized = EthosUBackend(config).quantize(cond_model, data)
    expected = {row[0]: row[1:] for row in tables["cond_int8_plain"]}
    found = _table(quantized.graph)
    assert found.keys() == expected.keys()
    for node, row in expected.items():
        np.testing.assert_allclose(found[node][0], row[0], rtol=1e-6)
        assert found[node][1:] == row[1:]
    with torch.no_grad():
        results = [
            quantized(torch.from_numpy(image[None]), torch.from_numpy(flag)).numpy()
            for image, flag in zip(golden_inputs["test_x"], golden_inputs["test_flag"], strict=True)
        ]
    np.testing.assert_allclose(
        np.concatenate(results), outputs["cond_int8_plain"], rtol=0, atol=1e-6
    )
    inside = [entry for entry in quantized.plan.entries if entry.name.startswith("cond.")]
    assert inside
    assert all(entry.reason == "branches: float leaves it" for entry in inside)
    assert not quantized.plan.warnings


def test_the_copy_is_small() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 1_200_000
