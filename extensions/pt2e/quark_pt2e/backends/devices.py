"""Arm's descriptions of the devices that a configuration means."""

from __future__ import annotations

from typing import Any

from executorch.backends.arm.common.pipeline_config import (
    ArmPassPipelineConfig,
    LeakyReLULoweringConfig,
    QuantizeInfConfig,
    SoftmaxDecompositionConfig,
)
from executorch.backends.arm.ethosu import EthosUCompileSpec
from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec
from executorch.backends.arm.vgf import VgfCompileSpec

from quark_core.errors import QuantizationError
from quark_pt2e.config.arm import ArmConfig, EthosUConfig, TosaConfig, VgfConfig


def compile_spec(config: ArmConfig) -> Any:
    """The device of a configuration, with its pass options.

    Raises:
        QuantizationError: There is no such TOSA profile.
    """
    if isinstance(config, EthosUConfig):
        return with_passes(ethosu_spec(config), config)
    if isinstance(config, TosaConfig):
        return with_passes(tosa_spec(config.profile), config)
    assert isinstance(config, VgfConfig)
    return with_passes(VgfCompileSpec(), config)


def ethosu_spec(config: EthosUConfig, target: str | None = None) -> EthosUCompileSpec:
    """Arm's description of an NPU; ``target`` overrides the configuration's."""
    other = target not in (None, config.target)
    return EthosUCompileSpec(
        target or config.target,
        system_config=None if other else config.system_config,
        memory_mode=None if other else config.memory_mode,
        extra_flags=list(config.vela_flags),
    )


def tosa_spec(profile: str) -> TosaCompileSpec:
    """Arm's description of a TOSA profile.

    Raises:
        QuantizationError: There is no such profile.
    """
    try:
        return TosaCompileSpec(profile)
    except ValueError as error:
        raise QuantizationError(
            f"no TOSA profile is called {profile!r}",
            where="quantizer.profile",
            cause=str(error),
            fix="Write TOSA-1.0+INT, with +int16, +int4 and so on behind it",
        ) from error


def with_passes(spec: Any, config: ArmConfig) -> Any:
    """Put the configured pass options into a compile spec."""
    options = config.passes
    if not options.model_fields_set:
        return spec
    passes = ArmPassPipelineConfig()
    if options.softmax is not None:
        passes.softmax = SoftmaxDecompositionConfig[options.softmax.upper()]
    if options.leaky_relu is not None:
        passes.leaky_relu = LeakyReLULoweringConfig[options.leaky_relu.upper()]
    if options.quantize_inf is not None:
        passes.quantize_inf = QuantizeInfConfig(*options.quantize_inf)
    spec.set_pass_pipeline_config(passes)
    return spec
