"""Invoice stories have a database of their own, as the tests of ``tests/billing`` do."""

from tests.billing.conftest import database

__all__ = ["database"]
