"""Configurations of the PT2E backends; importing them imports no torch."""
