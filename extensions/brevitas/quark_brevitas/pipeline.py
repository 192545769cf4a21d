"""The order of Brevitas's passes, with the reason for each place, and how each is carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from quark_brevitas import fusing, preparation, recurrent, unchanged
from quark_brevitas.attention import OP
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.formats import is_static
from quark_brevitas.model import Prepared
from quark_brevitas.options import LearnedRound, accumulator_of
from quark_brevitas.wrappers import path_of, put_factor
from quark_core.plan import PlanEntry

Run = Callable[[Prepared], Iterator[str]]
_FOLDED = "; norms and layers before take over the factors"


@dataclass(frozen=True)
class Stage:
    """One stage of the work.

    Attributes:
        name: As `quark plan` shows it.
        reason: Why it is done, and why at this place.
        run: Brackets its passes over the data; None for a stage without data, which
            :meth:`BrevitasQuantizer.prepare` does.
        before: Whether it works on the float model, before layers are replaced.
        rewrites: Whether it replaces layers.
    """

    name: str
    reason: str
    run: Run | None = None
    before: bool = False
    rewrites: bool = False


def stages(config: BrevitasConfig, entries: tuple[PlanEntry, ...], traced: str) -> list[Stage]:
    """What will be done, in order.

    Args:
        config: The configuration.
        entries: The planned layers.
        traced: What needs a traced graph, or an empty string if nothing is traced.
    """
    rewriting = Stage(
        f"{config.backend} rewriting", "float layers become Brevitas's", rewrites=True
    )
    return [
        *_on_float_layers(config, entries, traced),
        rewriting,
        *_on_quantized_layers(config, entries),
    ]


def _on_float_layers(
    config: BrevitasConfig, entries: tuple[PlanEntry, ...], traced: str
) -> list[Stage]:
    found = []
    if traced:
        found.append(Stage("preprocess", f"{traced}: done on the float weights, first"))
    if config.merge_layernorm:
        reason = "norms stop weighing channels, which rotations and LayerNorm's mean ask for"
        found.append(Stage("merge layernorm", reason))
    if config.layernorm_to_rmsnorm:
        reason = "without weight and bias only the mean is left, and the layers before lose theirs"
        found.append(Stage("layernorm to rmsnorm", reason))
    if config.rotation is not None:
        reason = {
            "layerwise": "before each layer at run time, before scales are taken from weights",
            "fx": "along the traced graph, before scales are taken; norms are merged by now",
            "fused": "along the residual stream, before scales are taken; norms are merged by now",
        }[config.rotation.mode]
        found.append(Stage("rotation", reason))
    if any(entry.op == OP for entry in entries):
        reason = "calls of attention become modules, in which quantizers find a place"
        found.append(Stage("attention", reason))
    if config.activation_equalization is not None:
        reason = "moves the size of inputs into weights before scales are taken from either"
        reason += _FOLDED if config.activation_equalization.mode == "fused" else ""
        found.append(Stage("activation equalization", reason, _equalize(config), before=True))
    if config.awq is not None:
        reason = "scales up the columns of weights whose rounding costs most, before scales"
        reason += _FOLDED if config.awq.mode == "fused" else ""
        found.append(Stage("awq", reason, _awq(config), before=True))
    if config.magr is not None:
        reason = "shrinks large weights before their scales are taken"
        found.append(Stage("magr", reason, _magr(config), before=True))
    if config.low_rank is not None:
        reason = "takes the largest directions out of weights, before scales are taken of the rest"
        found.append(Stage("low rank", reason))
    return found


def _on_quantized_layers(config: BrevitasConfig, entries: tuple[PlanEntry, ...]) -> list[Stage]:
    found = []
    static = [entry for entry in entries if is_static(entry.input)]
    if any(entry.op == OP or not config.unscaled_inputs for entry in static):
        reason = "input ranges, with quantization switched off"
        found.append(Stage("calibrate", reason, _calibrate))
    if config.algorithm is not None:
        reason = "chooses codes of weights on scales that are known by now"
        if (register := accumulator_of(config.algorithm)) is not None:
            reason += f", within accumulators of {register.bits} bits"
        found.append(Stage(config.algorithm.name, reason, _algorithm(config)))
    if config.calibrate_bn:
        reason = "statistics of the quantized layers before, whose weights are final"
        found.append(Stage("calibrate BatchNorm", reason, _batch_norm))
    if config.bias_correction:
        reason = "last, as it makes up for what all others did to mean outputs"
        found.append(Stage("bias correction", reason, _bias_correction))
    return found


def _equalize(config: BrevitasConfig) -> Run:
    def run(prepared: Prepared) -> Iterator[str]:
        from quark_brevitas.algorithms.stock import StockEqualization

        options = config.activation_equalization
        assert options is not None
        if options.mode == "fused":
            yield from _smooth(prepared, options.alpha)
            return
        paths = [path_of(prepared.module, entry.name) for entry in prepared.plan.quantized]
        work = StockEqualization(prepared.module, paths, options)
        with _feeding(prepared, work), preparation.quiet():
            yield from work.passes()

    return run


def _smooth(prepared: Prepared, alpha: float) -> Iterator[str]:
    from quark_brevitas.algorithms.smoothing import Smoothing

    layers = _linear(prepared)
    work = Smoothing(prepared.module, prepared.regions, layers, alpha, prepared.partial)
    with _folding(prepared, "activation_equalization.mode"), _feeding(prepared, work):
        yield from work.passes()
    prepared.notes.append(_folded("activation equalization", layers, prepared, "are not equalized"))


def _awq(config: BrevitasConfig) -> Run:
    def run(prepared: Prepared) -> Iterator[str]:
        from quark_brevitas.algorithms.awq import Scaling

        assert config.awq is not None
        plan, model, layers = prepared.plan, prepared.module, _linear(prepared)
        fused = config.awq.mode == "fused"
        inside = {name for region in prepared.regions for name in region.sinks}
        rest = [fusing.alone(name, layers[name]) for name in layers if name not in inside]
        work = Scaling(
            model,
            layers,
            [*prepared.regions, *rest],
            lambda name, weight: preparation.rounded(weight, plan[name], config),
            lambda name, factor: put_factor(model, name, factor),
            config.awq,
            prepared.partial,
        )
        with ExitStack() as stack:
            if fused:
                stack.enter_context(_folding(prepared, "awq.mode"))
            stack.enter_context(_feeding(prepared, work))
            stack.enter_context(preparation.quiet())
            yield from work.passes()
        if fused:
            prepared.notes.append(_folded("awq", layers, prepared, "are divided for at run time"))

    return run


def _linear(prepared: Prepared) -> dict[str, Any]:
    """The Linear layers that will be quantized, behind what was put before them."""
    names = [entry.name for entry in prepared.plan.quantized if entry.op == "linear"]
    return {name: prepared.layer(name) for name in names}


@contextmanager
def _folding(prepared: Prepared, where: str) -> Iterator[None]:
    """Check that what is done within leaves the float model's outputs as they are."""
    before = unchanged.output_of(prepared.module, prepared.example)
    yield
    after = unchanged.output_of(prepared.module, prepared.example)
    fix = f"Write {where}: layerwise"
    prepared.notes += unchanged.compared(before, after, "folding factors", where=where, fix=fix)


def _folded(name: str, layers: Mapping[str, Any], prepared: Prepared, else_: str) -> str:
    """A sentence about the layers whose factors are gone at run time."""
    inside = {name for region in prepared.regions for name in region.sinks}
    left = [name for name in layers if name not in inside]
    said = f"{name}: factors of {len(layers) - len(left)} of {len(layers)} Linear layers are folded"
    shown = ", ".join(left[:5]) + ("..." if len(left) > 5 else "")
    return f"{said}; {len(left)} {else_}: {shown}" if left else said


def _magr(config: BrevitasConfig) -> Run:
    def run(prepared: Prepared) -> Iterator[str]:
        from quark_brevitas.algorithms.magr import Shrinking

        assert config.magr is not None
        shrinking = Shrinking(prepared.module, prepared.rounded(), config.magr, prepared.partial)
        with _feeding(prepared, shrinking):
            yield from shrinking.passes()

    return run


def _calibrate(prepared: Prepared) -> Iterator[str]:
    from brevitas.graph.calibrate import calibration_mode

    unseen = {entry.name for entry in prepared.plan.quantized if is_static(entry.input)}
    model = prepared.module
    with calibration_mode(model), recurrent.observed_whole(model), ExitStack() as hooks:
        for entry in prepared.plan.quantized:
            layer = prepared.layer(entry.name)
            if is_static(entry.input):
                seen = partial(_seen, unseen, entry.name)
                hooks.callback(layer.register_forward_pre_hook(seen).remove)
            elif entry.input is not None and entry.op != OP:
                # Dynamic inputs have nothing to observe, and groups that do not fill their axis
                # come out of an observer with the padding still on.
                layer.input_quant.disable_quant = True
        yield "calibrate"
    if unseen:
        names = ", ".join(sorted(unseen)[:5]) + ("..." if len(unseen) > 5 else "")
        prepared.notes.append(
            f"calibration never called {len(unseen)} layer(s), whose input scales are arbitrary: "
            f"{names}"
        )


def _seen(unseen: set[str], name: str, _layer: Any, inputs: tuple[Any, ...]) -> None:
    from quark_brevitas.algorithms.columns import plain, require_finite

    unseen.discard(name)
    for given in inputs[:1]:  # none where it is called by keyword, as attention may be
        require_finite(name, plain(given))


def _algorithm(config: BrevitasConfig) -> Run:
    def run(prepared: Prepared) -> Iterator[str]:
        from quark_brevitas.algorithms.learned_block import BlockLearning
        from quark_brevitas.algorithms.learned_round import Learning
        from quark_brevitas.algorithms.rounding import Rounding
        from quark_brevitas.algorithms.stock import Stock

        options, layers = config.algorithm, prepared.rounded()
        assert options is not None
        assert prepared.example is not None
        entries = {name: prepared.plan[name] for name in layers}
        work: Any
        if isinstance(options, LearnedRound) and options.blocks is not None:
            work = BlockLearning(
                prepared.module, layers, entries, options, config.seed, prepared.partial
            )
        elif isinstance(options, LearnedRound):
            work = Learning(
                prepared.module,
                layers,
                entries,
                options,
                prepared.example,
                config.seed,
                prepared.partial,
            )
        elif options.engine == "brevitas":
            prepared.initialize()
            # Brevitas would keep them too, but as part of the saved state.
            preparation.keep_float_weights(layers)
            work = Stock(prepared.module, options)
        else:
            work = Rounding(
                prepared.module, layers, entries, options, prepared.example, prepared.partial
            )
        with _feeding(prepared, work), preparation.quiet():
            yield from work.passes()
        prepared.notes += getattr(work, "notes", [])

    return run


def _batch_norm(prepared: Prepared) -> Iterator[str]:
    """Brevitas's own mode leaves BatchNorm in train mode, and halves the change of variances."""
    from torch.nn.modules.batchnorm import _BatchNorm

    found = [module for module in prepared.module.modules() if isinstance(module, _BatchNorm)]
    norms = [(module, module.momentum, module.state_dict()) for module in found]
    try:
        for module, _, state in norms:
            state.update({name: tensor.clone() for name, tensor in state.items()})
            module.reset_running_stats()
            module.momentum = None  # the average over all batches
            module.train(module.track_running_stats)
        yield "calibrate BatchNorm"
    finally:
        for module, momentum, state in norms:
            module.momentum = momentum
            module.eval()
            if not module.num_batches_tracked:
                module.load_state_dict(state)  # no batch came through


def _bias_correction(prepared: Prepared) -> Iterator[str]:
    from brevitas.graph.calibrate import bias_correction_mode

    from quark_brevitas.algorithms.columns import input_of

    # Brevitas's own hooks would fail on a layer that is called by keyword without naming it.
    def look(name: str, _layer: Any, args: tuple[Any, ...]) -> None:
        input_of(name, args)

    with ExitStack() as stack:
        for entry in prepared.plan.quantized:
            if entry.op != OP:
                layer = prepared.layer(entry.name)
                handle = layer.register_forward_pre_hook(partial(look, entry.name))
                stack.callback(handle.remove)
        stack.enter_context(bias_correction_mode(prepared.module))
        yield "bias correction"


@contextmanager
def _feeding(prepared: Prepared, work: Any) -> Iterator[None]:
    """Batches go to an algorithm for a while, instead of through the whole model."""
    prepared.feed = work.feed
    try:
        yield
    finally:
        prepared.feed = None
