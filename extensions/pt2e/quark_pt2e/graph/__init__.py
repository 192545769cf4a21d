"""Exported graphs: capturing them, naming their nodes, reading what was decided about them."""
