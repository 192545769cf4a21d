"""Which elements share a scale, as shapes."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Layout

SHAPE = (3, 10, 5)
CASES = [
    (Layout(), ()),
    (Layout("channel", 1), (10,)),
    (Layout("channel", -1), (5,)),
    (Layout("token"), (3, 10)),
    (Layout("group", 1, 4), (3, 3, 5)),
    (Layout("group", -2, 5), (3, 2, 5)),
    (Layout("group", 0, 100), (1, 10, 5)),
]


@pytest.mark.parametrize(("layout", "compact"), CASES)
def test_compact_and_spread_shapes(layout, compact):
    x = torch.randn(SHAPE)
    low, high = layout.extremes(x)
    assert low.shape == high.shape == layout.largest(x).shape == compact
    blocks = layout.split(x)
    assert (layout.spread(high, x.ndim).expand_as(blocks) >= blocks).all()
    assert torch.equal(layout.join(blocks, SHAPE), x)


@pytest.mark.parametrize(("layout", "compact"), CASES)
def test_extremes_are_those_of_the_elements_that_share(layout, compact):
    x = torch.randn(SHAPE) + 3
    owner = torch.arange(torch.Size(compact).numel()).reshape(compact)
    owners = layout.join(layout.spread(owner, 3).expand_as(layout.split(x)).contiguous(), SHAPE)
    low, high = layout.extremes(x)
    for index in range(owner.numel()):
        mine = x[owners == index]
        assert high.flatten()[index] == mine.max()
        padded = layout.kind == "group" and mine.numel() < layout.size
        assert low.flatten()[index] == (0.0 if padded else mine.min())


def test_a_vector_of_channels_has_one_element_a_scale():
    x = torch.tensor([1.0, -2.0, 3.0])
    low, high = Layout("channel", 0).extremes(x)
    assert torch.equal(low, x)
    assert torch.equal(high, x)
    assert torch.equal(Layout("channel", 0).largest(x), x.abs())
