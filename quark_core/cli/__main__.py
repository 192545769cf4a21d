"""``python -m quark_core.cli``: the command line without an installed script."""

from quark_core.cli import main

main()
