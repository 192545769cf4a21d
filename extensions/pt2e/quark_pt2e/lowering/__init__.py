"""Writing quantized graphs for their targets, and proving what was written."""
