"""Figures of merit by name: the host's own; plugins bring more.

A metric sees each batch once and keeps sums in float64, so its memory does not grow with the data.
"""
