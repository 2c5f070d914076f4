"""Where the schemas and the demo's files are: beside the package in a checkout, inside it once installed."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_CHECKOUT = _PACKAGE.parent
_SHIPPED = _PACKAGE / "_shipped"


def schemas_dir() -> Path:
    """The folder that holds ``avro/`` and ``postgres/``."""
    return _SHIPPED / "schemas" if _SHIPPED.is_dir() else _CHECKOUT / "schemas"


def demo_dir() -> Path:
    """The folder of the demo's price file, accounts and usage."""
    return _SHIPPED / "demo" if _SHIPPED.is_dir() else _CHECKOUT / "deploy" / "demo"
