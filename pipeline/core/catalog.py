"""What was agreed, as of one point of the catalog topic: which terms hold for an event of an account at its time.

Of accounts and contracts the newest version counts. Of meters, plans and price lists, and of an account's customer
segment, the version with the greatest ``valid_from`` not after the event counts; of two with the same, the newer.
An account may have several contracts at the same time: each has its own segments, and an event is the contract's whose
plan charges its type; should several do, the one's with the lowest id (they are not published so). A price is
the plan's, unless a price list says otherwise: that of the customer segment, over it that of the account, over it that
of the contract's phase.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeAlias, TypeVar

from pipeline.core.charges import Charge
from pipeline.core.closing import Span
from pipeline.core.contracts import Account, Contract, Phase
from pipeline.core.cycles import Cycle, period_at, periods_ending
from pipeline.core.documents import Entry, from_document
from pipeline.core.meters import Meter, properties_read, totals_alike
from pipeline.core.money import Micros
from pipeline.core.periods import NEVER, Period, days_later, format_instant
from pipeline.core.plans import Plan, Pool, PriceList, free, overridden
from pipeline.core.proration import WHOLE, Portion, portion_of, prorated
from pipeline.core.reasons import Reason, Rejection, Stage

__all__ = ["EARLY_US", "NOTICE_S", "STALE_S", "Catalog", "Entry", "Segment", "Terms"]


@dataclass(frozen=True, slots=True)
class Segment:
    """The longest part of a billing period with one contract, phase, plan and price version: ``[start_us, end_us)``.

    A meter version begins one, too, if from then on events make one quantity in another way: as a peak, no longer a
    sum. One that only measures each event otherwise does not.

    ``charges`` and ``pools`` are what holds in it: the plan's, with the price lists' overrides, prorated as the plan
    says, free in a trial. They include charges without a meter (flat fees), which no event pays: the close does.
    """

    account: str
    contract: Contract
    #: As published: for its id, version, name and currency. Prices are those of ``charges``.
    plan: Plan
    period: Period
    start_us: Micros
    end_us: Micros
    charges: tuple[Charge, ...]
    pools: tuple[Pool, ...] = ()
    #: Those that override, from the weakest (customer segment) to the strongest (the contract's phase).
    price_lists: tuple[PriceList, ...] = ()
    trial: bool = False
    #: What it is of its period, as the plan prorates.
    portion: Portion = WHOLE

    @property
    def span(self) -> Span:
        """As closing prices take it."""
        return Span(self.start_us, self.end_us, self.period, self.portion)

    @property
    def price_version(self) -> str:
        """Names all that prices: ``standard@3``, ``standard@3+education@1+acme@2``, ``standard@3+trial``."""
        lists = [f"{price_list.id}@{price_list.version}" for price_list in self.price_lists]
        return "+".join([f"{self.plan.id}@{self.plan.version}", *(["trial"] if self.trial else lists)])

    def pool_of(self, charge: str) -> Pool | None:
        """The pool a charge draws from."""
        return next((pool for pool in self.pools if charge in pool.charges), None)

    def shortens(self, charge: Charge) -> bool:
        """Was something of the charge shortened with the segment? A later publication may cut both once more."""
        prorate = self.plan.prorate_units
        if prorate == "none" or self.portion.is_whole:
            return False
        return charge.included > 0 or (prorate == "pool_and_tiers" and bool(charge.tiers))


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

V = TypeVar("V", Account, Meter, Plan, PriceList)


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
        return self.starts[index] if index < len(self.starts) else NEVER


#: Whom price lists hold for: a plan, and a customer segment or an account of it.
_Scope: TypeAlias = tuple[str, Literal["segment", "account"], str]


@dataclass(frozen=True, slots=True, eq=False)
class Catalog:
    """An immutable snapshot of all entries below an offset of the catalog topic, made by ``extend`` from ``empty``."""

    #: Next offset of the catalog topic: everything before it is in the snapshot.
    offset: int
    accounts: Mapping[str, Account]
    contracts: Mapping[str, Contract]
    #: From an alias to the account's id.
    aliases: Mapping[str, str]
    _contracts_of: Mapping[str, tuple[Contract, ...]]  # an account's contracts, in order of their ids
    _accounts: Mapping[str, _Timeline[Account]]  # for what of an account counts from a time on
    _meters: Mapping[str, _Timeline[Meter]]
    _plans: Mapping[str, _Timeline[Plan]]
    _price_lists: Mapping[str, _Timeline[PriceList]]
    _lists_for: Mapping[_Scope, tuple[str, ...]]  # ids of the lists with a version for it, in order

    @classmethod
    def empty(cls) -> Self:
        return cls(0, {}, {}, {}, {}, {}, {}, {}, {}, {})

    def extend(self, entries: Iterable[Entry], offset: int) -> Self:
        """A new snapshot with more entries, read up to ``offset``. An entry that is there already changes nothing.

        Raises ValueError for an entry this program cannot read; the snapshot at hand stays as it is.
        """
        accounts, contracts = dict(self.accounts), dict(self.contracts)
        account_versions, meters = dict(self._accounts), dict(self._meters)
        plans, price_lists = dict(self._plans), dict(self._price_lists)
        regroup: set[str] = set()
        for entry in entries:
            match from_document(entry):
                case Account() as account:
                    _keep_newest(accounts, account)
                    account_versions[account.id] = _with_version(account_versions.get(account.id), account)
                case Contract() as contract:
                    regroup |= {contract.account, contracts.get(contract.id, contract).account}
                    _keep_newest(contracts, contract)
                case Meter() as meter:
                    meters[meter.id] = _with_version(meters.get(meter.id), meter)
                case Plan() as plan:
                    plans[plan.id] = _with_version(plans.get(plan.id), plan)
                case PriceList() as price_list:
                    price_lists[price_list.id] = _with_version(price_lists.get(price_list.id), price_list)
        contracts_of = {**self._contracts_of, **dict.fromkeys(regroup, ())}
        for contract in sorted((c for c in contracts.values() if c.account in regroup), key=lambda c: c.id):
            contracts_of[contract.account] += (contract,)
        return type(self)(
            offset,
            accounts,
            contracts,
            _by_alias(accounts),
            contracts_of,
            account_versions,
            meters,
            plans,
            price_lists,
            _by_scope(price_lists),
        )

    def meter(self, id: str, at_us: Micros) -> Meter | None:
        """The version of a meter that counts at a time, if one does."""
        timeline = self._meters.get(id)
        found = timeline.at(at_us) if timeline else None
        return found[0] if found else None

    def plan(self, id: str, at_us: Micros) -> Plan | None:
        """The version of a plan that counts at a time, if one does."""
        timeline = self._plans.get(id)
        found = timeline.at(at_us) if timeline else None
        return found[0] if found else None

    def metered(self, segment: Segment) -> list[tuple[Charge, Meter | None]]:
        """The segment's charges with the meter that counts at its end; without those whose meter begins only later."""
        found: list[tuple[Charge, Meter | None]] = []
        for charge in segment.charges:
            meter = None if charge.meter is None else self.meter(charge.meter, segment.end_us - 1)
            if meter is not None or charge.meter is None:
                found.append((charge, meter))
        return found

    def properties_read(self, segments: Iterable[Segment]) -> frozenset[str]:
        """Every property that may decide what an event costs in these segments, by any version of their meters."""
        names: set[str] = set()
        for segment in segments:
            for charge in segment.charges:
                names.update(charge.by)
                names.update(() if charge.amount_property is None else (charge.amount_property,))
                timeline = self._meters.get(charge.meter or "")
                for meter in timeline.versions if timeline else ():
                    names |= properties_read(meter)
        return frozenset(names)

    def terms(self, account: str, event_type: str, at_us: Micros) -> Terms | Rejection:
        """The terms for an event of this account and type at this time, and for how long around it they hold.

        Rejections, all of stage ``enrich``: unknown_account (an alias is none: usage carries the id), no_contract (none
        covers the time and none ended before), contract_ended, no_price (the plan, one of its meters or the phase's
        price list is not known, no version of the plan counts yet, or a price list does not fit the plan), no_charge
        (no charge of the plan meters this type of event).

        Raises OverflowError for a time outside the years 1 to 9999.
        """
        known = self.accounts.get(account)
        if known is None:
            return self._unknown(account)
        contracts = self._contracts_of.get(account, ())
        plans: list[Plan] = []
        start, end = -NEVER, NEVER
        for contract in contracts:
            if not contract.covers(at_us):
                # One of a lower id takes over where it begins and gives way where it ends.
                start, end = _beside(contract, at_us, start, end)
                continue
            segment = self._segment(known, contract, at_us)
            if isinstance(segment, Rejection):
                return segment
            priced, since, until = self._priced(segment, event_type, at_us)
            start, end = max(start, since), min(end, until)
            if isinstance(priced, Rejection):
                return priced
            if priced:
                return Terms(segment, priced, start, end)
            plans.append(segment.plan)
        if not plans:
            return _no_contract(account, contracts, at_us)
        names = " or ".join(f"{plan.id!r} version {plan.version}" for plan in plans)
        return _refused(Reason.NO_CHARGE, f"expected an event type that plan {names} charges, got {event_type!r}")

    def _priced(
        self, segment: Segment, event_type: str, at_us: Micros
    ) -> tuple[tuple[tuple[Charge, Meter], ...] | Rejection, Micros, Micros]:
        """The segment's charges for a type of event at a time within it, from when and until when these are all."""
        priced: list[tuple[Charge, Meter]] = []
        start, end = segment.start_us, segment.end_us
        for charge in segment.charges:
            if charge.meter is None:
                continue
            meters = self._meters.get(charge.meter)
            if meters is None:
                wanted = f"meter {charge.meter!r} of plan {segment.plan.id!r}"
                return _refused(Reason.NO_PRICE, f"expected {wanted} in the catalog, got none"), start, end
            measured = meters.at(at_us)
            if measured is None:  # the charge begins to count with its meter
                end = min(end, meters.next_start(at_us))
                continue
            meter, meter_start, meter_end = measured
            start, end = max(start, meter_start), min(end, meter_end)
            if meter.event_type == event_type:
                priced.append((charge, meter))
        return tuple(priced), start, end

    def segments(self, account: str, start_us: Micros, end_us: Micros) -> tuple[Segment, ...]:
        """The segments of an account that meet ``[start_us, end_us)``, in order of time, then of their contracts' ids.

        Those of one contract lie one after another, with gaps where nothing holds. Raises OverflowError for a time
        outside the years 1 to 9999.
        """
        known = self.accounts.get(account)
        if known is None:
            return ()
        found: list[Segment] = []
        for contract in self._contracts_of.get(account, ()):
            at_us = max(start_us, contract.start_us)
            until_us = end_us if contract.end_us is None else min(end_us, contract.end_us)
            while at_us < until_us:
                segment = self._segment(known, contract, at_us)
                if isinstance(segment, Rejection):
                    at_us = self._next_start(contract, at_us)
                else:
                    found.append(segment)
                    at_us = segment.end_us
        return tuple(sorted(found, key=lambda segment: (segment.start_us, segment.contract.id)))

    def segments_of(self, account: str, period: Period) -> tuple[Segment, ...]:
        """The segments that one billing period of an account is made of, in order of time.

        Contracts with another cycle may have segments at the same time: those are of other periods. Raises as
        ``segments``.
        """
        found = self.segments(account, period.start_us, period.end_us)
        return tuple(segment for segment in found if segment.period == period)

    def periods_at(self, account: str, at_us: Micros) -> tuple[Period, ...]:
        """The billing periods that hold an instant, of the account's contracts that are in force in them; by their end.

        None for an account that is not known. Raises OverflowError for a time outside the years 1 to 9999.
        """
        return self._periods(account, lambda cycle, zone: (period_at(cycle, at_us, zone),))

    def periods_ending(self, account: str, month: Period) -> tuple[Period, ...]:
        """The billing periods whose last instant lies in a month, of contracts that are in force in them; by their end.

        ``month``: of the account's time zone (``month_of``). Raises as ``periods_at``.
        """
        return self._periods(account, lambda cycle, zone: periods_ending(cycle, month, zone))

    def _periods(self, account: str, of: Callable[[Cycle, str], tuple[Period, ...]]) -> tuple[Period, ...]:
        known = self.accounts.get(account)
        if known is None:
            return ()
        found = {
            period
            for contract in self._contracts_of.get(account, ())
            for period in of(contract.cycle, known.time_zone)
            if contract.meets(period.start_us, period.end_us)
        }
        return tuple(sorted(found, key=lambda period: (period.end_us, period.start_us)))

    def segment(self, account: str, at_us: Micros, contract: str | None = None) -> Segment | Rejection:
        """The segment of a contract of an account that holds the instant, with the prices in it.

        No contract named: the one of those that cover the instant with the lowest id. Rejections as for ``terms``.

        Raises OverflowError for a time outside the years 1 to 9999.
        """
        known = self.accounts.get(account)
        if known is None:
            return self._unknown(account)
        contracts = self._contracts_of.get(account, ())
        for one in contracts:
            if contract in (None, one.id) and one.covers(at_us):
                return self._segment(known, one, at_us)
        return _no_contract(account, contracts, at_us)

    def _segment(self, known: Account, contract: Contract, at_us: Micros) -> Segment | Rejection:
        """The segment of a contract at a time it covers."""
        phase, *phase_span = _phase_at(contract, at_us)
        timeline = self._plans.get(phase.plan)
        counting = timeline.at(at_us) if timeline else None
        if timeline is None or counting is None:
            return _refused(
                Reason.NO_PRICE, f"expected a version of plan {phase.plan!r} at {format_instant(at_us)}, got none"
            )
        plan, *plan_span = counting
        trial, *trial_span = _trial(contract, phase, timeline, at_us, known.time_zone)
        listed = self._lists(known, phase, at_us)
        if isinstance(listed, Rejection):
            return listed
        price_lists, *lists_span = listed
        period = period_at(contract.cycle, at_us, known.time_zone)
        metered = [meter for charge in plan.charges if (meter := self._meters.get(charge.meter or "")) is not None]
        contract_end_us = NEVER if contract.end_us is None else contract.end_us
        spans = [
            (contract.start_us, contract_end_us),
            phase_span,
            plan_span,
            trial_span,
            lists_span,
            (period.start_us, period.end_us),
        ]
        spans += [_counted_alike(meter, at_us) for meter in metered]
        start_us, end_us = max(start for start, _ in spans), min(end for _, end in spans)
        portion = WHOLE  # nearly every segment is a period
        if (start_us, end_us) != (period.start_us, period.end_us):
            enters = start_us <= max(period.start_us, _paid_from(contract, phase, timeline), trial_span[0])
            leaves = end_us == contract.end_us and not self._taken_over(contract, end_us)
            portion = portion_of(
                plan.prorate_by, period, start_us, end_us, known.time_zone, enters=enters, leaves=leaves
            )
        charges, pools = plan.charges, plan.pools
        if trial:
            charges, pools = tuple(map(free, charges)), ()
        else:
            try:
                charges, pools = overridden(plan, price_lists)
            except ValueError as error:
                return _refused(Reason.NO_PRICE, f"expected price lists that fit plan {plan.id!r}: {error}")
            charges, pools = prorated(charges, pools, plan.prorate_units, portion)
        return Segment(known.id, contract, plan, period, start_us, end_us, charges, pools, price_lists, trial, portion)

    def _lists(
        self, account: Account, phase: Phase, at_us: Micros
    ) -> tuple[tuple[PriceList, ...], Micros, Micros] | Rejection:
        """The price lists that hold for a phase of an account, the weakest first; from when and until when they do."""
        start, end = -NEVER, NEVER
        ids: list[str] = []
        dated = self._accounts[account.id].at(at_us)
        if dated is None:
            end = min(end, self._accounts[account.id].next_start(at_us))
        else:
            counting, since, until = dated
            start, end = max(start, since), min(end, until)
            if counting.customer_segment is not None:
                ids += self._lists_for.get((phase.plan, "segment", counting.customer_segment), ())
        ids += self._lists_for.get((phase.plan, "account", account.id), ())
        if phase.price_list is not None:
            if phase.price_list not in self._price_lists:
                return _refused(Reason.NO_PRICE, f"expected price list {phase.price_list!r} in the catalog, got none")
            ids.append(phase.price_list)
        holding: list[PriceList] = []
        for id in dict.fromkeys(ids):
            timeline = self._price_lists[id]
            found = timeline.at(at_us)
            if found is None:
                end = min(end, timeline.next_start(at_us))
                continue
            price_list, since, until = found
            start, end = max(start, since), min(end, until)
            if price_list.plan == phase.plan and (price_list.overrides or price_list.pools):
                holding.append(price_list)
        return tuple(holding), start, end

    def _taken_over(self, contract: Contract, end_us: Micros) -> bool:
        """Whether another contract of the account begins where one ends."""
        return any(one.start_us == end_us for one in self._contracts_of[contract.account])

    def _next_start(self, contract: Contract, at_us: Micros) -> Micros:
        """When next, after a time a contract has no terms at, something begins that there could be terms with."""
        phases = contract.phases
        starts = [phase.start_us for phase in phases if phase.start_us > at_us]
        starts += [self._plans[phase.plan].next_start(at_us) for phase in phases if phase.plan in self._plans]
        starts += [timeline.next_start(at_us) for timeline in self._price_lists.values()]
        return min(starts, default=NEVER)

    def _unknown(self, account: str) -> Rejection:
        owner = self.aliases.get(account)
        hint = "" if owner is None else f", an alias of {owner!r}: send usage under the account's id"
        return _refused(Reason.UNKNOWN_ACCOUNT, f"expected an account of the catalog, got {account!r}{hint}")


N = TypeVar("N", Account, Contract)


def _keep_newest(items: dict[str, N], item: N) -> None:
    known = items.get(item.id)
    if known is None or known.version <= item.version:
        items[item.id] = item


def _by_alias(accounts: Mapping[str, Account]) -> dict[str, str]:
    return {alias: account.id for account in accounts.values() for alias in account.aliases}


def _by_scope(price_lists: Mapping[str, _Timeline[PriceList]]) -> dict[_Scope, tuple[str, ...]]:
    found: dict[_Scope, set[str]] = {}
    for timeline in price_lists.values():
        for price_list in timeline.versions:
            if price_list.customer_segment is not None:
                found.setdefault((price_list.plan, "segment", price_list.customer_segment), set()).add(price_list.id)
            if price_list.account is not None:
                found.setdefault((price_list.plan, "account", price_list.account), set()).add(price_list.id)
    return {scope: tuple(sorted(ids)) for scope, ids in found.items()}


def _with_version(timeline: _Timeline[V] | None, version: V) -> _Timeline[V]:
    """The timeline with one more version in its place; of two that count from the same time the newer stays."""
    by_start = dict(zip(timeline.starts, timeline.versions, strict=True)) if timeline else {}
    same = by_start.get(version.valid_from_us)
    if same is None or same.version <= version.version:
        by_start[version.valid_from_us] = version
    starts = tuple(sorted(by_start))
    return _Timeline(starts, tuple(by_start[start] for start in starts))


def _counted_alike(meter: _Timeline[Meter], at_us: Micros) -> tuple[Micros, Micros]:
    """From when and until when a meter's versions make one quantity of events as the one that counts at a time does."""
    versions = meter.versions
    first = last = at = max(bisect_right(meter.starts, at_us) - 1, 0)
    while first > 0 and totals_alike(versions[first - 1], versions[at]):
        first -= 1
    while last + 1 < len(versions) and totals_alike(versions[last + 1], versions[at]):
        last += 1
    start = -NEVER if first == 0 else meter.starts[first]
    return start, meter.next_start(meter.starts[last])


def _beside(contract: Contract, at_us: Micros, start_us: Micros, end_us: Micros) -> tuple[Micros, Micros]:
    """The part around a time of ``[start_us, end_us)`` that a contract, which does not cover the time, leaves free."""
    if contract.start_us > at_us:
        return start_us, min(end_us, contract.start_us)
    return max(start_us, start_us if contract.end_us is None else contract.end_us), end_us


def _phase_at(contract: Contract, at_us: Micros) -> tuple[Phase, Micros, Micros]:
    """The phase of a contract that counts at a time within it, from when and until when."""
    phases = contract.phases
    starts = [phase.start_us for phase in phases]
    index = bisect_right(starts, at_us) - 1
    return phases[index], starts[index], starts[index + 1] if index + 1 < len(phases) else NEVER


def _paid_from(contract: Contract, phase: Phase, plan: _Timeline[Plan]) -> Micros:
    """When the stretch of phases on one plan, that a phase of the contract is in, has begun to cost something."""
    begins = phase.start_us
    for before in reversed([one for one in contract.phases if one.start_us < phase.start_us]):
        if before.plan != phase.plan:
            break
        begins = before.start_us
    return max(begins, plan.starts[0])


def _trial(
    contract: Contract, phase: Phase, plan: _Timeline[Plan], at_us: Micros, time_zone: str
) -> tuple[bool, Micros, Micros]:
    """Whether a time lies in a phase's trial, from when and until when that answer holds."""
    days = phase.trial_days
    if days is None:
        first = plan.at(phase.start_us) if phase.start_us == contract.start_us else None
        days = first[0].trial_days if first else 0
    if not days:
        return False, -NEVER, NEVER
    end_us = days_later(phase.start_us, days, time_zone)
    return (True, -NEVER, end_us) if at_us < end_us else (False, end_us, NEVER)


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
