"""Price models: what usage costs. One charge prices one meter of a plan.

====================  ==========  =================================================================================
model                 class       what it costs
====================  ==========  =================================================================================
per_unit              running     every unit costs the unit price
graduated             running     each tier's units cost that tier's price; a tier's flat fee is added once reached
volume                running     all units cost the price of the tier the total lies in, plus that tier's flat fee
stairstep             running     the flat price of the tier the total lies in, however many units
package               running     every package begun costs the package price, at least ``min_packages``
block                 running     graduated over blocks begun: each tier's blocks cost that tier's price
graduated_percentage  running     graduated, with a percentage of the (money) quantity for each tier
matrix                running     every unit costs the unit price of its cell, or the default
percentage            per event   a percentage of each event's (money) quantity plus a fixed fee, within limits
dynamic               per event   the amount each event brings, times the multiplier, within limits
flat                  period      ``quantity`` times the unit price, per period; no meter
====================  ==========  =================================================================================

The class (law 3) is the table's, unless the meter, a pool, free events or a maximum make it period: ``charge_class``.

All of them: included units come first and are free; tiers and packages count the units after them. A tier's bound
belongs to it (a total of exactly ``up_to`` is still in the tier) unless the charge says ``exclusive``. The exact result
is rounded once, half up, to 12 decimals. A negative total (corrections) costs what zero costs. A tier's cap and the
charge's maximum limit what has been summed exactly; a minimum is booked by the close alone.

Whether the first tier's flat fee is due before any unit beyond the included ones is the charge's choice,
``flat_on_zero``: it is by default, so price(0) may be above 0, as with ``min_packages``. A counter that saw no event is
absent and costs nothing until the close, which prices it at 0 and books that fee.
"""

from pipeline.core.charges.check import charge_class, charge_faults, check_charge, check_metering
from pipeline.core.charges.model import PER_EVENT, STANDARD, Beyond, Bound, Cell, Charge, ChargeClass, Model, Tier
from pipeline.core.charges.numbers import flat_fee, scaled_amount
from pipeline.core.charges.per_event import EventPrice, compile_amount, compile_event_price
from pipeline.core.charges.running import Lines, Price, compile_price, price_lines, price_of
from pipeline.core.charges.shares import (
    Share,
    ShareKind,
    event_shares,
    free_of,
    level_shares,
    limit_share,
    tier_shares,
)

__all__ = [
    "PER_EVENT",
    "STANDARD",
    "Beyond",
    "Bound",
    "Cell",
    "Charge",
    "ChargeClass",
    "EventPrice",
    "Lines",
    "Model",
    "Price",
    "Share",
    "ShareKind",
    "Tier",
    "charge_class",
    "charge_faults",
    "check_charge",
    "check_metering",
    "compile_amount",
    "compile_event_price",
    "compile_price",
    "event_shares",
    "flat_fee",
    "free_of",
    "level_shares",
    "limit_share",
    "price_lines",
    "price_of",
    "scaled_amount",
    "tier_shares",
]
