"""`tally accounts …`: who is billed, and by which contracts."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from pipeline.catalog import store
from pipeline.catalog.files import read_account_files
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_NOT_FOUND, emit_json, err, fail, out
from pipeline.cli.publishing import WAIT_S, Wait, publish_and_show
from pipeline.core.contracts import Account, Contract
from pipeline.core.cycles import in_words
from pipeline.core.periods import format_instant
from pipeline.infra.postgres import connect

_accounts = typer.Typer(no_args_is_help=True, help="Accounts and contracts: apply files, and look at what is there.")


def register(app: typer.Typer) -> None:
    app.add_typer(_accounts, name="accounts")


@_accounts.command()
def apply(
    files: Annotated[
        list[Path], typer.Argument(help="Account files; together they are one whole.", exists=True, dir_okay=False)
    ],
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    back_dated: Annotated[
        bool,
        typer.Option(
            "--back-dated",
            help="Let what changed reach into the past, up to the last issued invoice; then `tally rerate` corrects "
            "the open periods.",
        ),
    ] = False,
    wait: Wait = WAIT_S,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Apply account files: each changed account and contract becomes a new version, all or none.

    What the files do not name stays as it is.
    """
    settings, drafts = settings_for(data_dir), read_account_files(files)
    publish_and_show(settings, drafts, reason=reason, wait=wait, as_json=as_json, back_dated=back_dated)


@_accounts.command("list")
def list_(data_dir: DataDir = None, as_json: Json = False) -> None:
    """All accounts with their contracts."""
    with connect(settings_for(data_dir).dsn, application="accounts") as connection:
        accounts = [cast(Account, version.item) for version in store.current(connection, "account")]
        contracts: dict[str, list[Contract]] = {account.id: [] for account in accounts}
        for contract in store.contracts_of(connection, contracts):
            contracts[contract.account].append(contract)
    if as_json:
        emit_json([_account_json(account, contracts[account.id]) for account in accounts])
        return
    table = Table("account", "name", "time zone", *_PHASE_COLUMNS)
    for account in accounts:
        head = (account.id, account.name, account.time_zone)
        rows = [row for contract in contracts[account.id] for row in _phase_rows(contract)]
        for index, row in enumerate(rows or [("",) * len(_PHASE_COLUMNS)]):
            table.add_row(*(head if index == 0 else ("",) * len(head)), *row)
    out.print(table)
    if not accounts:
        err.print("No account yet: `tally accounts apply FILE`.")


@_accounts.command()
def show(
    account: Annotated[str, typer.Argument(metavar="ID", help="Account id, or an alias of it.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """One account, its contracts, and every version of both."""
    with connect(settings_for(data_dir).dsn, application="accounts") as connection:
        related = store.related_accounts(connection, [account])
        found = next((one.id for one in related if account in (one.id, *one.aliases)), account)
        versions = store.versions(connection, "account", found)
        if not versions:
            fail(f"expected a known account, got {account!r}; `tally accounts list` shows them", EXIT_NOT_FOUND)
        contracts = store.contracts_of(connection, [found])
        history = [*versions, *(v for c in contracts for v in store.versions(connection, "contract", c.id))]
    item = cast(Account, versions[-1].item)
    children = [one.id for one in related if one.parent == found]
    if as_json:
        shown = _account_json(item, contracts)
        emit_json({**shown, "children": children, "versions": [_version_json(version) for version in history]})
        return
    out.print(f"[bold]{item.id}[/]: {item.name}, in the time zone {item.time_zone}", highlight=False)
    for what, names in (
        ("customer segment", [item.customer_segment] if item.customer_segment else []),
        ("also known as", item.aliases),
        ("belongs to", [item.parent] if item.parent else []),
        ("has below it", children),
        ("billed by", [f"{in_words(contract.cycle)} ({contract.id})" for contract in contracts]),
    ):
        if names:
            out.print(f"{what}: {', '.join(names)}", highlight=False)
    table = Table(*_PHASE_COLUMNS)
    for contract in contracts:
        for row in _phase_rows(contract):
            table.add_row(*row)
    out.print(table)
    changes = Table("", "id", "version", "published", "by", "reason")
    for version in history:
        entry = version.entry
        published = f"{version.published_at:%Y-%m-%d %H:%M:%S} UTC"
        changes.add_row(entry.kind, entry.id, str(entry.version), published, version.published_by, version.reason)
    out.print(changes)


_PHASE_COLUMNS = ("contract", "plan", "price list", "from", "until")


def _phase_rows(contract: Contract) -> list[tuple[str, ...]]:
    """A row for each phase of a contract, the first with its id."""
    ends = [*(phase.start_us for phase in contract.later_phases), contract.end_us]
    return [
        (
            "" if number else contract.id,
            phase.plan,
            phase.price_list or "",
            format_instant(phase.start_us),
            "open end" if end is None else format_instant(end),
        )
        for number, (phase, end) in enumerate(zip(contract.phases, ends, strict=True))
    ]


def _account_json(account: Account, contracts: list[Contract]) -> dict[str, Any]:
    return {
        "id": account.id,
        "version": account.version,
        "name": account.name,
        "time_zone": account.time_zone,
        "customer_segment": account.customer_segment,
        "parent": account.parent,
        "aliases": list(account.aliases),
        "contracts": [
            {
                "id": contract.id,
                "version": contract.version,
                "plan": contract.plan,
                "start": format_instant(contract.start_us),
                "end": None if contract.end_us is None else format_instant(contract.end_us),
                "legal_entity": contract.legal_entity,
                "cycle": {"every": contract.cycle.every, "day": contract.cycle.day, "month": contract.cycle.month},
                "phases": [
                    {
                        "start": format_instant(phase.start_us),
                        "plan": phase.plan,
                        "price_list": phase.price_list,
                        "trial_days": phase.trial_days,
                    }
                    for phase in contract.phases
                ],
            }
            for contract in contracts
        ],
    }


def _version_json(version: store.Version) -> dict[str, Any]:
    return {
        "kind": version.entry.kind,
        "id": version.entry.id,
        "version": version.entry.version,
        "published_at": version.published_at,
        "published_by": version.published_by,
        "reason": version.reason,
    }
