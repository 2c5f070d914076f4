"""How a price change is shown: what changes in words, what some quantities cost before and after, who decided."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.catalog.approvals import Proposal
from pipeline.catalog.diff import Change, Example, changes, examples
from pipeline.core.documents import Item, Kind
from pipeline.core.money import Amount, Micros, amount_decimal, plain, quantity_decimal
from pipeline.core.periods import format_instant, to_datetime, to_micros
from pipeline.core.plans import Plan


def difference_json(kind: Kind, before: Item | None, after: Item) -> dict[str, Any]:
    """One document's difference; amounts are exact, in whole units of its currency."""
    return {
        "kind": kind,
        "id": after.id,
        "version_before": None if before is None else before.version,
        "changes": [_change_json(change) for change in changes(before, after)],
        "examples": [_example_json(example) for example in _examples(before, after)],
    }


def show_difference(kind: Kind, before: Item | None, after: Item) -> Iterator[RenderableType]:
    """One document's difference: a line for each change, then what it means for some quantities."""
    found = changes(before, after)
    if before is None:
        head = "new"
    else:
        head = f"version {before.version} changes" if found else f"unchanged, version {before.version}"
    yield Text.assemble((f"{kind.replace('_', ' ')} {after.id}", "bold"), f": {head}")
    for change in found:
        yield Text(f"  {change.words}")
    if shown := _examples(before, after):
        yield _examples_table(shown, after.currency if isinstance(after, Plan) else "")


def proposal_json(proposal: Proposal) -> dict[str, Any]:
    """A proposal with everything that a second person looks at."""
    decision = proposal.decision
    return {
        "id": proposal.id,
        "state": state(proposal),
        "proposed_at": proposal.proposed_at,
        "proposed_by": proposal.proposed_by,
        "reason": proposal.reason,
        "valid_from": None if proposal.valid_from is None else _when(proposal.valid_from),
        "back_dated": proposal.back_dated,
        "documents": [
            {
                **difference_json(document.kind, document.before, document.after),
                "valid_from": None if document.valid_from_us is None else format_instant(document.valid_from_us),
            }
            for document in proposal.documents
        ],
        "decision": None
        if decision is None
        else {
            "verdict": decision.verdict,
            "decided_at": decision.decided_at,
            "decided_by": decision.decided_by,
            "reason": decision.reason,
        },
    }


def show_proposal(proposal: Proposal) -> Iterator[RenderableType]:
    """Who proposed what, why and from when, and what became of it."""
    yield Text.assemble(
        (f"Proposal {proposal.id}", "bold"),
        f" by {proposal.proposed_by} at {format_instant(to_micros(proposal.proposed_at))}: {proposal.reason}",
    )
    for document in proposal.documents:
        yield from show_difference(document.kind, document.before, document.after)
        begins = proposal.valid_from if proposal.valid_from is not None else document.valid_from_us
        if begins is None and document.before is not None:
            begins = timedelta(0)  # as soon as it may
        if begins is not None:
            yield Text(f"  counts from {_when(begins)}" + (", also where that is past" if proposal.back_dated else ""))
            if document.kind in _SPLITS_MONTHS and document.before is not None and _inside_a_month(begins):
                yield Text("  inside a month: tiers, their flat fees and included units count anew from then on")
    if (decision := proposal.decision) is not None:
        why = f": {decision.reason}" if decision.reason else ""
        at = format_instant(to_micros(decision.decided_at))
        yield Text(f"{decision.verdict.capitalize()} by {decision.decided_by} at {at}{why}", style="bold")


def state(proposal: Proposal) -> str:
    """``open``, ``approved`` or ``rejected``."""
    return "open" if proposal.decision is None else proposal.decision.verdict


def _when(begins: timedelta | Micros) -> str:
    if isinstance(begins, int):
        return format_instant(begins)
    return f"{max(int(begins.total_seconds()), 60)} seconds after approval"


#: Kinds whose versions begin a new part of the month.
_SPLITS_MONTHS = ("plan", "price_list")
#: How far from UTC's a month may begin: zones from UTC-12 to UTC+14.
_EARLIEST_ZONE, _LATEST_ZONE = timedelta(hours=14), timedelta(hours=12)


def _inside_a_month(begins: timedelta | Micros) -> bool:
    """Whether no account's month begins then, whatever its time zone. A time after approval is taken to be inside."""
    if isinstance(begins, timedelta):
        return True
    at = to_datetime(begins)
    first, last = at + _EARLIEST_ZONE, at - _LATEST_ZONE - timedelta(microseconds=1)
    return (first.year, first.month) == (last.year, last.month)


def _examples(before: Item | None, after: Item) -> Sequence[Example]:
    if not (isinstance(before, Plan) and isinstance(after, Plan)):
        return ()
    return examples(before.charges, after.charges)


def _examples_table(shown: Sequence[Example], currency: str) -> Table:
    table = Table("what it costs", title_justify="left")
    for column in ("quantity", f"{currency} before", f"{currency} after", "difference"):
        table.add_column(column, justify="right")
    last = ""
    for example in shown:
        name, last = ("" if example.charge == last else example.charge), example.charge
        quantity = f"{Decimal(plain(quantity_decimal(example.quantity))):,f}"
        table.add_row(name, quantity, _amount(example.before), _amount(example.after), _moved(example))
    return table


def _moved(example: Example) -> str:
    if example.before is None or example.after is None:
        return ""
    return f"{Decimal(plain(amount_decimal(example.after - example.before))):+,f}"


def _amount(amount: Amount | None) -> str:
    return "" if amount is None else f"{Decimal(plain(amount_decimal(amount))):,f}"


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "path": change.path,
        "before": change.before,
        "after": change.after,
        "percent": None if change.percent is None else plain(change.percent),
        "words": change.words,
    }


def _example_json(example: Example) -> dict[str, Any]:
    return {
        "charge": example.charge,
        "quantity": plain(quantity_decimal(example.quantity)),
        "before": None if example.before is None else plain(amount_decimal(example.before)),
        "after": None if example.after is None else plain(amount_decimal(example.after)),
    }
