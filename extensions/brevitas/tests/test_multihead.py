"""MultiheadAttention: taken apart without a change, then quantized like other layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.multihead import SplitAttention, split_all
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

BLOCKED = torch.ones(5, 5, dtype=torch.bool).triu(1)


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(**{"name": "brevitas", "weight": "int8", **fields}))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": BLOCKED},
        {"attn_mask": torch.randn(6, 5, 5)},
        {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
        {"attn_mask": BLOCKED, "key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
    ],
)
def test_it_computes_what_it_did(batch_first: bool, given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    nn.init.normal_(whole.in_proj_bias)
    parts = SplitAttention(copy.deepcopy(whole))
    shape = (3, 5, 8) if batch_first else (5, 3, 8)
    x, other = torch.randn(shape), torch.randn(shape)
    for inputs in ((x, x, x), (x, other, other)):
        torch.testing.assert_close(parts(*inputs, **given), whole(*inputs, **given))


def test_without_a_batch() -> None:
    whole = nn.MultiheadAttention(8, 2).eval()
    x = torch.randn(5, 8)
    torch.testing.assert_close(SplitAttention(copy.deepcopy(whole))(x, x, x), whole(x, x, x))


@pytest.fixture
def encoder() -> nn.Module:
    """One of torch's own encoder layers, which have a fused path in eval mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 3)).eval()


@pytest.fixture
def batches() -> list[Tensor]:
    """Inputs for it."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": "int8", "attention": {}},
        {"input": "int8/token/dynamic/sym", "algorithm": "gptq"},
        {"rotation": {"mode": "layerwise"}, "activation_equalization": {}},
    ],
)
def test_encoder_layers(
    encoder: nn.Module, batches: list[Tensor], tmp_path: Path, fields: dict[str, Any]
) -> None:
    quantizer = _quantizer(**fields)
    quantized = quantizer.quantize(encoder, batches)
    names = {entry.name for entry in quantized.plan.quantized}
    assert names >= {"1.self_attn.in_proj", "1.self_attn.out_proj", "1.linear1", "0", "2"}
    assert ("1.self_attn.sdpa" in names) is ("attention" in fields)
    assert quantized.counterpart("1.self_attn.in_proj") is None
    with torch.no_grad():
        truth = encoder(batches[0])
        error = (quantized(batches[0]) - truth).norm() / truth.norm()
    assert 0 < float(error) < 0.1
    quantized.save(tmp_path)
    loaded = quantizer.restore(encoder, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), quantized(batches[0]))


def test_numbers_are_those_of_brevitas(batches: list[Tensor]) -> None:
    """Against QuantMultiheadAttention with the same quantizers, called by hand."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.nn import QuantMultiheadAttention
    from quark_brevitas.quantizers import input_quantizer, weight_quantizer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attn(x, x, x, need_weights=False)[0]
            return out

    torch.manual_seed(0)
    model = Model().eval()
    quantizer = _quantizer(input="int8/sym", attention={"spec": "int8/sym"})
    quantized = quantizer.quantize(model, batches)
    plan = quantized.plan["attn.in_proj"]
    inputs, weights = input_quantizer(plan.input), weight_quantizer(plan.weight)
    assert inputs is not None
    settings = {
        **dict.fromkeys(("in_proj_weight_quant", "out_proj_weight_quant"), weights),
        **dict.fromkeys(("in_proj_bias_quant", "out_proj_bias_quant")),
        **dict.fromkeys(("in_proj_input_quant", "out_proj_input_quant"), inputs),
        **dict.fromkeys(("q_scaled_quant", "k_transposed_quant", "v_quant"), inputs),
        "attn_output_weights_quant": inputs.let(signed=False),
    }
    layers = {nn.MultiheadAttention: (QuantMultiheadAttention, settings)}
    direct = layerwise_quantize(copy.deepcopy(model), layers)
    with torch.no_grad():
        with calibration_mode(direct):
            for batch in batches:
                direct(batch)
        torch.testing.assert_close(quantized(batches[0]), direct(batches[0]), atol=2e-3, rtol=0)
        assert not torch.equal(quantized(batches[0]), model(batches[0]))


def test_rarer_kinds_stay_whole() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    assert split_all(model) == []
