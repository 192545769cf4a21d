"""Backends whose quantizer takes one configuration: one instance a rule."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

from torchao.quantization.pt2e.quantizer import Quantizer

from quark_core.spec import LayerRule
from quark_pt2e.config.base import Pt2eConfig
from quark_pt2e.graph.grouping import Grouped
from quark_pt2e.graph.naming import Namer
from quark_pt2e.quantizer import Pt2eQuantizer

ConfigT = TypeVar("ConfigT", bound=Pt2eConfig)


class GroupedBackend(Pt2eQuantizer[ConfigT]):
    """A backend says in :meth:`one` which quantizer a rule means."""

    @abstractmethod
    def one(self, rule: LayerRule | None) -> Quantizer | None:
        """The quantizer for a rule, or for what no rule matches; None leaves it float."""

    def build(self, namer: Namer) -> Quantizer:
        """The quantizer itself where there are no rules, so that nothing differs from its own."""
        common = self.one(None)
        if not self.config.rules and common is not None:
            return common
        parts = [(index, self.one(rule)) for index, rule in enumerate(self.config.rules)]
        return Grouped(namer, self.config, [(None, common), *parts])
