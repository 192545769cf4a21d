"""Profiles: the numerics of other libraries, bit for bit, where they differ from ours.

``ocp`` is the default: the specifications' arithmetic, exact.
"""

from __future__ import annotations

from quark_core.errors import UnknownNameError
from quark_core.spec import TensorSpec
from quark_native.formats.base import Format
from quark_native.formats.layout import Layout


def profiled(spec: TensorSpec, layout: Layout, profile: str) -> Format:
    """The format of a resolved spec with another library's numerics.

    Raises:
        UnknownNameError: There is no such profile.
    """
    raise UnknownNameError(f"unknown profile {profile!r}", fix="Write ocp")
