"""Worked examples: real models, their data and the recipes that quantize them."""
