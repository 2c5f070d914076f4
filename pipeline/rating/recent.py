"""Rows of identity and payload that are not in a segment yet, or not committed yet."""

from itertools import chain
from typing import Protocol

from pipeline.infra.wire import IDENTITY_BYTES, PAYLOAD_BYTES
from pipeline.rating import compiled

_ENTRY_BYTES = IDENTITY_BYTES + PAYLOAD_BYTES


class Recent(Protocol):
    """Payload by identity."""

    def __len__(self) -> int: ...
    def add(self, entries: bytes) -> None:
        """Put in entries, identity and payload each, one behind the other; of one identity the last counts."""

    def find(self, identities: bytes) -> list[bytes | None] | None:
        """The payload of each of the identities, which stand one behind the other; None where none of them is here."""

    def entries(self) -> bytes:
        """All that is here, as ``add`` takes it."""


def new_recent() -> Recent:
    """An empty one."""
    if compiled.fastpath is not None:
        made: Recent = compiled.fastpath.Recent()
        return made
    return _Recent()


class _Recent:
    def __init__(self) -> None:
        self._payloads: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._payloads)

    def add(self, entries: bytes) -> None:
        for at in range(0, len(entries), _ENTRY_BYTES):
            self._payloads[entries[at : at + IDENTITY_BYTES]] = entries[at + IDENTITY_BYTES : at + _ENTRY_BYTES]

    def find(self, identities: bytes) -> list[bytes | None] | None:
        found = list(map(self._payloads.get, each_identity(identities)))
        return found if any(found) else None

    def entries(self) -> bytes:
        return b"".join(chain.from_iterable(self._payloads.items()))


def each_identity(identities: bytes) -> list[bytes]:
    """Identities that stand one behind the other."""
    return [identities[at : at + IDENTITY_BYTES] for at in range(0, len(identities), IDENTITY_BYTES)]
