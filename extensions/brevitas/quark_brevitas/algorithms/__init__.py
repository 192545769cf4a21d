"""Algorithms that choose the codes of weights from data, over Brevitas's quantizers."""
