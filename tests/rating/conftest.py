"""Every test of the rater's pure part runs both ways: through the compiled fast path, and in Python alone."""

from collections.abc import Iterator

import pytest

from pipeline.rating import compiled
from tests.rating.world import without_fastpath


@pytest.fixture(scope="module", autouse=True, params=["compiled", "python"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            without_fastpath(patch)
        elif compiled.fastpath is None:
            pytest.skip("installed without a C compiler")
        yield
