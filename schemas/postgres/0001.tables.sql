-- Tally's tables. Money is numeric and exact; times are UTC instants; nothing a finance person relies on is updated in
-- place except the running aggregates of open invoice lines.

CREATE SCHEMA billing;
COMMENT ON SCHEMA billing IS 'Tally''s own tables; finance reads the views of schema finance';

CREATE FUNCTION billing.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append only: write a new version or entry instead', TG_TABLE_NAME;
END $$;

-- Catalog: accounts, contracts, meters and plans, every version once -------------------------------------------------

CREATE TYPE billing.catalog_kind AS ENUM ('account', 'contract', 'meter', 'plan');

CREATE TABLE billing.catalog_version (
    kind         billing.catalog_kind NOT NULL,
    id           text                 NOT NULL,
    version      integer              NOT NULL CHECK (version >= 1),
    valid_from   timestamptz          NOT NULL,
    document     jsonb                NOT NULL,
    published_at timestamptz          NOT NULL DEFAULT now(),
    published_by text                 NOT NULL,
    reason       text                 NOT NULL DEFAULT '',
    PRIMARY KEY (kind, id, version)
);
COMMENT ON TABLE billing.catalog_version IS 'Immutable versions of accounts, contracts, meters and plans: the truth behind billing.catalog';
CREATE TRIGGER catalog_version_append_only BEFORE UPDATE OR DELETE ON billing.catalog_version
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER catalog_version_no_truncate BEFORE TRUNCATE ON billing.catalog_version
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

CREATE TABLE billing.outbox (
    seq        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind       billing.catalog_kind NOT NULL,
    id         text                 NOT NULL,
    version    integer              NOT NULL,
    created_at timestamptz          NOT NULL DEFAULT now(),
    relayed_at timestamptz,
    FOREIGN KEY (kind, id, version) REFERENCES billing.catalog_version
);
CREATE INDEX outbox_unrelayed ON billing.outbox (seq) WHERE relayed_at IS NULL;
COMMENT ON TABLE billing.outbox IS 'Catalog versions on their way to the topic billing.catalog, written in the transaction that publishes them';

-- Invoices -----------------------------------------------------------------------------------------------------------

CREATE TYPE billing.invoice_state AS ENUM ('open', 'draft', 'reviewed', 'issued', 'void');

CREATE TABLE billing.invoice (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account      text                  NOT NULL,
    currency     text                  NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    period_start timestamptz           NOT NULL,
    period_end   timestamptz           NOT NULL CHECK (period_end > period_start),
    state        billing.invoice_state NOT NULL DEFAULT 'open',
    created_at   timestamptz           NOT NULL DEFAULT now(),
    UNIQUE (account, currency, period_start, period_end)
);
COMMENT ON TABLE billing.invoice IS 'One document per account, currency and period; open until the close';

CREATE TABLE billing.invoice_line (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    invoice_id       bigint      NOT NULL REFERENCES billing.invoice,
    contract         text        NOT NULL,
    plan             text        NOT NULL,
    plan_version     integer     NOT NULL,
    price_version    text        NOT NULL,
    meter            text        NOT NULL,
    meter_version    integer     NOT NULL,
    charge           text        NOT NULL,
    segment_start    timestamptz NOT NULL,
    cell             text        NOT NULL DEFAULT '',
    quantity         numeric     NOT NULL DEFAULT 0,
    amount           numeric     NOT NULL DEFAULT 0,
    events           bigint      NOT NULL DEFAULT 0,
    late_events      bigint      NOT NULL DEFAULT 0,
    first_event_at   timestamptz,
    last_event_at    timestamptz,
    reference_values jsonb       NOT NULL DEFAULT '{}',
    updated_at       timestamptz NOT NULL DEFAULT now(),
    UNIQUE (
        invoice_id, contract, charge, segment_start, cell, plan, plan_version, price_version, meter, meter_version
    )
);
COMMENT ON TABLE billing.invoice_line IS 'Running aggregate of one counter of an open invoice under one version of everything that prices it (a meter may change inside a segment); amount is exact, unrounded';
COMMENT ON COLUMN billing.invoice_line.reference_values IS 'Distinct values of the charge''s reference properties, as {property: {"values": [the first 20], "more": whether others came}}';

-- Rated usage: one row per event, charge, cell and entry, by month of event -------------------------------------------

CREATE TYPE billing.entry_kind AS ENUM ('usage', 'void', 'correction');

CREATE TABLE billing.rated_usage (
    event_month      date               NOT NULL,
    identity         uuid               NOT NULL,
    line_id          bigint             NOT NULL,
    origin_offset    bigint             NOT NULL,
    rated_offset     bigint             NOT NULL,
    sequence         bigint             NOT NULL,
    catalog_offset   bigint             NOT NULL,
    event_time       timestamptz        NOT NULL,
    appended_at      timestamptz        NOT NULL,
    origin_partition integer            NOT NULL,
    rated_partition  integer            NOT NULL,
    entry            integer            NOT NULL,
    kind             billing.entry_kind NOT NULL,
    late             boolean            NOT NULL,
    charge           text               NOT NULL,
    cell             text               NOT NULL,
    account          text               NOT NULL,
    idempotency_key  text               NOT NULL,
    event_type       text               NOT NULL,
    subject          text               NOT NULL,
    source           text               NOT NULL,
    quantity         numeric            NOT NULL,
    quantity_before  numeric            NOT NULL,
    quantity_after   numeric            NOT NULL,
    amount           numeric            NOT NULL,
    properties       jsonb              NOT NULL,
    UNIQUE (event_month, identity, charge, cell, entry)
) PARTITION BY RANGE (event_month);
COMMENT ON TABLE billing.rated_usage IS 'Every rated row; the unique key is the second lock on billing an event once';
COMMENT ON COLUMN billing.rated_usage.identity IS '128-bit hash of (account, idempotency key)';
COMMENT ON COLUMN billing.rated_usage.line_id IS 'The open invoice line this row was added to; contract, versions, period and currency stand there';

CREATE TABLE billing.quarantine (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    reason          text        NOT NULL CHECK (reason IN ('already_billed', 'period_closed', 'undecodable', 'already_receipted')),
    rated_topic     text        NOT NULL,
    rated_partition integer     NOT NULL,
    rated_offset    bigint      NOT NULL,
    account         text,
    identity        uuid,
    charge          text,
    value           bytea       NOT NULL,
    at              timestamptz NOT NULL DEFAULT now(),
    UNIQUE (rated_topic, rated_partition, rated_offset)
);
COMMENT ON TABLE billing.quarantine IS 'Messages of the rater that did not become what they were to be, with the reason and their bytes: reported, never silently dropped';
COMMENT ON COLUMN billing.quarantine.reason IS 'already_billed: the event has this row already; period_closed: its invoice is not open; undecodable: not a record of its topic; already_receipted: a second receipt for the same offsets';
COMMENT ON COLUMN billing.quarantine.rated_topic IS 'Topic the message stands on: usage.rated, or for undecodable and already_receipted any the sink reads';

-- Accounting of events -------------------------------------------------------------------------------------------------

CREATE TABLE billing.receipt (
    topic           text        NOT NULL,
    partition       integer     NOT NULL,
    first_offset    bigint      NOT NULL,
    next_offset     bigint      NOT NULL CHECK (next_offset >= first_offset),
    catalog_offset  bigint      NOT NULL,
    records         bigint      NOT NULL,
    rated           bigint      NOT NULL,
    duplicates      bigint      NOT NULL,
    parked          bigint      NOT NULL,
    dead_lettered   bigint      NOT NULL,
    rated_rows      bigint      NOT NULL,
    latest_event_at timestamptz,
    worker          text        NOT NULL,
    generation      integer     NOT NULL,
    committed_at    timestamptz NOT NULL,
    PRIMARY KEY (topic, partition, first_offset)
);
COMMENT ON TABLE billing.receipt IS 'What each rater transaction did with a run of offsets; together they cover every offset once';

CREATE TYPE billing.event_state AS ENUM ('rated', 'duplicate', 'parked', 'dead_lettered');

CREATE TABLE billing.unrated_event (
    origin_topic     text                NOT NULL,
    origin_partition integer             NOT NULL,
    origin_offset    bigint              NOT NULL,
    state            billing.event_state NOT NULL,
    stage            text,
    reason           text,
    message          text,
    attempts         integer             NOT NULL DEFAULT 0,
    replays          integer             NOT NULL DEFAULT 0,
    parked_at        timestamptz,
    not_before       timestamptz,
    account          text,
    idempotency_key  text,
    event_type       text,
    event_time       timestamptz,
    appended_at      timestamptz,
    key              bytea,
    value            bytea,
    letter_topic     text,
    letter_partition integer,
    letter_offset    bigint,
    letter_dead      boolean,
    updated_at       timestamptz         NOT NULL DEFAULT now(),
    decision         text CHECK (decision IN ('replay', 'discard')),
    decided_at       timestamptz,
    decided_by       text,
    decision_reason  text,
    PRIMARY KEY (origin_topic, origin_partition, origin_offset)
);
CREATE INDEX unrated_event_open ON billing.unrated_event (state, reason) WHERE state IN ('parked', 'dead_lettered');
COMMENT ON TABLE billing.unrated_event IS 'Every event that was not rated at first sight, by where it arrived, with the one state it is in now';

CREATE TABLE billing.source_sequence (
    source     text        NOT NULL,
    block      bigint      NOT NULL,
    bits       bit(1000)   NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, block)
);
COMMENT ON TABLE billing.source_sequence IS 'Which sequence numbers of a producing source arrived: bit i (from the left) is number block * 1000 + i';

CREATE TABLE billing.sink_position (
    topic       text    NOT NULL,
    partition   integer NOT NULL,
    next_offset bigint  NOT NULL,
    PRIMARY KEY (topic, partition)
);
COMMENT ON TABLE billing.sink_position IS 'Where the sink reads on, moved by compare-and-set in the transaction that writes the rows';

CREATE TABLE billing.audit (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     timestamptz NOT NULL DEFAULT now(),
    actor  text        NOT NULL,
    action text        NOT NULL,
    target text        NOT NULL,
    detail jsonb       NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE billing.audit IS 'Who decided what, when; append only';
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON billing.audit
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON billing.audit
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
