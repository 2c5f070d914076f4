-- Corrections of billed usage, and backfills: what was decided, by whom and why, and what is still on its way. What they
-- did is rated usage like any other.

ALTER TABLE billing.receipt ADD COLUMN corrections bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN billing.receipt.corrections IS 'Of a retry topic: corrections applied';

-- Backfills ------------------------------------------------------------------------------------------------------------

CREATE TYPE billing.backfill_state AS ENUM ('staged', 'committing', 'committed', 'reverting', 'reverted', 'discarded');

CREATE TABLE billing.backfill (
    name       text                   PRIMARY KEY CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
    source     text                   NOT NULL UNIQUE,
    state      billing.backfill_state NOT NULL DEFAULT 'staged',
    events     bigint                 NOT NULL CHECK (events > 0),
    sent       bigint                 NOT NULL DEFAULT 0 CHECK (sent BETWEEN 0 AND events),
    note       text                   NOT NULL,
    staged_by  text                   NOT NULL,
    staged_at  timestamptz            NOT NULL DEFAULT now(),
    updated_at timestamptz            NOT NULL DEFAULT now()
);
COMMENT ON TABLE billing.backfill IS 'Usage brought in later, by name: staged here, looked at, then committed to usage.events or reverted as a whole. Who did what is in billing.audit';
COMMENT ON COLUMN billing.backfill.source IS 'The source its events carry; their sequence numbers are the numbers of billing.backfill_event';
COMMENT ON COLUMN billing.backfill.sent IS 'Events up to this number were confirmed by Kafka';

CREATE TABLE billing.backfill_event (
    backfill        text        NOT NULL REFERENCES billing.backfill,
    number          bigint      NOT NULL CHECK (number >= 1),
    identity        uuid        NOT NULL,
    account         text        NOT NULL,
    idempotency_key text        NOT NULL,
    event_type      text        NOT NULL,
    event_time      timestamptz NOT NULL,
    subject         text        NOT NULL,
    properties      jsonb       NOT NULL,
    PRIMARY KEY (backfill, number),
    UNIQUE (backfill, identity)
);
COMMENT ON TABLE billing.backfill_event IS 'The events of backfills, as they were staged';
CREATE TRIGGER backfill_event_append_only BEFORE UPDATE OR DELETE ON billing.backfill_event
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_change();

-- Corrections ----------------------------------------------------------------------------------------------------------

CREATE SEQUENCE billing.correction_number;

CREATE TABLE billing.correction (
    number          bigint      PRIMARY KEY,
    action          text        NOT NULL CHECK (action IN ('void', 'replace')),
    account         text        NOT NULL,
    idempotency_key text        NOT NULL,
    identity        uuid        NOT NULL,
    event_month     date        NOT NULL,
    event_time      timestamptz NOT NULL,
    entry           integer     NOT NULL CHECK (entry >= 1),
    reason_code     text        NOT NULL,
    note            text        NOT NULL DEFAULT '',
    actor           text        NOT NULL,
    decided_at      timestamptz NOT NULL DEFAULT now(),
    backfill        text        REFERENCES billing.backfill,
    message         bytea       NOT NULL,
    UNIQUE (event_month, identity, entry)
);
COMMENT ON TABLE billing.correction IS 'Decisions to take a billed event back, or to replace what it says; append only';
COMMENT ON COLUMN billing.correction.entry IS 'Entry number of the rows that take it back; the replacement''s have the next';
COMMENT ON COLUMN billing.correction.backfill IS 'The backfill whose revert it is part of';
COMMENT ON COLUMN billing.correction.message IS 'What goes to usage.retry, byte for byte: sent again, it is the same correction';
CREATE INDEX correction_identity ON billing.correction (identity);
CREATE INDEX correction_backfill ON billing.correction (backfill) WHERE backfill IS NOT NULL;
CREATE TRIGGER correction_append_only BEFORE UPDATE OR DELETE ON billing.correction
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER correction_no_truncate BEFORE TRUNCATE ON billing.correction
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

CREATE TABLE billing.correction_outbox (
    number bigint PRIMARY KEY REFERENCES billing.correction
);
COMMENT ON TABLE billing.correction_outbox IS 'Corrections that Kafka has not confirmed; written with the decision, so none is forgotten';

-- By hash: keys of refused events may be of any length.
CREATE INDEX unrated_event_key ON billing.unrated_event USING hash (idempotency_key);
CREATE INDEX quarantine_identity ON billing.quarantine (identity) WHERE identity IS NOT NULL;

CREATE VIEW billing.correction_state AS
SELECT correction.*, CASE
    WHEN EXISTS (
        SELECT FROM billing.rated_usage AS usage
        WHERE (usage.event_month, usage.identity, usage.entry)
            = (correction.event_month, correction.identity, correction.entry)
    ) THEN 'applied'
    WHEN EXISTS (
        SELECT FROM billing.unrated_event AS unrated
        WHERE (unrated.idempotency_key, unrated.account) = (correction.idempotency_key, correction.account)
            AND unrated.state = 'dead_lettered' AND unrated.value = correction.message
    ) THEN 'refused'
    -- For no other reason: while the period is open a repeat of the event's own rows says nothing of the correction, and
    -- who took it for settled could decide a second one.
    WHEN EXISTS (
        SELECT FROM billing.quarantine
        WHERE quarantine.identity = correction.identity AND quarantine.at >= correction.decided_at
            AND quarantine.reason = 'period_closed'
    ) THEN 'quarantined'
    WHEN EXISTS (SELECT FROM billing.correction_outbox AS outbox WHERE outbox.number = correction.number) THEN 'unsent'
    ELSE 'sent'
END AS state
FROM billing.correction;
COMMENT ON VIEW billing.correction_state IS 'Corrections and what became of them. applied: its rows are billed; refused: a dead letter says why; quarantined: its rows came when the period was closed; unsent, sent: on their way';

-- What finance reads ---------------------------------------------------------------------------------------------------

-- As its owner: the finance role reads no table behind it.
CREATE VIEW finance.usage_corrections AS
SELECT
    correction.number AS correction,
    correction.action AS action,
    correction.account AS account,
    correction.idempotency_key AS idempotency_key,
    correction.event_time AS event_time,
    correction.reason_code AS reason_code,
    correction.note AS note,
    correction.actor AS decided_by,
    correction.decided_at AS decided_at,
    correction.backfill AS backfill,
    correction.state AS state,
    sums.exact_amount AS exact_amount
FROM billing.correction_state AS correction
CROSS JOIN LATERAL (
    SELECT trim_scale(sum(usage.amount)) AS exact_amount FROM billing.rated_usage AS usage
    WHERE usage.event_month = correction.event_month AND usage.identity = correction.identity
        AND (usage.entry = correction.entry OR usage.entry = correction.entry + 1 AND usage.kind = 'correction')
) AS sums;
COMMENT ON VIEW finance.usage_corrections IS 'Usage that was taken back or replaced after it was billed: who decided it, why, and what it changed';
COMMENT ON COLUMN finance.usage_corrections.correction IS 'Number of the correction';
COMMENT ON COLUMN finance.usage_corrections.action IS 'void: the event is billed no more; replace: billed as it should have been';
COMMENT ON COLUMN finance.usage_corrections.account IS 'Account of the event';
COMMENT ON COLUMN finance.usage_corrections.idempotency_key IS 'Key of the event';
COMMENT ON COLUMN finance.usage_corrections.event_time IS 'When the use happened, UTC';
COMMENT ON COLUMN finance.usage_corrections.reason_code IS 'Why, as a code';
COMMENT ON COLUMN finance.usage_corrections.note IS 'Why, in words';
COMMENT ON COLUMN finance.usage_corrections.decided_by IS 'Who decided';
COMMENT ON COLUMN finance.usage_corrections.decided_at IS 'When, UTC';
COMMENT ON COLUMN finance.usage_corrections.backfill IS 'The backfill that was reverted with it; null where none was';
COMMENT ON COLUMN finance.usage_corrections.state IS 'applied: its rows are on the invoice; unsent, sent: on their way; refused: a dead letter says why; quarantined: it came when the period was closed';
COMMENT ON COLUMN finance.usage_corrections.exact_amount IS 'What it changed the invoice by, exact; null until it is applied';

COMMENT ON COLUMN finance.invoice_lines.events IS 'Events on the line now: an event that was taken back no longer counts';
