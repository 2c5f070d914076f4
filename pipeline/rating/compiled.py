"""The stages' compiled fast path, where there is one. The stages ask here, and go the Python way where it is None."""

from typing import Any

#: ``pipeline.rating.fastpath``; its types stand in ``fastpath.pyi``.
fastpath: Any
try:
    from pipeline.rating import fastpath
except ImportError:  # installed without a C compiler: slower, the same in all else
    fastpath = None
