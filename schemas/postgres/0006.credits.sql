-- Credits, commitments, budgets, balances and alerts. What one person asks for another decides; requests, decisions and
-- entries are never changed or deleted. Balances are kept up to date by `tally alerts` and are estimates of what the
-- close will settle.

-- Requests and decisions -------------------------------------------------------------------------------------------------

CREATE TABLE billing.credit_request (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    action       text        NOT NULL CHECK (action IN ('grant', 'commit', 'void')),
    account      text        NOT NULL,
    target_id    bigint      REFERENCES billing.credit_request CHECK ((action = 'void') = (target_id IS NOT NULL)),
    reason_code  text        NOT NULL CHECK (btrim(reason_code) <> ''),
    note         text        NOT NULL DEFAULT '',
    requested_by text        NOT NULL CHECK (btrim(requested_by) <> ''),
    requested_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE billing.credit_request IS 'What somebody asked for: credits for an account, a spend commitment of it, or that one of these ends at once; counts once another person approves it';
COMMENT ON COLUMN billing.credit_request.target_id IS 'Of a void: the grant or commitment that ends';
CREATE INDEX credit_request_account ON billing.credit_request (account);
CREATE INDEX credit_request_target ON billing.credit_request (target_id) WHERE target_id IS NOT NULL;

CREATE TABLE billing.credit_grant (
    id               bigint      PRIMARY KEY REFERENCES billing.credit_request,
    account          text        NOT NULL,
    kind             text        NOT NULL CHECK (kind IN ('prepaid', 'promotional', 'service', 'correction')),
    reduces          text        NOT NULL CHECK (reduces IN ('units', 'net', 'total')),
    unit             text        NOT NULL CHECK (reduces = 'units' OR unit ~ '^[A-Z]{3}$'),
    amount           numeric     NOT NULL CHECK (amount > 0),
    priority         integer     NOT NULL,
    charges          text[]      NOT NULL DEFAULT '{}' CHECK (reduces <> 'units' OR cardinality(charges) > 0),
    starts_at        timestamptz NOT NULL,
    expires_at       timestamptz CHECK (expires_at > starts_at),
    rollover_maximum numeric     CHECK (rollover_maximum >= rollover_minimum),
    rollover_minimum numeric     NOT NULL DEFAULT 0 CHECK (rollover_minimum >= 0),
    preserve_overage boolean     NOT NULL DEFAULT false,
    rolled_from      bigint      UNIQUE REFERENCES billing.credit_grant,
    CHECK (rollover_maximum IS NULL OR expires_at IS NOT NULL)
);
COMMENT ON TABLE billing.credit_grant IS 'Credits given or asked for; unit is the currency or, of unit credits, the name of what is counted';
COMMENT ON COLUMN billing.credit_grant.rolled_from IS 'The grant whose balance went on in this one';
CREATE INDEX credit_grant_account ON billing.credit_grant (account);

CREATE TABLE billing.commitment (
    id             bigint      PRIMARY KEY REFERENCES billing.credit_request,
    account        text        NOT NULL,
    currency       text        NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    amount         numeric     NOT NULL CHECK (amount > 0),
    per            text        NOT NULL CHECK (per IN ('hour', 'day', 'month', 'year', 'term')),
    true_up        boolean     NOT NULL,
    overage_factor numeric     NOT NULL CHECK (overage_factor >= 0),
    charges        text[]      NOT NULL DEFAULT '{}',
    prorate        boolean     NOT NULL,
    starts_at      timestamptz NOT NULL,
    ends_at        timestamptz CHECK (ends_at > starts_at) CHECK (per <> 'term' OR ends_at IS NOT NULL)
);
COMMENT ON TABLE billing.commitment IS 'An amount an account promised to spend per window, agreed or asked for';
CREATE INDEX commitment_account ON billing.commitment (account);

CREATE TABLE billing.credit_decision (
    request_id bigint      PRIMARY KEY REFERENCES billing.credit_request,
    verdict    text        NOT NULL CHECK (verdict IN ('approved', 'rejected')),
    decided_by text        NOT NULL CHECK (btrim(decided_by) <> ''),
    decided_at timestamptz NOT NULL DEFAULT now(),
    note       text        NOT NULL DEFAULT ''
);
COMMENT ON TABLE billing.credit_decision IS 'What became of a request: decided once, approved only under another name than the requester''s';

-- Names are compared as people read them. Whether a name is the person's own, nothing here can know.
CREATE FUNCTION billing.refuse_own_credit() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    requester text;
BEGIN
    SELECT requested_by INTO requester FROM billing.credit_request WHERE id = NEW.request_id;
    IF NEW.verdict = 'approved' AND lower(btrim(NEW.decided_by)) = lower(btrim(requester)) THEN
        RAISE EXCEPTION 'request % is %''s own: expected another person to approve it', NEW.request_id, requester;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER credit_decision_second_person BEFORE INSERT ON billing.credit_decision
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_own_credit();

-- What the close settled -------------------------------------------------------------------------------------------------

CREATE TABLE billing.credit_entry (
    id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    grant_id  bigint      NOT NULL REFERENCES billing.credit_grant,
    invoice_id bigint     NOT NULL REFERENCES billing.invoice,
    line_id   bigint      REFERENCES billing.invoice_line,
    amount    numeric     NOT NULL CHECK (amount <> 0),
    booked_at timestamptz NOT NULL DEFAULT now(),
    booked_by text        NOT NULL,
    note      text        NOT NULL DEFAULT ''
);
COMMENT ON TABLE billing.credit_entry IS 'Credits drawn for invoices, settled: above 0 drawn, below 0 given back. A later difference is a later entry';
COMMENT ON COLUMN billing.credit_entry.line_id IS 'The line it was drawn for';
CREATE INDEX credit_entry_grant ON billing.credit_entry (grant_id);
CREATE INDEX credit_entry_invoice ON billing.credit_entry (invoice_id);

-- Settings of an account -------------------------------------------------------------------------------------------------

CREATE TABLE billing.overdraft (
    id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account   text        NOT NULL,
    unit      text        NOT NULL,
    amount    numeric     NOT NULL CHECK (amount >= 0),
    hard_stop boolean     NOT NULL,
    set_by    text        NOT NULL,
    set_at    timestamptz NOT NULL DEFAULT now(),
    note      text        NOT NULL DEFAULT ''
);
COMMENT ON TABLE billing.overdraft IS 'How far an account may use total credits of a unit beyond what it has, and whether its services stop then; the newest row of an account and unit counts, without one it is 0 and they go on';
CREATE INDEX overdraft_account ON billing.overdraft (account, unit, id);

CREATE TABLE billing.budget (
    id       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account  text        NOT NULL,
    currency text        NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    amount   numeric     CHECK (amount > 0),
    set_by   text        NOT NULL,
    set_at   timestamptz NOT NULL DEFAULT now(),
    note     text        NOT NULL DEFAULT ''
);
COMMENT ON TABLE billing.budget IS 'What an account means to spend per billing period, for alerts only; the newest row of an account and currency counts, null ends it';
CREATE INDEX budget_account ON billing.budget (account, currency, id);

-- Balances, kept by a worker ---------------------------------------------------------------------------------------------

CREATE TABLE billing.balance_mark (
    account     text        PRIMARY KEY,
    usage_mark  numeric     NOT NULL DEFAULT 0,
    computed_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE billing.balance_mark IS 'Up to which usage an account''s balances were computed; its row is the lock on them';
COMMENT ON COLUMN billing.balance_mark.usage_mark IS 'Sum of the times its unsettled lines were last updated, in seconds: another sum is other usage';

CREATE TABLE billing.credit_estimate (
    grant_id bigint  PRIMARY KEY REFERENCES billing.credit_grant,
    drawn    numeric NOT NULL CHECK (drawn >= 0)
);
COMMENT ON TABLE billing.credit_estimate IS 'What usage not settled yet draws from a grant, as computed last';

CREATE TABLE billing.credit_balance (
    account    text    NOT NULL,
    reduces    text    NOT NULL,
    unit       text    NOT NULL,
    overdrawn  numeric NOT NULL,
    uncovered  numeric NOT NULL,
    PRIMARY KEY (account, reduces, unit)
);
COMMENT ON TABLE billing.credit_balance IS 'Usage not settled yet that no grant pays for, as computed last';

-- Alerts -----------------------------------------------------------------------------------------------------------------

CREATE TABLE billing.alert (
    number       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account      text        NOT NULL,
    kind         text        NOT NULL CHECK (kind IN ('pool', 'credits', 'budget')),
    subject      text        NOT NULL,
    unit         text        NOT NULL,
    period_start timestamptz NOT NULL,
    period_end   timestamptz,
    threshold    integer     NOT NULL CHECK (threshold > 0),
    used         numeric     NOT NULL,
    allowed      numeric     NOT NULL,
    hard_stop    boolean     NOT NULL DEFAULT false,
    raised_at    timestamptz NOT NULL DEFAULT now(),
    UNIQUE (account, kind, subject, unit, period_start, threshold)
);
COMMENT ON TABLE billing.alert IS 'Thresholds that were reached, each once per period; append only';
COMMENT ON COLUMN billing.alert.period_start IS 'Start of the billing period; of credits, when the newest grant began to count';
COMMENT ON COLUMN billing.alert.threshold IS 'Per cent of what is allowed';
COMMENT ON COLUMN billing.alert.hard_stop IS 'Whether the account''s services are to stop: all credits and overdraft are used up';

CREATE TABLE billing.alert_outbox (
    number     bigint      PRIMARY KEY REFERENCES billing.alert,
    relayed_at timestamptz
);
CREATE INDEX alert_outbox_unrelayed ON billing.alert_outbox (number) WHERE relayed_at IS NULL;
COMMENT ON TABLE billing.alert_outbox IS 'Alerts on their way to the topic billing.alerts, written in the transaction that raises them';

-- Append only ------------------------------------------------------------------------------------------------------------

CREATE TRIGGER credit_request_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.credit_request
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER credit_grant_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.credit_grant
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER commitment_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.commitment
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER credit_decision_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.credit_decision
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER credit_entry_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.credit_entry
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER overdraft_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.overdraft
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER budget_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.budget
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER alert_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.alert
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

-- The worker that keeps balances asks every second for lines with new usage, which may be a few of millions. By ranges of
-- pages: an index of every line would be written with every batch of the sink, and so would all others of the table.
CREATE INDEX invoice_line_updated ON billing.invoice_line
    USING brin (updated_at) WITH (pages_per_range = 8, autosummarize = on);

-- What counts ------------------------------------------------------------------------------------------------------------

CREATE VIEW billing.credit_request_state AS
SELECT
    request.*,
    coalesce(decision.verdict, 'open') AS verdict,
    decision.decided_by,
    decision.decided_at,
    decision.note AS decision_note,
    void.decided_at AS voided_at
FROM billing.credit_request AS request
LEFT JOIN billing.credit_decision AS decision ON decision.request_id = request.id
LEFT JOIN LATERAL (
    SELECT min(of_void.decided_at) AS decided_at
    FROM billing.credit_request AS asked
    JOIN billing.credit_decision AS of_void ON of_void.request_id = asked.id AND of_void.verdict = 'approved'
    WHERE asked.target_id = request.id
) AS void ON true;
COMMENT ON VIEW billing.credit_request_state IS 'Requests, what was decided on them, and since when what they asked for is void';

CREATE VIEW billing.grant_state AS
SELECT
    given.*,
    request.verdict,
    request.reason_code,
    request.note,
    request.requested_by,
    request.requested_at,
    request.decided_by,
    request.decided_at,
    request.voided_at,
    least(given.expires_at, request.voided_at) AS ends_at,
    coalesce(settled.amount, 0) AS settled,
    coalesce(estimate.drawn, 0) AS estimated,
    CASE
        WHEN request.verdict <> 'approved' THEN request.verdict
        WHEN request.voided_at IS NOT NULL THEN 'void'
        WHEN given.expires_at <= now() THEN 'expired'
        WHEN given.starts_at > now() THEN 'waiting'
        ELSE 'valid'
    END AS state
FROM billing.credit_grant AS given
JOIN billing.credit_request_state AS request ON request.id = given.id
LEFT JOIN billing.credit_estimate AS estimate ON estimate.grant_id = given.id
LEFT JOIN LATERAL (
    SELECT sum(entry.amount) AS amount FROM billing.credit_entry AS entry WHERE entry.grant_id = given.id
) AS settled ON true;
COMMENT ON VIEW billing.grant_state IS 'Grants with what was drawn from them: settled by closed invoices, estimated for open ones';

-- What finance reads -----------------------------------------------------------------------------------------------------

CREATE VIEW finance.credits AS
SELECT
    state.id AS grant_id,
    state.account AS account,
    state.state AS state,
    state.kind AS kind,
    state.reduces AS reduces,
    state.unit AS unit,
    trim_scale(state.amount) AS amount,
    trim_scale(state.settled) AS settled,
    trim_scale(state.estimated) AS estimated,
    trim_scale(state.amount - state.settled - state.estimated) AS remaining,
    state.priority AS priority,
    state.charges AS charges,
    state.starts_at AS starts_at,
    state.ends_at AS ends_at,
    state.reason_code AS reason_code,
    state.note AS note,
    state.requested_by AS requested_by,
    state.requested_at AS requested_at,
    state.decided_by AS decided_by,
    state.decided_at AS decided_at,
    state.rolled_from AS rolled_from
FROM billing.grant_state AS state;
COMMENT ON VIEW finance.credits IS 'Every grant of credits: what it is for, who asked and who approved, what was drawn and what remains';
COMMENT ON COLUMN finance.credits.grant_id IS 'Number of the grant';
COMMENT ON COLUMN finance.credits.account IS 'Account it was given to';
COMMENT ON COLUMN finance.credits.state IS 'open, rejected, waiting (does not count yet), valid, expired or void';
COMMENT ON COLUMN finance.credits.kind IS 'prepaid, promotional, service or correction';
COMMENT ON COLUMN finance.credits.reduces IS 'units: before pricing; net: a discount before tax; total: a payment after tax';
COMMENT ON COLUMN finance.credits.unit IS 'ISO 4217 currency or, of unit credits, what is counted';
COMMENT ON COLUMN finance.credits.amount IS 'What was given';
COMMENT ON COLUMN finance.credits.settled IS 'Drawn for closed invoices';
COMMENT ON COLUMN finance.credits.estimated IS 'Drawn for open invoices, an estimate before tax that the close settles';
COMMENT ON COLUMN finance.credits.remaining IS 'Amount less settled and estimated; of a grant that ended, what was left unused';
COMMENT ON COLUMN finance.credits.priority IS 'Lower numbers are drawn first';
COMMENT ON COLUMN finance.credits.charges IS 'Charges it pays for; empty: all';
COMMENT ON COLUMN finance.credits.starts_at IS 'Pays for usage from this time on, UTC';
COMMENT ON COLUMN finance.credits.ends_at IS 'Pays for usage before this time, UTC; null: no end';
COMMENT ON COLUMN finance.credits.reason_code IS 'Why, as a code';
COMMENT ON COLUMN finance.credits.note IS 'Why, in words';
COMMENT ON COLUMN finance.credits.requested_by IS 'Who asked for it';
COMMENT ON COLUMN finance.credits.requested_at IS 'When, UTC';
COMMENT ON COLUMN finance.credits.decided_by IS 'Who approved or rejected it';
COMMENT ON COLUMN finance.credits.decided_at IS 'When, UTC';
COMMENT ON COLUMN finance.credits.rolled_from IS 'Grant whose balance went on in this one';

CREATE VIEW finance.credit_balances AS
SELECT
    state.account AS account,
    state.reduces AS reduces,
    state.unit AS unit,
    trim_scale(coalesce(sum(state.amount) FILTER (WHERE state.state = 'valid'), 0)) AS granted,
    trim_scale(coalesce(sum(state.settled + state.estimated) FILTER (WHERE state.state = 'valid'), 0)) AS drawn,
    trim_scale(
        coalesce(sum(state.amount - state.settled - state.estimated) FILTER (WHERE state.state = 'valid'), 0)
        - coalesce(min(balance.overdrawn), 0)
    ) AS balance,
    trim_scale(coalesce(min(balance.overdrawn), 0)) AS overdrawn,
    trim_scale(coalesce(min(balance.uncovered), 0)) AS uncovered,
    min(state.ends_at) FILTER (
        WHERE state.state = 'valid' AND state.amount > state.settled + state.estimated
    ) AS next_end_at,
    min(mark.computed_at) AS computed_at
FROM billing.grant_state AS state
LEFT JOIN billing.credit_balance AS balance USING (account, reduces, unit)
LEFT JOIN billing.balance_mark AS mark USING (account)
WHERE state.verdict = 'approved'
GROUP BY state.account, state.reduces, state.unit;
COMMENT ON VIEW finance.credit_balances IS 'What each account has left in credits now: an estimate within seconds of its usage, settled by the close';
COMMENT ON COLUMN finance.credit_balances.account IS 'Account';
COMMENT ON COLUMN finance.credit_balances.reduces IS 'units: before pricing; net: a discount before tax; total: a payment after tax';
COMMENT ON COLUMN finance.credit_balances.unit IS 'ISO 4217 currency or, of unit credits, what is counted';
COMMENT ON COLUMN finance.credit_balances.granted IS 'Sum of the grants that are valid now';
COMMENT ON COLUMN finance.credit_balances.drawn IS 'What was drawn from them, open usage included';
COMMENT ON COLUMN finance.credit_balances.balance IS 'What is left of them, less what is overdrawn; below 0 is a debt';
COMMENT ON COLUMN finance.credit_balances.overdrawn IS 'Used on credit within the overdraft';
COMMENT ON COLUMN finance.credit_balances.uncovered IS 'Open usage that no credits pay for: it will be billed';
COMMENT ON COLUMN finance.credit_balances.next_end_at IS 'When the next of it ends unused, UTC';
COMMENT ON COLUMN finance.credit_balances.computed_at IS 'When usage was last taken into account, UTC';

CREATE VIEW finance.credit_entries AS
SELECT
    entry.id AS entry_id,
    entry.grant_id AS grant_id,
    given.account AS account,
    given.reduces AS reduces,
    given.unit AS unit,
    entry.invoice_id AS invoice_id,
    entry.line_id AS line_id,
    trim_scale(entry.amount) AS amount,
    entry.booked_at AS booked_at,
    entry.booked_by AS booked_by,
    entry.note AS note
FROM billing.credit_entry AS entry
JOIN billing.credit_grant AS given ON given.id = entry.grant_id;
COMMENT ON VIEW finance.credit_entries IS 'Credits drawn for invoices: settled, and linked to grant, invoice and line';
COMMENT ON COLUMN finance.credit_entries.entry_id IS 'Id of the entry';
COMMENT ON COLUMN finance.credit_entries.grant_id IS 'Grant it was drawn from';
COMMENT ON COLUMN finance.credit_entries.account IS 'Account';
COMMENT ON COLUMN finance.credit_entries.reduces IS 'units, net or total';
COMMENT ON COLUMN finance.credit_entries.unit IS 'ISO 4217 currency or, of unit credits, what is counted';
COMMENT ON COLUMN finance.credit_entries.invoice_id IS 'Invoice it was drawn for';
COMMENT ON COLUMN finance.credit_entries.line_id IS 'Line it was drawn for';
COMMENT ON COLUMN finance.credit_entries.amount IS 'Above 0 drawn, below 0 given back';
COMMENT ON COLUMN finance.credit_entries.booked_at IS 'When, UTC';
COMMENT ON COLUMN finance.credit_entries.booked_by IS 'Who booked it';
COMMENT ON COLUMN finance.credit_entries.note IS 'What that person said';

CREATE VIEW finance.commitments AS
SELECT
    commitment.id AS commitment_id,
    commitment.account AS account,
    CASE
        WHEN request.verdict <> 'approved' THEN request.verdict
        WHEN request.voided_at IS NOT NULL THEN 'void'
        WHEN commitment.ends_at <= now() THEN 'ended'
        WHEN commitment.starts_at > now() THEN 'waiting'
        ELSE 'valid'
    END AS state,
    commitment.currency AS currency,
    trim_scale(commitment.amount) AS amount,
    commitment.per AS per,
    commitment.true_up AS true_up,
    trim_scale(commitment.overage_factor) AS overage_factor,
    commitment.charges AS charges,
    commitment.starts_at AS starts_at,
    least(commitment.ends_at, request.voided_at) AS ends_at,
    request.reason_code AS reason_code,
    request.note AS note,
    request.requested_by AS requested_by,
    request.requested_at AS requested_at,
    request.decided_by AS decided_by,
    request.decided_at AS decided_at
FROM billing.commitment
JOIN billing.credit_request_state AS request ON request.id = commitment.id;
COMMENT ON VIEW finance.commitments IS 'What accounts promised to spend, and who agreed to it';
COMMENT ON COLUMN finance.commitments.commitment_id IS 'Number of the commitment';
COMMENT ON COLUMN finance.commitments.account IS 'Account that promised it';
COMMENT ON COLUMN finance.commitments.state IS 'open, rejected, waiting (does not count yet), valid, ended or void';
COMMENT ON COLUMN finance.commitments.currency IS 'ISO 4217 currency';
COMMENT ON COLUMN finance.commitments.amount IS 'To be spent per window';
COMMENT ON COLUMN finance.commitments.per IS 'The window: hour, day, month, year or term';
COMMENT ON COLUMN finance.commitments.true_up IS 'Whether what is missing at a window''s end is charged';
COMMENT ON COLUMN finance.commitments.overage_factor IS 'Price of usage beyond it, as a multiple of its own';
COMMENT ON COLUMN finance.commitments.charges IS 'Charges that count; empty: all';
COMMENT ON COLUMN finance.commitments.starts_at IS 'Counts from this time on, UTC';
COMMENT ON COLUMN finance.commitments.ends_at IS 'Until before this time, UTC; null: no end';
COMMENT ON COLUMN finance.commitments.reason_code IS 'Why, as a code';
COMMENT ON COLUMN finance.commitments.note IS 'Why, in words';
COMMENT ON COLUMN finance.commitments.requested_by IS 'Who asked for it';
COMMENT ON COLUMN finance.commitments.requested_at IS 'When, UTC';
COMMENT ON COLUMN finance.commitments.decided_by IS 'Who approved or rejected it';
COMMENT ON COLUMN finance.commitments.decided_at IS 'When, UTC';

CREATE VIEW finance.alerts AS
SELECT
    alert.number AS alert_id,
    alert.account AS account,
    alert.kind AS kind,
    alert.subject AS subject,
    alert.unit AS unit,
    alert.threshold AS threshold,
    trim_scale(alert.used) AS used,
    trim_scale(alert.allowed) AS allowed,
    alert.hard_stop AS hard_stop,
    alert.period_start AS period_start,
    alert.period_end AS period_end,
    alert.raised_at AS raised_at
FROM billing.alert;
COMMENT ON VIEW finance.alerts IS 'Thresholds of pools, credits and budgets that were reached, each once per period';
COMMENT ON COLUMN finance.alerts.alert_id IS 'Number of the alert, as on billing.alerts';
COMMENT ON COLUMN finance.alerts.account IS 'Account';
COMMENT ON COLUMN finance.alerts.kind IS 'pool (included units), credits or budget';
COMMENT ON COLUMN finance.alerts.subject IS 'Which pool or charge; of credits what they reduce';
COMMENT ON COLUMN finance.alerts.unit IS 'Unit of the pool, or ISO 4217 currency';
COMMENT ON COLUMN finance.alerts.threshold IS 'Per cent of what is allowed';
COMMENT ON COLUMN finance.alerts.used IS 'Used when it was raised';
COMMENT ON COLUMN finance.alerts.allowed IS 'Allowed in the period; of credits, what the valid grants sum up to';
COMMENT ON COLUMN finance.alerts.hard_stop IS 'Whether the account''s services are to stop';
COMMENT ON COLUMN finance.alerts.period_start IS 'Start of the billing period, UTC; of credits, when the newest grant began to count';
COMMENT ON COLUMN finance.alerts.period_end IS 'End of the billing period, exclusive, UTC; null: of credits, that do not end';
COMMENT ON COLUMN finance.alerts.raised_at IS 'When it was raised, UTC';
