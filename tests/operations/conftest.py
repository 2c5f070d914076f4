from collections.abc import Iterator
from contextlib import closing

import pytest

from pipeline.infra.settings import Settings
from tests.operations.world import World


@pytest.fixture
def world(settings: Settings) -> Iterator[World]:
    """A deployment with a catalog and no workers yet."""
    with closing(World(settings)) as made:
        yield made
