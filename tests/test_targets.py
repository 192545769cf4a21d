"""From a module tree to what rules select."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quark_core.batch import Batch
from quark_core.selection import matches
from quark_core.spec import Selector
from quark_core.targets import io_roles, module_targets, type_names

OPS: dict[type, str] = {nn.Linear: "linear", nn.Conv2d: "conv2d"}


class Special(nn.Linear):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
        self.left = nn.Linear(8, 4)
        self.right = Special(8, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor, features: Tensor) -> dict[str, Tensor]:
        pooled = self.stem(images).mean((2, 3))
        mixed = self.left(features.flatten(1)) + self.right(features.view(-1, 8) * 2)
        return {"logits": self.head(mixed).reshape(2, -1), "pooled": pooled}


def example() -> Batch:
    return Batch((torch.randn(3, 1, 5, 5), torch.randn(3, 2, 4)))


def roles(model: nn.Module, batch: Batch) -> dict[str, tuple[str, ...]]:
    names = [target.name for target, _ in module_targets(model, OPS)]
    with torch.no_grad():
        return io_roles(model, names, batch)


def test_known_layers_are_listed_in_order_with_their_operation():
    model = Net()
    found = [(target.name, target.op) for target, _ in module_targets(model, OPS)]
    assert found == [
        ("stem.0", "conv2d"),
        ("left", "linear"),
        ("right", "linear"),
        ("head", "linear"),
    ]
    assert all(model.get_submodule(t.name) is module for t, module in module_targets(model, OPS))


def test_the_nearest_class_names_the_operation():
    (_, _, (target, _), _) = module_targets(Net(), {**OPS, Special: "special"})
    assert (target.name, target.op) == ("right", "special")


def test_a_layer_under_two_names_is_listed_once():
    shared = nn.Linear(2, 2)
    assert [t.name for t, _ in module_targets(nn.Sequential(shared, shared), OPS)] == ["0"]


def test_a_model_can_be_the_layer_itself():
    ((target, module),) = module_targets(nn.Linear(2, 2), OPS)
    assert (target.name, target.scopes) == ("", ())
    assert isinstance(module, nn.Linear)


@pytest.mark.parametrize(
    "name", ["Linear", "torch.nn.Linear", "torch.nn.modules.linear.Linear", "Special", "Module"]
)
def test_classes_go_by_bare_defining_and_public_names(name):
    assert name in type_names(Special)
    assert ("Special" in name) == (name not in type_names(nn.Linear))


def test_object_is_no_type_to_select():
    assert "object" not in type_names(Special)


def test_scopes_are_the_modules_around_a_layer():
    target = module_targets(Net(), OPS)[0][0]
    assert [name for name, _ in target.scopes] == ["", "stem"]
    assert matches(Selector(type="Net"), target)
    assert matches(Selector(type="torch.nn.Sequential"), target)
    assert matches(Selector(name="stem"), target)
    assert not matches(Selector(name="head"), target)


def test_views_of_the_input_count_as_the_input_but_results_do_not():
    found = roles(Net(), example())
    assert found["stem.0"] == ("input",)
    assert found["left"] == ("input",)
    assert found["right"] == ()


def test_views_of_a_result_in_a_nested_output_count():
    assert roles(Net(), example())["head"] == ("output",)


def test_what_is_changed_in_place_is_no_longer_the_layers_output():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    assert roles(model, Batch((torch.randn(2, 4),))) == {"0": ("input",)}


def test_one_layer_can_be_both_ends():
    assert roles(nn.Linear(4, 4), Batch((torch.randn(2, 4),))) == {"": ("input", "output")}


def test_keyword_inputs_count():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x) * 2

    assert roles(Keyword(), Batch((), {"x": torch.randn(2, 4)})) == {"fc": ("input",)}


def test_only_the_first_sample_runs_in_the_models_dtype_and_no_hook_stays():
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    roles(model, Batch((torch.randn(5, 4),)))
    assert [tuple(x.shape) for x in seen] == [(1, 4)]
    assert seen[0].dtype == torch.bfloat16
    assert not model[0]._forward_hooks


def test_hooks_are_removed_when_the_model_fails():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        roles(model, Batch((torch.randn(5, 3),)))
    assert not model[0]._forward_hooks
