from collections.abc import Collection

from pipeline.billing.rated import Head, Row, Terms

class PlainRows:
    def __init__(
        self,
        head_type: type[Head],
        row_type: type[Row],
        kinds: tuple[str, ...],
        frames: Collection[bytes],
        terms: dict[str, dict[bytes, Terms]],
        limits: tuple[int, int, int],
    ) -> None: ...
    def met(self, head: Head, data: bytes, size: int) -> None: ...
    def read(self, data: bytes) -> Row | None: ...

def text_of_event(head: Head) -> str | None: ...
