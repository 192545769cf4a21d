"""Saving and loading: exact, packed, and refused where the files do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from quark_native.config import NativeConfig
from quark_native.quantizer import NativeQuantizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quark_core.errors import ExportError, QuantizationError

CONFIGS = {
    "static": {"weight": "int8/channel", "input": "uint8", "output": "int8/mse"},
    "power of two": {"weight": "int5/group:8/asym/power_of_two", "input": "int8/power_of_two"},
    "microscaling": {"weight": "mxfp6", "input": "mxfp6"},
    "block float": {"weight": "bfp[7|8]{16}"},
    "floats": {"weight": "fp8/channel", "input": "fp[1|3|4]"},
    "wide": {"weight": "int12/tensor", "bias": "int16/tensor"},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 20)
        self.conv = nn.Conv1d(20, 20, 3, padding=1)
        self.norm = nn.BatchNorm1d(20)
        self.head = nn.Linear(20, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        return self.head(self.norm(self.conv(x)).transpose(1, 2))


def native(**config: object) -> NativeQuantizer:
    return NativeQuantizer(NativeConfig(name="native", **config))


def ids() -> list[Tensor]:
    return [torch.randint(0, 30, (2, 9)) for _ in range(2)]


def saved(folder, **config):
    quantized = native(**config).quantize(Model(), ids())
    quantized.save(folder)
    return quantized


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_the_saved_one(name, dtype, tmp_path):
    quantizer, batches = native(**CONFIGS[name]), ids()
    quantized = quantizer.quantize(Model().to(dtype), batches)
    quantized.save(tmp_path)
    loaded = quantizer.load(Model().to(dtype), tmp_path)  # other float weights
    for batch in batches:
        assert torch.equal(loaded(batch), quantized(batch))
    assert loaded.plan.to_dict() == quantized.plan.to_dict()
    assert loaded.storage() == quantized.storage()
    for one, other in zip(loaded.encodings(), quantized.encodings(), strict=True):
        assert one.tensor == other.tensor
        for field in ("scale", "zero_point", "min", "max"):
            a, b = getattr(one, field), getattr(other, field)
            assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_storage_is_what_the_file_holds(name, tmp_path):
    quantized = saved(tmp_path, **CONFIGS[name])
    tensors = load_file(tmp_path / "model.safetensors")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert quantized.size_bytes() == stored
    assert (tmp_path / "model.safetensors").stat().st_size < stored + 3000


def test_each_tensor_takes_its_bits(tmp_path):
    sizes = saved(tmp_path, weight="int5/channel/asym/power_of_two", input="int8").storage()
    weight = 20 * 20 * 3 * 5 // 8
    assert sizes["conv.weight"] == weight + 20 * 1 + -(-20 * 5 // 8)
    assert sizes["conv.input"] == 4 + 1
    assert sizes["conv.bias"] == 20 * 4
    assert sizes["embed.weight"] == 30 * 20 * 5 // 8 + 30 + -(-30 * 5 // 8)
    assert "head.weight" not in sizes


def test_shared_weights_are_stored_once_and_shared_again(tmp_path):
    saved(tmp_path, weight="int4/group:8")
    description = json.loads((tmp_path / "quantized.json").read_text())
    assert description["aliases"] == {
        "head.packed.weight.codes": "embed.packed.weight.codes",
        "head.packed.weight.scale": "embed.packed.weight.scale",
    }
    loaded = native(weight="int4/group:8").load(Model(), tmp_path)
    assert loaded.module.head.weight is loaded.module.embed.weight
    assert loaded.module.head.packed["weight"] is loaded.module.embed.packed["weight"]


def test_loading_leaves_the_float_model_alone_and_can_switch_to_it(tmp_path):
    saved(tmp_path, weight="int4")
    model, batch = Model().eval(), ids()[0]
    loaded = native(weight="int4").load(model, tmp_path)
    assert type(model.conv) is nn.Conv1d
    loaded.set_enabled("embed", False)
    assert torch.equal(loaded.module.embed(batch), model.embed(batch))


def test_a_switched_off_layer_is_saved_quantized(tmp_path):
    quantized = native(weight="int4").quantize(Model())
    quantized.set_enabled("conv", False)
    quantized.save(tmp_path)
    quantized.set_enabled("conv", True)
    loaded = native(weight="int4").load(Model(), tmp_path)
    batch = ids()[0]
    assert torch.equal(loaded(batch), quantized(batch))


def test_saving_twice_writes_the_same_bytes(tmp_path):
    quantized = native(weight="int4").quantize(Model())
    for folder in ("one", "two"):
        quantized.save(tmp_path / folder)
    for name in ("model.safetensors", "quantized.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_extra_state_cannot_be_saved(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"count": 1}

    quantized = native(weight="int8").quantize(nn.Sequential(Stateful(4, 4)))
    with pytest.raises(ExportError, match=r"state '0\._extra_state': .*drop get_extra_state"):
        quantized.save(tmp_path)


REFUSED = {"weight": "int8", "input": "int8", "rules": [{"op": "embedding", "skip": True}]}


class TestRefusals:
    def load(self, model: nn.Module, folder) -> None:
        native(**REFUSED).load(model, folder)

    @pytest.mark.parametrize("name", ["model.safetensors", "quantized.json"])
    def test_a_missing_file(self, name, tmp_path):
        saved(tmp_path, **REFUSED)
        (tmp_path / name).unlink()
        with pytest.raises(QuantizationError, match=f"the saved model has no {name}"):
            self.load(Model(), tmp_path)

    @pytest.mark.parametrize("name", ["model.safetensors", "quantized.json"])
    def test_a_damaged_file(self, name, tmp_path):
        saved(tmp_path, **REFUSED)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
        with pytest.raises(QuantizationError, match="the saved model is damaged"):
            self.load(Model(), tmp_path)

    def test_another_schema(self, tmp_path):
        saved(tmp_path, **REFUSED)
        path = tmp_path / "quantized.json"
        path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
        with pytest.raises(QuantizationError, match=r"schema 9, and this version .* reads 1"):
            self.load(Model(), tmp_path)

    def test_a_missing_layer(self, tmp_path):
        saved(tmp_path, **REFUSED)
        model = Model()
        del model.conv
        with pytest.raises(QuantizationError, match="layer 'conv': the saved Conv1d is missing"):
            self.load(model, tmp_path)

    def test_another_kind_of_layer(self, tmp_path):
        saved(tmp_path, **REFUSED)
        model = Model()
        model.conv = nn.ReLU()
        with pytest.raises(QuantizationError, match="layer 'conv': the saved Conv1d is a ReLU"):
            self.load(model, tmp_path)

    def test_another_shape(self, tmp_path):
        saved(tmp_path, **REFUSED)
        model = Model()
        model.conv = nn.Conv1d(20, 20, 5)
        with pytest.raises(
            QuantizationError, match=r"saved weight is \[20, 20, 3\], the float model's \[20, 20, 5"
        ):
            self.load(model, tmp_path)

    def test_another_shape_of_a_float_tensor(self, tmp_path):
        saved(tmp_path, **REFUSED)
        model = Model()
        model.norm = nn.BatchNorm1d(21)
        with pytest.raises(QuantizationError, match=r"do not fit .*size mismatch for norm\.weight"):
            self.load(model, tmp_path)

    @pytest.mark.parametrize(
        ("gone", "message"),
        [
            ("conv.packed.weight.codes", "no codes for conv.weight"),
            ("conv.input_quantizer.scale", "no scale for conv.input"),
            ("norm.running_mean", "no norm.running_mean"),
        ],
    )
    def test_a_missing_tensor(self, gone, message, tmp_path):
        saved(tmp_path, **REFUSED)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        del tensors[gone]
        save_file(tensors, path)
        with pytest.raises(QuantizationError, match=message):
            self.load(Model(), tmp_path)

    def test_a_tensor_too_many(self, tmp_path):
        saved(tmp_path, **REFUSED)
        path = tmp_path / "model.safetensors"
        save_file({**load_file(path), "norm.other": torch.ones(1)}, path)
        with pytest.raises(QuantizationError, match=r"do not fit the float model .norm\.other"):
            self.load(Model(), tmp_path)
