"""What was agreed, as of one point of the catalog topic: which terms hold for an event of an account at its time.

Of accounts and contracts the newest version counts. Of meters and plans the version with the greatest ``valid_from``
not after the event counts; of two with the same, the newer. Contracts of an account are published without overlap;
should two cover the same time, the lower id counts.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from pipeline.core.charges import Charge
from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import Entry, from_document
from pipeline.core.meters import Meter
from pipeline.core.money import Micros
from pipeline.core.periods import Period, format_instant, month_of
from pipeline.core.plans import Plan
from pipeline.core.reasons import Reason, Rejection, Stage

__all__ = ["EARLY_US", "NOTICE_S", "STALE_S", "Catalog", "Entry", "Segment", "Terms"]


@dataclass(frozen=True, slots=True)
class Segment:
    """The longest part of a billing period with one contract, plan and price version: ``[start_us, end_us)``."""

    account: str
    contract: Contract
    plan: Plan
    period: Period
    start_us: Micros
    end_us: Micros


@dataclass(frozen=True, slots=True)
class Terms:
    """How to price events of one account and type whose time lies in ``[start_us, end_us)``: a part of the segment."""

    segment: Segment
    priced: tuple[tuple[Charge, Meter], ...]
    start_us: Micros
    end_us: Micros


#: A version's ``valid_from`` lies at least this long after its publication (law 4), seconds.
NOTICE_S = 60
#: A rater whose catalog may be older than this waits, seconds.
STALE_S = 30
#: So an event up to this far ahead of the present has its price: a later publication counts only from after it.
EARLY_US: Micros = (NOTICE_S - STALE_S) * 1_000_000

#: After every instant.
_NEVER: Micros = 2**63 - 1

V = TypeVar("V", Meter, Plan)


@dataclass(frozen=True, slots=True)
class _Timeline(Generic[V]):
    """The versions of one document in the order they count."""

    starts: tuple[Micros, ...]
    versions: tuple[V, ...]

    def at(self, at_us: Micros) -> tuple[V, Micros, Micros] | None:
        """The version that counts at a time, from when and until when."""
        index = bisect_right(self.starts, at_us) - 1
        return None if index < 0 else (self.versions[index], self.starts[index], self.next_start(at_us))

    def next_start(self, at_us: Micros) -> Micros:
        """When the first version after a time begins to count."""
        index = bisect_right(self.starts, at_us)
        return self.starts[index] if index < len(self.starts) else _NEVER


@dataclass(frozen=True, slots=True, eq=False)
class Catalog:
    """An immutable snapshot of all entries below an offset of the catalog topic, made by ``extend`` from ``empty``."""

    #: Next offset of the catalog topic: everything before it is in the snapshot.
    offset: int
    accounts: Mapping[str, Account]
    contracts: Mapping[str, Contract]
    _contracts_of: Mapping[str, tuple[Contract, ...]]  # an account's contracts, in order of their ids
    _meters: Mapping[str, _Timeline[Meter]]
    _plans: Mapping[str, _Timeline[Plan]]

    @classmethod
    def empty(cls) -> Self:
        return cls(0, {}, {}, {}, {}, {})

    def extend(self, entries: Iterable[Entry], offset: int) -> Self:
        """A new snapshot with more entries, read up to ``offset``. An entry that is there already changes nothing.

        Raises ValueError for an entry this program cannot read; the snapshot at hand stays as it is.
        """
        accounts, contracts = dict(self.accounts), dict(self.contracts)
        meters, plans = dict(self._meters), dict(self._plans)
        regroup: set[str] = set()
        for entry in entries:
            match from_document(entry):
                case Account() as account:
                    _keep_newest(accounts, account)
                case Contract() as contract:
                    regroup |= {contract.account, contracts.get(contract.id, contract).account}
                    _keep_newest(contracts, contract)
                case Meter() as meter:
                    meters[meter.id] = _with_version(meters.get(meter.id), meter)
                case Plan() as plan:
                    plans[plan.id] = _with_version(plans.get(plan.id), plan)
        contracts_of = {**self._contracts_of, **dict.fromkeys(regroup, ())}
        for contract in sorted((c for c in contracts.values() if c.account in regroup), key=lambda c: c.id):
            contracts_of[contract.account] += (contract,)
        return type(self)(offset, accounts, contracts, contracts_of, meters, plans)

    def terms(self, account: str, event_type: str, at_us: Micros) -> Terms | Rejection:
        """The terms for an event of this account and type at this time, and for how long around it they hold.

        Rejections, all of stage ``enrich``: unknown_account, no_contract (none covers the time and none ended before),
        contract_ended, no_price (the plan or one of its meters is not known, or no version of the plan counts yet),
        no_charge (no charge of the plan meters this type of event).

        Raises OverflowError for a time outside the years 1 to 9999.
        """
        known = self.accounts.get(account)
        if known is None:
            return _refused(Reason.UNKNOWN_ACCOUNT, f"expected an account of the catalog, got {account!r}")
        contracts = self._contracts_of.get(account, ())
        in_force = _in_force(contracts, at_us)
        if in_force is None:
            return _no_contract(account, contracts, at_us)
        contract, contract_start, contract_end = in_force
        timeline = self._plans.get(contract.plan)
        counting = timeline.at(at_us) if timeline else None
        if counting is None:
            return _refused(
                Reason.NO_PRICE, f"expected a version of plan {contract.plan!r} at {format_instant(at_us)}, got none"
            )
        plan, plan_start, plan_end = counting
        period = month_of(at_us, known.time_zone)
        segment = Segment(
            account,
            contract,
            plan,
            period,
            max(period.start_us, contract_start, plan_start),
            min(period.end_us, contract_end, plan_end),
        )
        priced: list[tuple[Charge, Meter]] = []
        start, end = segment.start_us, segment.end_us
        for charge in plan.charges:
            meters = self._meters.get(charge.meter)
            if meters is None:
                return _refused(
                    Reason.NO_PRICE, f"expected meter {charge.meter!r} of plan {plan.id!r} in the catalog, got none"
                )
            measured = meters.at(at_us)
            if measured is None:  # the charge begins to count with its meter
                end = min(end, meters.next_start(at_us))
                continue
            meter, meter_start, meter_end = measured
            start, end = max(start, meter_start), min(end, meter_end)
            if meter.event_type == event_type:
                priced.append((charge, meter))
        if not priced:
            return _refused(
                Reason.NO_CHARGE,
                f"expected an event type that plan {plan.id!r} version {plan.version} charges, got {event_type!r}",
            )
        return Terms(segment, tuple(priced), start, end)


N = TypeVar("N", Account, Contract)


def _keep_newest(items: dict[str, N], item: N) -> None:
    known = items.get(item.id)
    if known is None or known.version <= item.version:
        items[item.id] = item


def _with_version(timeline: _Timeline[V] | None, version: V) -> _Timeline[V]:
    """The timeline with one more version in its place; of two that count from the same time the newer stays."""
    by_start = dict(zip(timeline.starts, timeline.versions, strict=True)) if timeline else {}
    same = by_start.get(version.valid_from_us)
    if same is None or same.version <= version.version:
        by_start[version.valid_from_us] = version
    starts = tuple(sorted(by_start))
    return _Timeline(starts, tuple(by_start[start] for start in starts))


def _in_force(contracts: tuple[Contract, ...], at_us: Micros) -> tuple[Contract, Micros, Micros] | None:
    """The contract that counts at a time, from when and until when. ``contracts`` are in order of their ids."""
    start, end = -_NEVER, _NEVER
    for contract in contracts:
        contract_end = _NEVER if contract.end_us is None else contract.end_us
        if contract.covers(at_us):
            return contract, max(start, contract.start_us), min(end, contract_end)
        # A contract of lower id takes over where it begins and gives way where it ends.
        if contract.start_us > at_us:
            end = min(end, contract.start_us)
        else:
            start = max(start, contract_end)
    return None


def _no_contract(account: str, contracts: tuple[Contract, ...], at_us: Micros) -> Rejection:
    ended = [c for c in contracts if c.end_us is not None and c.end_us <= at_us]
    if not ended:
        return _refused(
            Reason.NO_CONTRACT, f"expected a contract of {account!r} at {format_instant(at_us)}, got none so far"
        )
    last = max(ended, key=lambda c: (c.end_us or 0, c.id))
    return _refused(
        Reason.CONTRACT_ENDED,
        f"expected a contract of {account!r} at {format_instant(at_us)}, "
        f"but contract {last.id!r} ended at {format_instant(last.end_us or 0)}",
    )


def _refused(reason: Reason, message: str) -> Rejection:
    return Rejection(Stage.ENRICH, reason, message)
