"""Models and data by name: the host's own sources; plugins bring more."""
