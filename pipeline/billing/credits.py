"""Credits and commitments of accounts: asked for by one person, decided by another, drawn and settled by invoices.

A request (a grant of credits, a spend commitment, or that one of these ends now) counts from the moment another person
approves it; requests and decisions are never changed. That a name is really the person's is only recorded.

A void ends what it names at the moment it is approved: usage before that still draws on it, what is left is gone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from psycopg import Connection
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from pipeline.billing.prices import read_catalog
from pipeline.core.commitments import Commitment, check_commitment, check_sold, sold
from pipeline.core.credits import (
    GRANT_REASONS,
    VOID_REASONS,
    Grant,
    Reduces,
    Rollover,
    check_grant,
    check_reason,
    rolled_over,
)
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    QUANTITY_DECIMALS,
    Micros,
    amount_decimal,
    minor_units,
    plain,
    quantity_decimal,
    scaled,
)
from pipeline.core.periods import Period, to_datetime, to_micros

Verdict: TypeAlias = Literal["approved", "rejected"]
Action: TypeAlias = Literal["grant", "commit", "void"]


class CreditError(Exception):
    """A request that cannot be made or decided.

    NotFound        there is no account, grant, commitment or request of this name or number
    AlreadyDecided  somebody decided it before
    SamePerson      who asked for it cannot approve it
    NotVoidable     it does not count, or is void already
    """


class NotFound(CreditError):
    """There is no account, grant, commitment or request of this name or number."""


class AlreadyDecided(CreditError):
    """Somebody decided it before."""


class SamePerson(CreditError):
    """Who asked for it cannot approve it."""


class NotVoidable(CreditError):
    """It does not count, or is void already."""


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asked for, when (UTC), why, and what became of it."""

    id: int
    action: Action
    account: str
    target: int | None
    reason_code: str
    note: str
    requested_by: str
    requested_at: datetime
    verdict: Literal["open", "approved", "rejected"]
    decided_by: str | None
    decided_at: datetime | None
    #: What it is about, of a void what it ends: an amount, its unit, and a grant's kind or a commitment's window.
    amount: Decimal
    unit: str
    kind: str


@dataclass(frozen=True, slots=True)
class Asked:
    """Credits as they are asked for; ``grant.id`` is given by the request. ``unit``: a currency, or what is counted."""

    account: str
    unit: str
    grant: Grant
    rollover: Rollover | None = None


def decimals_of(reduces: Reduces) -> int:
    """Decimals of a grant's numbers: those of quantities or of amounts."""
    return QUANTITY_DECIMALS if reduces == "units" else AMOUNT_DECIMALS


def as_decimal(value: int, reduces: Reduces) -> Decimal:
    """A grant's number in whole units, exact."""
    return quantity_decimal(value) if reduces == "units" else amount_decimal(value)


# Requests -----------------------------------------------------------------------------------------------------------

_INSERT_REQUEST = """
INSERT INTO billing.credit_request (action, account, target_id, reason_code, note, requested_by)
VALUES (%s, %s, %s, %s, %s, %s) RETURNING id
"""
_INSERT_GRANT = """
INSERT INTO billing.credit_grant (id, account, kind, reduces, unit, amount, priority, charges, starts_at, expires_at,
    rollover_maximum, rollover_minimum, rolled_from)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""


def request_grant(connection: "Connection[Any]", asked: Asked, *, reason: str, note: str, actor: str) -> int:
    """Ask for credits; returns the number of the request, which is the grant's.

    Raises ValueError for credits that cannot be given (an amount of 0 or less, an unknown currency or finer than its
    smallest unit, a reason that does not fit, a currency or charge that the account's contracts do not have, a rollover
    less what was used beyond it: that is billed, and would be paid twice), NotFound for an unknown account.
    """
    grant = asked.grant
    check_grant(grant, asked.rollover)
    if asked.rollover is not None and asked.rollover.preserve_overage:
        raise ValueError(
            "expected a rollover without preserve_overage, got one with it: what is used beyond credits is billed, and "
            "would be paid a second time if it were taken off what goes on"
        )
    code = check_reason(reason, GRANT_REASONS[grant.kind] - {"rollover"})
    if grant.reduces != "units":
        _check_minor(asked.unit, as_decimal(grant.amount, grant.reduces))
    check_account(connection, asked.account)
    _check_fits(connection, asked.account, None if grant.reduces == "units" else asked.unit, grant.charges)
    request = _request(connection, "grant", asked.account, None, code, note, actor)
    _insert_grant(connection, request, asked, rolled_from=None)
    _audit(connection, actor, "credits.requested", request, {"account": asked.account, "reason": code, "note": note})
    return request


_INSERT_COMMITMENT = """
INSERT INTO billing.commitment (id, account, currency, amount, per, true_up, overage_factor, charges, prorate,
    starts_at, ends_at)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""


def request_commitment(
    connection: "Connection[Any]", account: str, currency: str, commitment: Commitment, *, note: str, actor: str
) -> int:
    """Ask for a spend commitment to be recorded; returns the number of the request, which is the commitment's.

    Raises ValueError for one that cannot be settled, also for a currency or charge that the account's contracts do not
    have, and for contracts that it cannot count together (``check_sold``); NotFound for an unknown account.
    """
    check_commitment(commitment)
    amount = amount_decimal(commitment.amount)
    _check_minor(currency, amount)
    check_account(connection, account)
    _check_fits(connection, account, currency, commitment.charges)
    catalog = read_catalog(connection, [account])
    check_sold(commitment, currency, sold(catalog.contracts.values(), catalog.plan))
    request = _request(connection, "commit", account, None, "contract", note, actor)
    connection.execute(
        _INSERT_COMMITMENT,
        [
            request,
            account,
            currency,
            amount,
            commitment.window,
            commitment.true_up,
            commitment.overage_factor,
            sorted(commitment.charges),
            commitment.prorate,
            to_datetime(commitment.start_us),
            None if commitment.end_us is None else to_datetime(commitment.end_us),
        ],
    )
    _audit(connection, actor, "commitment.requested", request, {"account": account, "note": note})
    return request


def request_void(connection: "Connection[Any]", target: int, *, reason: str, note: str, actor: str) -> int:
    """Ask for a grant or commitment to end now; returns the number of the request.

    Raises ValueError for a reason that does not fit, NotFound, NotVoidable.
    """
    code = check_reason(reason, VOID_REASONS)
    row = connection.execute(
        "SELECT account, action, verdict, voided_at FROM billing.credit_request_state WHERE id = %s", [target]
    ).fetchone()
    if row is None or row[1] == "void":
        raise NotFound(f"expected a grant or commitment, got {target}: `tally credits list` shows them")
    account, _, verdict, voided_at = row
    if verdict != "approved" or voided_at is not None:
        state = "void already" if voided_at is not None else f"{verdict}: reject it, if it is not to be"
        raise NotVoidable(f"expected something that counts to void, got {target}, which is {state}")
    request = _request(connection, "void", account, target, code, note, actor)
    _audit(connection, actor, "void.requested", request, {"target": target, "reason": code, "note": note})
    return request


_INSERT_DECISION = """
INSERT INTO billing.credit_decision (request_id, verdict, decided_by, note) VALUES (%s, %s, %s, %s)
ON CONFLICT DO NOTHING RETURNING request_id
"""


def decide(connection: "Connection[Any]", request: int, verdict: Verdict, *, actor: str, note: str = "") -> Request:
    """Approve a request, under another name than who asked, or reject it, under any. Returns it as it stands then.

    Balances do not show it before ``alerts.update_now``. Raises NotFound, SamePerson, AlreadyDecided.
    """
    found = read_request(connection, request)
    if verdict == "approved" and actor.strip().lower() == found.requested_by.strip().lower():
        raise SamePerson(f"expected another person than {found.requested_by} to approve {request}, got {actor}")
    if connection.execute(_INSERT_DECISION, [request, verdict, actor, note]).fetchone() is None:
        decided = read_request(connection, request)
        raise AlreadyDecided(f"expected an open request, got {request}, {decided.verdict} by {decided.decided_by}")
    _audit(connection, actor, f"{found.action}.{verdict}", request, {"account": found.account, "note": note})
    return read_request(connection, request)


_SELECT_REQUESTS = """
SELECT request.id, action, request.account, target_id, reason_code, note, requested_by, requested_at, verdict,
    decided_by, decided_at, trim_scale(coalesce(given.amount, promised.amount)),
    coalesce(given.unit, promised.currency), coalesce(given.kind::text, 'per ' || promised.per)
FROM billing.credit_request_state AS request
LEFT JOIN billing.credit_grant AS given ON given.id = coalesce(request.target_id, request.id)
LEFT JOIN billing.commitment AS promised ON promised.id = coalesce(request.target_id, request.id)
"""


def read_request(connection: "Connection[Any]", request: int) -> Request:
    """Raises NotFound."""
    row = connection.execute(f"{_SELECT_REQUESTS} WHERE request.id = %s", [request]).fetchone()
    if row is None:
        raise NotFound(f"expected a request, got {request}: `tally credits list --open` shows those that wait")
    return Request(*row)


def open_requests(connection: "Connection[Any]", account: str | None = None) -> list[Request]:
    """Requests nobody decided yet, the oldest first."""
    rows = connection.execute(
        f"{_SELECT_REQUESTS} WHERE verdict = 'open' AND (%(account)s::text IS NULL OR request.account = %(account)s) "
        "ORDER BY request.id",
        {"account": account},
    )
    return [Request(*row) for row in rows]


_SELECT_LISTED = """
SELECT * FROM finance.credits WHERE (%(account)s::text IS NULL OR account = %(account)s) ORDER BY account, grant_id
"""
_SELECT_BALANCES = """
SELECT * FROM finance.credit_balances WHERE (%(account)s::text IS NULL OR account = %(account)s)
ORDER BY account, reduces, unit
"""
_SELECT_COMMITMENTS = """
SELECT * FROM finance.commitments WHERE (%(account)s::text IS NULL OR account = %(account)s)
ORDER BY account, commitment_id
"""


def listed(
    connection: "Connection[Any]", what: Literal["credits", "balances", "commitments"], account: str | None
) -> list[dict[str, Any]]:
    """Rows of finance's view of these, by column."""
    statement = {"credits": _SELECT_LISTED, "balances": _SELECT_BALANCES, "commitments": _SELECT_COMMITMENTS}[what]
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, {"account": account}).fetchall()


# For the close ------------------------------------------------------------------------------------------------------
#
# What a close asks for, in law 6's order: commitments (``pipeline.billing.commitments``), net and total credits
# (``pipeline.billing.close_money``, with ``core.invoice``); before all of them units
# (``pipeline.billing.unit_credits``).


@dataclass(frozen=True, slots=True)
class Held:
    """An approved grant as credits are drawn from it: less what other invoices settled, ended where it was voided."""

    account: str
    unit: str
    grant: Grant


_SELECT_HELD = """
SELECT state.id, account, unit, kind, reduces, priority, charges, starts_at, ends_at, decided_at,
    amount - coalesce((
        SELECT sum(entry.amount) FROM billing.credit_entry AS entry
        WHERE entry.grant_id = state.id AND NOT entry.invoice_id = ANY(%(except)s)
    ), 0)
FROM billing.grant_state AS state
WHERE account = ANY(%(accounts)s) AND verdict = 'approved' AND (ends_at IS NULL OR ends_at > starts_at)
ORDER BY state.id
"""


def held(connection: "Connection[Any]", accounts: Iterable[str], *, settling: Iterable[int] = ()) -> list[Held]:
    """What these accounts can draw on, by grant. What the invoices ``settling`` have drawn counts as not drawn yet."""
    rows = connection.execute(_SELECT_HELD, {"accounts": list(accounts), "except": list(settling)})
    return [
        Held(
            account,
            unit,
            Grant(
                id=str(id),
                amount=scaled(left, decimals_of(reduces)),
                start_us=to_micros(starts_at),
                end_us=None if ends_at is None else to_micros(ends_at),
                kind=kind,
                reduces=reduces,
                priority=priority,
                granted_us=to_micros(decided_at),
                charges=frozenset(charges),
            ),
        )
        for id, account, unit, kind, reduces, priority, charges, starts_at, ends_at, decided_at, left in rows
    ]


_SELECT_UNITS_DRAWN = """
SELECT entry.grant_id::text, sum(entry.amount) FROM billing.credit_entry AS entry
JOIN billing.credit_grant AS given ON given.id = entry.grant_id
JOIN billing.invoice ON invoice.id = entry.invoice_id
WHERE invoice.account = %s AND invoice.period_start = %s AND invoice.period_end = %s AND given.reduces = 'units'
GROUP BY entry.grant_id HAVING sum(entry.amount) > 0
"""


def units_drawn(connection: "Connection[Any]", account: str, period: Period) -> list[Grant]:
    """The unit credits that an account's invoices of a period have drawn, as grants of just so much.

    Drawing from them gives what was drawn: the same units for the same usage (``core.credits.draw_units``).
    """
    bounds = [account, to_datetime(period.start_us), to_datetime(period.end_us)]
    drawn = dict(connection.execute(_SELECT_UNITS_DRAWN, bounds).fetchall())
    if not drawn:
        return []
    grants = (one.grant for one in held(connection, [account]) if one.grant.id in drawn)
    return [replace(grant, amount=scaled(drawn[grant.id], QUANTITY_DECIMALS)) for grant in grants]


_SELECT_DRAWN = """
SELECT grant_id, line_id, sum(amount) FROM billing.credit_entry WHERE invoice_id = %s GROUP BY grant_id, line_id
"""
_INSERT_ENTRY = """
INSERT INTO billing.credit_entry (grant_id, invoice_id, line_id, amount, booked_by, note)
VALUES (%s, %s, %s, %s, %s, %s)
"""
_SELECT_BEYOND = """
SELECT id, trim_scale(amount), trim_scale(settled) FROM billing.grant_state
WHERE id = ANY(%s) AND settled NOT BETWEEN 0 AND amount
"""


def settle(
    connection: "Connection[Any]",
    invoice: int,
    drawn: Mapping[tuple[int, int | None], Decimal],
    *,
    actor: str,
    note: str = "",
) -> int:
    """Book what an invoice draws, by grant and line (None: the document): the difference to what it drew before.

    Twice is once. Returns how many entries it took. Call ``lock_grants`` before ``held`` in the same transaction, so
    that two closes do not draw the same credits, and ``alerts.update`` once the invoice is issued, so that the
    account's estimate gives way.

    Raises ValueError for more than a grant has.
    """
    before: dict[tuple[int, int | None], Decimal] = {
        (grant, line): amount for grant, line, amount in connection.execute(_SELECT_DRAWN, [invoice])
    }
    keys = sorted(before.keys() | drawn.keys(), key=lambda key: (key[0], key[1] or 0))
    differences = [(key, drawn.get(key, Decimal(0)) - before.get(key, Decimal(0))) for key in keys]
    rows = [(grant, invoice, line, amount, actor, note) for (grant, line), amount in differences if amount]
    with connection.cursor() as cursor:
        cursor.executemany(_INSERT_ENTRY, rows)
    check_settled(connection, {grant for grant, _ in keys})
    return len(rows)


def check_settled(connection: "Connection[Any]", grants: Iterable[int]) -> None:
    """Raise ValueError for a grant from which more was drawn than it has, or less than nothing."""
    beyond = connection.execute(_SELECT_BEYOND, [sorted(grants)]).fetchone()
    if beyond is not None:
        grant, amount, settled = beyond
        raise ValueError(f"expected draws of 0 to {amount} in all from grant {grant}, got {settled}")


def lock_grants(connection: "Connection[Any]", account: str) -> None:
    """Hold an account's grants until the transaction ends: nobody else draws them, and balances wait."""
    lock_grants_of(connection, [account])


def lock_grants_of(connection: "Connection[Any]", accounts: Iterable[str]) -> None:
    """As ``lock_grants``, of several accounts, in one order whoever asks."""
    ordered = sorted(set(accounts))
    connection.execute(
        "INSERT INTO billing.balance_mark (account) SELECT unnest(%s::text[]) ON CONFLICT DO NOTHING", [ordered]
    )
    connection.execute(
        "SELECT FROM billing.balance_mark WHERE account = ANY(%s) ORDER BY account FOR UPDATE", [ordered]
    )


_SELECT_ROLLING = """
SELECT account, kind, reduces, unit, priority, charges, expires_at, amount - settled, requested_by, decided_by,
    rollover_maximum, rollover_minimum, voided_at
FROM billing.grant_state WHERE id = %s AND verdict = 'approved'
"""


def roll_over(connection: "Connection[Any]", grant: int, *, until_us: Micros | None, actor: str) -> int | None:
    """Carry a grant's balance on from its end, as its rule says, into a new grant that ends at ``until_us``.

    Call it when all usage up to its end is settled. Returns the new grant's number; None where nothing goes on: no
    rule, void, or no balance. It was approved with the rule, by the same two people. Raises NotFound,
    psycopg.errors.UniqueViolation for a second time.
    """
    row = connection.execute(_SELECT_ROLLING, [grant]).fetchone()
    if row is None:
        raise NotFound(f"expected an approved grant, got {grant}")
    (account, kind, reduces, unit, priority, charges, expires_at, left, requester, approver, *rule, voided_at) = row
    maximum, minimum = rule
    if maximum is None or voided_at is not None:
        return None
    decimals = decimals_of(reduces)
    rollover = Rollover(scaled(maximum, decimals), scaled(minimum, decimals))
    balance = rolled_over(scaled(left, decimals), rollover)
    if balance <= 0:
        return None
    start_us = to_micros(expires_at)
    new = Grant("", balance, start_us, until_us, kind, reduces, priority, start_us, frozenset(charges))
    asked = Asked(account, unit, new, rollover if until_us is not None else None)
    request = _request(connection, "grant", account, None, "rollover", f"of grant {grant}", requester)
    _insert_grant(connection, request, asked, rolled_from=grant)
    connection.execute(_INSERT_DECISION, [request, "approved", approver, f"with grant {grant}"])
    _audit(connection, actor, "credits.rolled_over", request, {"account": account, "from": grant})
    return request


_SELECT_HELD_COMMITMENTS = """
SELECT commitment.id, commitment.currency, amount, per, true_up, overage_factor, charges, prorate, starts_at,
    least(ends_at, voided_at)
FROM billing.commitment JOIN billing.credit_request_state AS request ON request.id = commitment.id
WHERE commitment.account = %s AND verdict = 'approved' AND (voided_at IS NULL OR voided_at > starts_at)
ORDER BY commitment.id
"""


def commitments_of(connection: "Connection[Any]", account: str) -> list[tuple[str, Commitment]]:
    """An account's approved commitments with their currencies, ended where they were voided: for ``settle_windows``."""
    return [
        (
            currency,
            Commitment(
                id=str(id),
                amount=scaled(amount, AMOUNT_DECIMALS),
                start_us=to_micros(starts_at),
                end_us=None if ends_at is None else to_micros(ends_at),
                window=per,
                true_up=true_up,
                overage_factor=factor,
                charges=frozenset(charges),
                prorate=prorate,
            ),
        )
        for id, currency, amount, per, true_up, factor, charges, prorate, starts_at, ends_at in connection.execute(
            _SELECT_HELD_COMMITMENTS, [account]
        )
    ]


# Settings of an account ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Overdraft:
    """How far an account may use total credits beyond what it has (1e-12), and whether its services stop then."""

    amount: int = 0
    hard_stop: bool = False


def set_overdraft(
    connection: "Connection[Any]", account: str, unit: str, amount: Decimal, *, hard_stop: bool, actor: str, note: str
) -> None:
    """Raises ValueError for an amount below 0 or finer than the currency, NotFound for an unknown account."""
    if amount < 0:
        raise ValueError(f"expected an overdraft of 0 or more, got {amount}")
    _check_minor(unit, amount)
    check_account(connection, account)
    _check_fits(connection, account, unit)
    connection.execute(
        "INSERT INTO billing.overdraft (account, unit, amount, hard_stop, set_by, note) "
        "VALUES (%s, %s, %s, %s, %s, %s)",
        [account, unit, amount, hard_stop, actor, note],
    )


def overdrafts_of(connection: "Connection[Any]", account: str) -> dict[str, Overdraft]:
    """An account's overdrafts by currency."""
    rows = connection.execute(
        "SELECT DISTINCT ON (unit) unit, amount, hard_stop FROM billing.overdraft WHERE account = %s "
        "ORDER BY unit, id DESC",
        [account],
    )
    return {unit: Overdraft(scaled(amount, AMOUNT_DECIMALS), hard_stop) for unit, amount, hard_stop in rows}


def set_budget(
    connection: "Connection[Any]", account: str, currency: str, amount: Decimal | None, *, actor: str, note: str
) -> None:
    """None ends it. Raises ValueError for an amount of 0 or less, NotFound for an unknown account."""
    if amount is not None:
        if amount <= 0:
            raise ValueError(f"expected a budget above 0, got {amount}")
        _check_minor(currency, amount)
    check_account(connection, account)
    _check_fits(connection, account, currency)
    connection.execute(
        "INSERT INTO billing.budget (account, currency, amount, set_by, note) VALUES (%s, %s, %s, %s, %s)",
        [account, currency, amount, actor, note],
    )


def budgets_of(connection: "Connection[Any]", account: str) -> dict[str, int]:
    """An account's budgets (1e-12) by currency."""
    rows = connection.execute(
        "SELECT DISTINCT ON (currency) currency, amount FROM billing.budget WHERE account = %s "
        "ORDER BY currency, id DESC",
        [account],
    )
    return {currency: scaled(amount, AMOUNT_DECIMALS) for currency, amount in rows if amount is not None}


# Pieces -------------------------------------------------------------------------------------------------------------


def _request(
    connection: "Connection[Any]",
    action: Action,
    account: str,
    target: int | None,
    reason_code: str,
    note: str,
    actor: str,
) -> int:
    row = connection.execute(_INSERT_REQUEST, [action, account, target, reason_code, note, actor]).fetchone()
    assert row is not None, "an INSERT returns what it inserted"
    return int(row[0])


def _insert_grant(connection: "Connection[Any]", id: int, asked: Asked, *, rolled_from: int | None) -> None:
    grant, rollover = asked.grant, asked.rollover
    connection.execute(
        _INSERT_GRANT,
        [
            id,
            asked.account,
            grant.kind,
            grant.reduces,
            asked.unit,
            as_decimal(grant.amount, grant.reduces),
            grant.priority,
            sorted(grant.charges),
            to_datetime(grant.start_us),
            None if grant.end_us is None else to_datetime(grant.end_us),
            None if rollover is None else as_decimal(rollover.maximum, grant.reduces),
            0 if rollover is None else as_decimal(rollover.minimum, grant.reduces),
            rolled_from,
        ],
    )


_SELECT_ACCOUNT = "SELECT EXISTS (SELECT FROM billing.catalog_version WHERE kind = 'account' AND id = %s)"


def check_account(connection: "Connection[Any]", account: str) -> None:
    """Raises NotFound for an account that nobody published."""
    if connection.execute(_SELECT_ACCOUNT, [account]).fetchone() != (True,):
        raise NotFound(f"expected an account of the catalog, got {account!r}: `tally accounts list` shows them")


_SELECT_CHARGES = """
SELECT DISTINCT plan.document ->> 'currency', charge ->> 'id'
FROM (
    SELECT DISTINCT ON (id) document FROM billing.catalog_version
    WHERE kind = 'contract' AND document ->> 'account' = %s ORDER BY id, version DESC
) AS contract
JOIN billing.catalog_version AS plan ON plan.kind = 'plan' AND (
    plan.id = contract.document ->> 'plan'
    OR contract.document -> 'later_phases' @> jsonb_build_array(jsonb_build_object('plan', plan.id))
)
CROSS JOIN jsonb_array_elements(plan.document -> 'charges') AS charge
"""


def _check_fits(connection: "Connection[Any]", account: str, currency: str | None, charges: Iterable[str] = ()) -> None:
    """Raise ValueError for what no contract of the account could ever meet; one without contracts may meet anything."""
    known = connection.execute(_SELECT_CHARGES, [account]).fetchall()
    if not known:
        return
    currencies, ids = (sorted(set(column)) for column in zip(*known, strict=True))
    if currency is not None and currency not in currencies:
        raise ValueError(f"expected {' or '.join(currencies)}, the currency of {account}'s contracts, got {currency}")
    if unknown := sorted(set(charges) - set(ids)):
        raise ValueError(f"expected a charge of {account}'s contracts, got {unknown[0]!r}: they have {', '.join(ids)}")


def _check_minor(currency: str, amount: Decimal) -> None:
    """So that no balance is ever finer than what can be paid."""
    decimals = minor_units(currency)
    try:
        scaled(amount, decimals)
    except ValueError:
        raise ValueError(
            f"expected an amount of {currency} with at most {decimals} decimals, got {plain(amount)}"
        ) from None


_INSERT_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def _audit(connection: "Connection[Any]", actor: str, action: str, request: int, detail: dict[str, Any]) -> None:
    connection.execute(_INSERT_AUDIT, [actor, action, f"credit request {request}", Jsonb(detail)])
