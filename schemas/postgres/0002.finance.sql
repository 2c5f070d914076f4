-- What finance reads: views with stable names, and a role that can read them and nothing else. Amounts are exact unless
-- a column says rounded; times are UTC.

CREATE TABLE billing.currency (
    code        text     PRIMARY KEY,
    minor_units smallint NOT NULL CHECK (minor_units BETWEEN 0 AND 4)
);
COMMENT ON TABLE billing.currency IS 'ISO 4217 currencies and the decimals of their smallest unit; same list as pipeline.core.money';
INSERT INTO billing.currency (code, minor_units) VALUES
    ('AED', 2), ('AFN', 2), ('ALL', 2), ('AMD', 2), ('AOA', 2), ('ARS', 2), ('AUD', 2), ('AWG', 2), ('AZN', 2),
    ('BAM', 2), ('BBD', 2), ('BDT', 2), ('BGN', 2), ('BHD', 3), ('BIF', 0), ('BMD', 2), ('BND', 2), ('BOB', 2),
    ('BOV', 2), ('BRL', 2), ('BSD', 2), ('BTN', 2), ('BWP', 2), ('BYN', 2), ('BZD', 2), ('CAD', 2), ('CDF', 2),
    ('CHE', 2), ('CHF', 2), ('CHW', 2), ('CLF', 4), ('CLP', 0), ('CNY', 2), ('COP', 2), ('COU', 2), ('CRC', 2),
    ('CUP', 2), ('CVE', 2), ('CZK', 2), ('DJF', 0), ('DKK', 2), ('DOP', 2), ('DZD', 2), ('EGP', 2), ('ERN', 2),
    ('ETB', 2), ('EUR', 2), ('FJD', 2), ('FKP', 2), ('GBP', 2), ('GEL', 2), ('GHS', 2), ('GIP', 2), ('GMD', 2),
    ('GNF', 0), ('GTQ', 2), ('GYD', 2), ('HKD', 2), ('HNL', 2), ('HTG', 2), ('HUF', 2), ('IDR', 2), ('ILS', 2),
    ('INR', 2), ('IQD', 3), ('IRR', 2), ('ISK', 0), ('JMD', 2), ('JOD', 3), ('JPY', 0), ('KES', 2), ('KGS', 2),
    ('KHR', 2), ('KMF', 0), ('KPW', 2), ('KRW', 0), ('KWD', 3), ('KYD', 2), ('KZT', 2), ('LAK', 2), ('LBP', 2),
    ('LKR', 2), ('LRD', 2), ('LSL', 2), ('LYD', 3), ('MAD', 2), ('MDL', 2), ('MGA', 2), ('MKD', 2), ('MMK', 2),
    ('MNT', 2), ('MOP', 2), ('MRU', 2), ('MUR', 2), ('MVR', 2), ('MWK', 2), ('MXN', 2), ('MXV', 2), ('MYR', 2),
    ('MZN', 2), ('NAD', 2), ('NGN', 2), ('NIO', 2), ('NOK', 2), ('NPR', 2), ('NZD', 2), ('OMR', 3), ('PAB', 2),
    ('PEN', 2), ('PGK', 2), ('PHP', 2), ('PKR', 2), ('PLN', 2), ('PYG', 0), ('QAR', 2), ('RON', 2), ('RSD', 2),
    ('RUB', 2), ('RWF', 0), ('SAR', 2), ('SBD', 2), ('SCR', 2), ('SDG', 2), ('SEK', 2), ('SGD', 2), ('SHP', 2),
    ('SLE', 2), ('SOS', 2), ('SRD', 2), ('SSP', 2), ('STN', 2), ('SVC', 2), ('SYP', 2), ('SZL', 2), ('THB', 2),
    ('TJS', 2), ('TMT', 2), ('TND', 3), ('TOP', 2), ('TRY', 2), ('TTD', 2), ('TWD', 2), ('TZS', 2), ('UAH', 2),
    ('UGX', 0), ('USD', 2), ('USN', 2), ('UYI', 0), ('UYU', 2), ('UYW', 4), ('UZS', 2), ('VED', 2), ('VES', 2),
    ('VND', 0), ('VUV', 0), ('WST', 2), ('XAF', 0), ('XCD', 2), ('XCG', 2), ('XOF', 0), ('XPF', 0), ('YER', 2),
    ('ZAR', 2), ('ZMW', 2), ('ZWG', 2);

-- For line_events and tally explain: without it each line would read its whole month.
CREATE INDEX rated_usage_line ON billing.rated_usage (line_id);

CREATE SCHEMA finance;
COMMENT ON SCHEMA finance IS 'What finance reads; names of views and columns are stable';

CREATE VIEW finance.open_invoices AS
SELECT
    invoice.id AS invoice_id,
    invoice.account AS account,
    invoice.currency AS currency,
    invoice.period_start AS period_start,
    invoice.period_end AS period_end,
    count(line.id) AS lines,
    coalesce(sum(line.events), 0) AS events,
    trim_scale(coalesce(sum(line.amount), 0)) AS exact_amount,
    coalesce(sum(round(line.amount, currency.minor_units)), 0) AS rounded_amount,
    min(line.first_event_at) AS first_event_at,
    max(line.last_event_at) AS last_event_at,
    max(line.updated_at) AS updated_at
FROM billing.invoice
LEFT JOIN billing.currency ON currency.code = invoice.currency
LEFT JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.state = 'open'
GROUP BY invoice.id;
COMMENT ON VIEW finance.open_invoices IS 'Usage so far of every account and period that is not closed: the invoices to come';
COMMENT ON COLUMN finance.open_invoices.invoice_id IS 'Id of the invoice';
COMMENT ON COLUMN finance.open_invoices.account IS 'Account to be billed';
COMMENT ON COLUMN finance.open_invoices.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.open_invoices.period_start IS 'Start of the billing period, inclusive, UTC';
COMMENT ON COLUMN finance.open_invoices.period_end IS 'End of the billing period, exclusive, UTC';
COMMENT ON COLUMN finance.open_invoices.lines IS 'Lines so far';
COMMENT ON COLUMN finance.open_invoices.events IS 'Rated events so far; an event counts once for each charge that prices it';
COMMENT ON COLUMN finance.open_invoices.exact_amount IS 'Sum of the lines, exact, before any rounding';
COMMENT ON COLUMN finance.open_invoices.rounded_amount IS 'Sum of the lines, each rounded half up (away from zero) to the currency''s minor unit: what would be billed now';
COMMENT ON COLUMN finance.open_invoices.first_event_at IS 'Time of the earliest event, UTC';
COMMENT ON COLUMN finance.open_invoices.last_event_at IS 'Time of the latest event, UTC';
COMMENT ON COLUMN finance.open_invoices.updated_at IS 'When usage was last added, UTC';

CREATE VIEW finance.invoice_lines AS
SELECT
    line.id AS line_id,
    line.invoice_id AS invoice_id,
    invoice.account AS account,
    invoice.currency AS currency,
    invoice.period_start AS period_start,
    invoice.period_end AS period_end,
    invoice.state::text AS invoice_state,
    line.contract AS contract,
    line.plan AS plan,
    line.plan_version AS plan_version,
    line.price_version AS price_version,
    line.meter AS meter,
    line.meter_version AS meter_version,
    line.charge AS charge,
    line.segment_start AS segment_start,
    line.cell AS cell,
    trim_scale(line.quantity) AS quantity,
    trim_scale(line.amount) AS exact_amount,
    round(line.amount, currency.minor_units) AS rounded_amount,
    trim_scale(round(line.amount, currency.minor_units) - line.amount) AS rounding_difference,
    line.events AS events,
    line.late_events AS late_events,
    line.first_event_at AS first_event_at,
    line.last_event_at AS last_event_at,
    line.reference_values AS reference_values,
    line.updated_at AS updated_at
FROM billing.invoice_line AS line
JOIN billing.invoice ON invoice.id = line.invoice_id
LEFT JOIN billing.currency ON currency.code = invoice.currency;
COMMENT ON VIEW finance.invoice_lines IS 'Every line of every invoice: one charge of one contract under one version of its prices';
COMMENT ON COLUMN finance.invoice_lines.line_id IS 'Id of the line; tally explain line:ID shows its arithmetic';
COMMENT ON COLUMN finance.invoice_lines.invoice_id IS 'Invoice the line is on';
COMMENT ON COLUMN finance.invoice_lines.account IS 'Account to be billed';
COMMENT ON COLUMN finance.invoice_lines.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.invoice_lines.period_start IS 'Start of the billing period, inclusive, UTC';
COMMENT ON COLUMN finance.invoice_lines.period_end IS 'End of the billing period, exclusive, UTC';
COMMENT ON COLUMN finance.invoice_lines.invoice_state IS 'State of the invoice: open, draft, reviewed, issued or void';
COMMENT ON COLUMN finance.invoice_lines.contract IS 'Contract in force';
COMMENT ON COLUMN finance.invoice_lines.plan IS 'Plan of the contract';
COMMENT ON COLUMN finance.invoice_lines.plan_version IS 'Version of the plan';
COMMENT ON COLUMN finance.invoice_lines.price_version IS 'Where the price comes from, as document@version';
COMMENT ON COLUMN finance.invoice_lines.meter IS 'Meter that gave the quantities';
COMMENT ON COLUMN finance.invoice_lines.meter_version IS 'Version of the meter';
COMMENT ON COLUMN finance.invoice_lines.charge IS 'Charge of the plan';
COMMENT ON COLUMN finance.invoice_lines.segment_start IS 'Start of the part of the period with one contract, plan and price version, UTC; tiers count from here';
COMMENT ON COLUMN finance.invoice_lines.cell IS 'Dimension cell of the charge; empty where it has no dimensions';
COMMENT ON COLUMN finance.invoice_lines.quantity IS 'Quantity in the meter''s unit, exact';
COMMENT ON COLUMN finance.invoice_lines.exact_amount IS 'Sum of its rows, exact, before any rounding';
COMMENT ON COLUMN finance.invoice_lines.rounded_amount IS 'Exact amount rounded half up (away from zero) to the currency''s minor unit: what would be billed now';
COMMENT ON COLUMN finance.invoice_lines.rounding_difference IS 'Rounded amount minus exact amount';
COMMENT ON COLUMN finance.invoice_lines.events IS 'Events on the line';
COMMENT ON COLUMN finance.invoice_lines.late_events IS 'Of these, events that arrived after their period ended';
COMMENT ON COLUMN finance.invoice_lines.first_event_at IS 'Time of the earliest event, UTC';
COMMENT ON COLUMN finance.invoice_lines.last_event_at IS 'Time of the latest event, UTC';
COMMENT ON COLUMN finance.invoice_lines.reference_values IS 'Values of the charge''s reference properties (order numbers, file names), the first 20 of each: {property: {"values": […], "more": whether others came}}';
COMMENT ON COLUMN finance.invoice_lines.updated_at IS 'When usage was last added, UTC';

CREATE VIEW finance.rated_usage AS
SELECT
    line.invoice_id AS invoice_id,
    usage.line_id AS line_id,
    usage.account AS account,
    usage.event_time AS event_time,
    usage.idempotency_key AS idempotency_key,
    usage.event_type AS event_type,
    usage.subject AS subject,
    usage.properties AS properties,
    usage.source AS source,
    usage.sequence AS sequence,
    usage.charge AS charge,
    usage.cell AS cell,
    usage.entry AS entry,
    usage.kind::text AS kind,
    trim_scale(usage.quantity) AS quantity,
    trim_scale(usage.quantity_before) AS quantity_before,
    trim_scale(usage.quantity_after) AS quantity_after,
    trim_scale(usage.amount) AS exact_amount,
    usage.late AS late,
    invoice.currency AS currency,
    invoice.period_start AS period_start,
    invoice.period_end AS period_end,
    line.segment_start AS segment_start,
    line.contract AS contract,
    line.plan AS plan,
    line.plan_version AS plan_version,
    line.price_version AS price_version,
    line.meter AS meter,
    line.meter_version AS meter_version,
    usage.appended_at AS arrived_at,
    usage.origin_partition AS origin_partition,
    usage.origin_offset AS origin_offset,
    usage.rated_partition AS rated_partition,
    usage.rated_offset AS rated_offset,
    usage.catalog_offset AS catalog_offset,
    usage.identity AS identity,
    usage.event_month AS event_month
FROM billing.rated_usage AS usage
JOIN billing.invoice_line AS line ON line.id = usage.line_id
JOIN billing.invoice ON invoice.id = line.invoice_id;
COMMENT ON VIEW finance.rated_usage IS 'Every rated row with its full lineage: the event as sent, where it arrived, what priced it, the line and invoice it is on';
COMMENT ON COLUMN finance.rated_usage.invoice_id IS 'Invoice it is on';
COMMENT ON COLUMN finance.rated_usage.line_id IS 'Line it is on';
COMMENT ON COLUMN finance.rated_usage.account IS 'Account to be billed';
COMMENT ON COLUMN finance.rated_usage.event_time IS 'When the use happened, UTC';
COMMENT ON COLUMN finance.rated_usage.idempotency_key IS 'Names the event inside its account; tally explain ACCOUNT/KEY shows it';
COMMENT ON COLUMN finance.rated_usage.event_type IS 'What happened';
COMMENT ON COLUMN finance.rated_usage.subject IS 'Who inside the account';
COMMENT ON COLUMN finance.rated_usage.properties IS 'Measures and dimensions as sent';
COMMENT ON COLUMN finance.rated_usage.source IS 'Service instance that sent the event';
COMMENT ON COLUMN finance.rated_usage.sequence IS 'Its number among that source''s events; 0 is unknown';
COMMENT ON COLUMN finance.rated_usage.charge IS 'Charge of the plan that priced it';
COMMENT ON COLUMN finance.rated_usage.cell IS 'Dimension cell of the charge; empty where it has no dimensions';
COMMENT ON COLUMN finance.rated_usage.entry IS 'Entry number of the event and charge: 0 for the usage itself, higher for what corrects it';
COMMENT ON COLUMN finance.rated_usage.kind IS 'What the entry is: usage, void or correction';
COMMENT ON COLUMN finance.rated_usage.quantity IS 'Quantity of the event in the meter''s unit';
COMMENT ON COLUMN finance.rated_usage.quantity_before IS 'Running quantity before the event';
COMMENT ON COLUMN finance.rated_usage.quantity_after IS 'Running quantity after the event';
COMMENT ON COLUMN finance.rated_usage.exact_amount IS 'Price of the quantity after minus price of the quantity before, exact';
COMMENT ON COLUMN finance.rated_usage.late IS 'Whether the event arrived after its period ended';
COMMENT ON COLUMN finance.rated_usage.currency IS 'ISO 4217 currency of the amount';
COMMENT ON COLUMN finance.rated_usage.period_start IS 'Start of the billing period, inclusive, UTC';
COMMENT ON COLUMN finance.rated_usage.period_end IS 'End of the billing period, exclusive, UTC';
COMMENT ON COLUMN finance.rated_usage.segment_start IS 'Start of the part of the period that its running quantity counts from, UTC';
COMMENT ON COLUMN finance.rated_usage.contract IS 'Contract in force';
COMMENT ON COLUMN finance.rated_usage.plan IS 'Plan of the contract';
COMMENT ON COLUMN finance.rated_usage.plan_version IS 'Version of the plan';
COMMENT ON COLUMN finance.rated_usage.price_version IS 'Where the price comes from, as document@version';
COMMENT ON COLUMN finance.rated_usage.meter IS 'Meter that gave the quantities';
COMMENT ON COLUMN finance.rated_usage.meter_version IS 'Version of the meter';
COMMENT ON COLUMN finance.rated_usage.arrived_at IS 'When the broker took the event in, UTC';
COMMENT ON COLUMN finance.rated_usage.origin_partition IS 'Partition of usage.events it arrived on';
COMMENT ON COLUMN finance.rated_usage.origin_offset IS 'Offset it arrived at';
COMMENT ON COLUMN finance.rated_usage.rated_partition IS 'Partition of usage.rated its rated row stands on';
COMMENT ON COLUMN finance.rated_usage.rated_offset IS 'Offset of its rated row';
COMMENT ON COLUMN finance.rated_usage.catalog_offset IS 'Catalog offset it was rated at; rating again at it gives the same bytes';
COMMENT ON COLUMN finance.rated_usage.identity IS '128-bit hash of account and idempotency key: what makes the row unique';
COMMENT ON COLUMN finance.rated_usage.event_month IS 'First day of the month of the event, UTC; name it in conditions on large tables';

CREATE VIEW finance.line_events AS
SELECT
    usage.line_id AS line_id,
    usage.event_time AS event_time,
    usage.idempotency_key AS idempotency_key,
    usage.event_type AS event_type,
    usage.subject AS subject,
    usage.properties AS properties,
    usage.entry AS entry,
    usage.kind::text AS kind,
    trim_scale(usage.quantity) AS quantity,
    trim_scale(usage.quantity_before) AS quantity_before,
    trim_scale(usage.quantity_after) AS quantity_after,
    trim_scale(usage.amount) AS exact_amount,
    usage.late AS late,
    usage.appended_at AS arrived_at,
    usage.origin_partition || '/' || usage.origin_offset AS origin
FROM billing.rated_usage AS usage;
COMMENT ON VIEW finance.line_events IS 'The events behind a line, for WHERE line_id = …: their exact amounts add up to the line''s';
COMMENT ON COLUMN finance.line_events.line_id IS 'Line they are on';
COMMENT ON COLUMN finance.line_events.event_time IS 'When the use happened, UTC';
COMMENT ON COLUMN finance.line_events.idempotency_key IS 'Names the event inside its account; tally explain ACCOUNT/KEY shows it';
COMMENT ON COLUMN finance.line_events.event_type IS 'What happened';
COMMENT ON COLUMN finance.line_events.subject IS 'Who inside the account';
COMMENT ON COLUMN finance.line_events.properties IS 'Measures and dimensions as sent';
COMMENT ON COLUMN finance.line_events.entry IS 'Entry number of the event and charge: 0 for the usage itself, higher for what corrects it';
COMMENT ON COLUMN finance.line_events.kind IS 'What the entry is: usage, void or correction';
COMMENT ON COLUMN finance.line_events.quantity IS 'Quantity of the event in the meter''s unit';
COMMENT ON COLUMN finance.line_events.quantity_before IS 'Running quantity before the event';
COMMENT ON COLUMN finance.line_events.quantity_after IS 'Running quantity after the event';
COMMENT ON COLUMN finance.line_events.exact_amount IS 'Price of the quantity after minus price of the quantity before, exact';
COMMENT ON COLUMN finance.line_events.late IS 'Whether the event arrived after its period ended';
COMMENT ON COLUMN finance.line_events.arrived_at IS 'When the broker took the event in, UTC';
COMMENT ON COLUMN finance.line_events.origin IS 'Partition and offset of usage.events it arrived at';

CREATE VIEW finance.unrated_usage AS
SELECT
    unrated.origin_topic || '/' || unrated.origin_partition || '/' || unrated.origin_offset AS origin,
    unrated.state::text AS state,
    unrated.reason AS reason,
    unrated.message AS message,
    unrated.stage AS stage,
    unrated.account AS account,
    unrated.idempotency_key AS idempotency_key,
    unrated.event_type AS event_type,
    unrated.event_time AS event_time,
    unrated.appended_at AS arrived_at,
    now() - unrated.appended_at AS age,
    unrated.attempts AS attempts,
    unrated.replays AS replays,
    unrated.not_before AS next_attempt_at,
    unrated.decision AS decision,
    unrated.decided_at AS decided_at,
    unrated.decided_by AS decided_by,
    unrated.decision_reason AS decision_reason
FROM billing.unrated_event AS unrated
WHERE unrated.state IN ('parked', 'dead_lettered');
COMMENT ON VIEW finance.unrated_usage IS 'Usage that is not billed: parked (tried again by itself) or dead-lettered (waits for a person)';
COMMENT ON COLUMN finance.unrated_usage.origin IS 'Where it arrived; tally explain ORIGIN shows it';
COMMENT ON COLUMN finance.unrated_usage.state IS 'parked or dead_lettered';
COMMENT ON COLUMN finance.unrated_usage.reason IS 'The rule it broke';
COMMENT ON COLUMN finance.unrated_usage.message IS 'What was expected, what came';
COMMENT ON COLUMN finance.unrated_usage.stage IS 'Stage that refused it';
COMMENT ON COLUMN finance.unrated_usage.account IS 'Account, where it could be read';
COMMENT ON COLUMN finance.unrated_usage.idempotency_key IS 'Idempotency key, where it could be read';
COMMENT ON COLUMN finance.unrated_usage.event_type IS 'Event type, where it could be read';
COMMENT ON COLUMN finance.unrated_usage.event_time IS 'When the use happened, UTC, where it could be read';
COMMENT ON COLUMN finance.unrated_usage.arrived_at IS 'When the broker took it in, UTC';
COMMENT ON COLUMN finance.unrated_usage.age IS 'Time since it arrived';
COMMENT ON COLUMN finance.unrated_usage.attempts IS 'Times it was tried';
COMMENT ON COLUMN finance.unrated_usage.replays IS 'Times a person replayed it';
COMMENT ON COLUMN finance.unrated_usage.next_attempt_at IS 'Parked: not tried again before, UTC';
COMMENT ON COLUMN finance.unrated_usage.decision IS 'What a person decided: replay or discard';
COMMENT ON COLUMN finance.unrated_usage.decided_at IS 'When, UTC';
COMMENT ON COLUMN finance.unrated_usage.decided_by IS 'Who';
COMMENT ON COLUMN finance.unrated_usage.decision_reason IS 'Why';

CREATE VIEW finance.quarantined_usage AS
SELECT
    quarantine.id AS id,
    quarantine.reason AS reason,
    quarantine.account AS account,
    quarantine.charge AS charge,
    quarantine.identity AS identity,
    quarantine.rated_topic AS topic,
    quarantine.rated_partition AS partition,
    quarantine.rated_offset AS "offset",
    quarantine.at AS quarantined_at
FROM billing.quarantine;
COMMENT ON VIEW finance.quarantined_usage IS 'What the sink put aside instead of billing it, each with its reason; nothing here is on an invoice';
COMMENT ON COLUMN finance.quarantined_usage.id IS 'Id of the entry';
COMMENT ON COLUMN finance.quarantined_usage.reason IS 'already_billed, period_closed, undecodable or already_receipted';
COMMENT ON COLUMN finance.quarantined_usage.account IS 'Account, where it could be read';
COMMENT ON COLUMN finance.quarantined_usage.charge IS 'Charge, where it could be read';
COMMENT ON COLUMN finance.quarantined_usage.identity IS 'Hash of account and idempotency key, as in rated_usage; null where unreadable';
COMMENT ON COLUMN finance.quarantined_usage.topic IS 'Topic the message stands on';
COMMENT ON COLUMN finance.quarantined_usage.partition IS 'Its partition';
COMMENT ON COLUMN finance.quarantined_usage."offset" IS 'Its offset';
COMMENT ON COLUMN finance.quarantined_usage.quarantined_at IS 'When it was put aside, UTC';

-- Roles belong to the whole server: another database may have made it already. Grant it to a login of your own.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tally_finance') THEN
        CREATE ROLE tally_finance NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL; -- another database's migration made it at this moment
END $$;
GRANT USAGE ON SCHEMA finance TO tally_finance;
GRANT SELECT ON ALL TABLES IN SCHEMA finance TO tally_finance;
ALTER DEFAULT PRIVILEGES IN SCHEMA finance GRANT SELECT ON TABLES TO tally_finance;
