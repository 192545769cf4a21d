"""One quantizer a rule, each confined to the nodes its rule decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import fx
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from quark_core.config import QuantizationConfig
from quark_core.errors import QuantizationError
from quark_core.selection import select
from quark_pt2e.graph.naming import Namer


class Fence(QuantizationAnnotation):  # type: ignore[misc]
    """Stands on a node that the quantizer at work shall leave alone."""

    # torchao's Inductor quantizers ask every annotation for it.
    _is_output_of_quantized_pattern: ClassVar[bool] = False


class Grouped(Quantizer):  # type: ignore[misc]
    """Lets the last rule that matches a node decide, whatever the quantizers' own precedence.

    Args:
        namer: Names nodes for the rules.
        config: Holds the rules.
        parts: The quantizer for each rule, by its index, and for what no rule matches (None);
            None leaves the nodes in float.
    """

    def __init__(
        self,
        namer: Namer,
        config: QuantizationConfig,
        parts: Sequence[tuple[int | None, Quantizer | None]],
    ) -> None:
        super().__init__()
        self._namer, self._config, self._parts = namer, config, parts

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Let each kind of quantizer rewrite the graph once."""
        seen: set[type] = set()
        for _, quantizer in self._parts:
            if quantizer is not None and type(quantizer) not in seen:
                seen.add(type(quantizer))
                model = quantizer.transform_for_annotation(model)
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Let each quantizer annotate its own nodes."""
        sites = self._namer.sites(model)
        decisions = select([site.target for site in sites], self._config).decisions
        rules = {site.node: decisions[site.target.name].rule for site in sites}
        for index, quantizer in self._parts:
            if quantizer is not None:
                _confined(model, quantizer, {n for n, rule in rules.items() if rule == index})
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Let each quantizer look at the result."""
        for _, quantizer in self._parts:
            if quantizer is not None:
                quantizer.validate(model)


class InOrder(Quantizer):  # type: ignore[misc]
    """Several quantizers one after the other; none may touch what an earlier one annotated."""

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        super().__init__()
        self._quantizers = list(quantizers)

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Let each rewrite the graph."""
        for quantizer in self._quantizers:
            model = quantizer.transform_for_annotation(model)
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Let each annotate.

        Raises:
            QuantizationError: Two of them claim one node.
        """
        owners: dict[fx.Node, tuple[Any, str]] = {}
        for quantizer in self._quantizers:
            quantizer.annotate(model)
            name = type(quantizer).__name__
            for node in model.graph.nodes:
                found = node.meta.get(Q_ANNOTATION_KEY)
                if node in owners and found is not owners[node][0]:
                    raise QuantizationError(
                        f"{name} overwrites what {owners[node][1]} decided",
                        where=f"node {node.name!r}",
                        fix="Change the order of quantizer.quantizers, or leave one out",
                    )
                if found is not None and node not in owners:
                    owners[node] = (found, name)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Let each look at the result."""
        for quantizer in self._quantizers:
            quantizer.validate(model)


def _confined(model: fx.GraphModule, quantizer: Quantizer, own: set[fx.Node]) -> None:
    """Run a quantizer with fences on all nodes but its own; foreign nodes end as they were."""
    foreign = [node for node in model.graph.nodes if node not in own and node.op != "get_attr"]
    before = {node: node.meta.get(Q_ANNOTATION_KEY) for node in foreign}
    for node in foreign:
        node.meta[Q_ANNOTATION_KEY] = Fence(_annotated=True)
    quantizer.annotate(model)
    for node, found in before.items():
        if found is None:
            del node.meta[Q_ANNOTATION_KEY]
        else:
            node.meta[Q_ANNOTATION_KEY] = found
