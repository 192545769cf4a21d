"""From specs to Brevitas's quantizers: weights, inputs, biases."""

from quark_brevitas.quantizers.biases import bias_quantizer
from quark_brevitas.quantizers.inputs import input_quantizer
from quark_brevitas.quantizers.weights import weight_quantizer

__all__ = ["bias_quantizer", "input_quantizer", "weight_quantizer"]
