"""Why an event was not rated, and what that makes of it.

Every reason names the rule that was broken. Parking reasons may pass by themselves (an account may just not have
arrived), so the event is tried again; all others need a person, so the event goes to the dead-letter topic.
"""

from enum import StrEnum
from typing import NamedTuple


class Stage(StrEnum):
    """Where on its way through the rater an event was refused."""

    ACCEPT = "accept"
    DEDUPE = "dedupe"
    ENRICH = "enrich"
    RATE = "rate"
    INTERNAL = "internal"


class Reason(StrEnum):
    """The rule broken. Values are written into topics and tables: never rename one."""

    # accept
    UNDECODABLE = "undecodable"  # not the wire format: no frame, truncated, or bytes left over
    UNKNOWN_SCHEMA = "unknown_schema"  # framed, but no usage event schema has this id
    WRONG_SHAPE = "wrong_shape"  # decodes, but breaks the schema's meaning (bad UTF-8, sequence below 0)
    MESSAGE_TOO_LARGE = "message_too_large"
    KEY_EMPTY = "key_empty"
    KEY_TOO_LONG = "key_too_long"
    ACCOUNT_INVALID = "account_invalid"
    EVENT_TYPE_INVALID = "event_type_invalid"
    TOO_OLD = "too_old"
    IN_THE_FUTURE = "in_the_future"
    AHEAD_OF_PRICES = "ahead_of_prices"  # its time lies so far ahead that a price for it may still be published
    WRONG_PARTITION = "wrong_partition"
    # dedupe
    CONFLICTING_DUPLICATE = "conflicting_duplicate"
    # enrich
    UNKNOWN_ACCOUNT = "unknown_account"
    NO_CONTRACT = "no_contract"  # none yet: a contract that covers the event's time may still arrive
    CONTRACT_ENDED = "contract_ended"
    NO_PRICE = "no_price"  # contract found, but its plan has no version at the event's time
    NO_CHARGE = "no_charge"  # no charge of the plan meters this event type
    # rate
    MISSING_PROPERTY = "missing_property"
    NOT_A_NUMBER = "not_a_number"
    NOT_FINITE = "not_finite"
    NEGATIVE_QUANTITY = "negative_quantity"
    QUANTITY_TOO_LARGE = "quantity_too_large"
    QUANTITY_TOO_PRECISE = "quantity_too_precise"
    BEYOND_LAST_TIER = "beyond_last_tier"  # the charge prices no such quantity: a version that does may be published
    DIMENSION_TOO_LONG = "dimension_too_long"  # the values that name a cell do not fit on a line
    # anywhere
    INTERNAL_ERROR = "internal_error"


#: Tried again with back-off for seven days; after that dead-lettered under the same reason.
PARKING = frozenset(
    {
        Reason.AHEAD_OF_PRICES,
        Reason.WRONG_PARTITION,
        Reason.UNKNOWN_ACCOUNT,
        Reason.NO_CONTRACT,
        Reason.NO_PRICE,
        Reason.BEYOND_LAST_TIER,
    }
)


class Rejection(NamedTuple):
    """An expected failure, as a value: the stage that refused, the rule broken, and a sentence for a person."""

    stage: Stage
    reason: Reason
    message: str

    @property
    def parks(self) -> bool:
        return self.reason in PARKING
