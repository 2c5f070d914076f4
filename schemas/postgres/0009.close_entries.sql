-- Close entries: what the close, or a re-rating of an open period, books on a line beside its rated rows, so that rows +
-- entries = the closing price. Never changed: a later difference is a later entry.

CREATE TABLE billing.close_entry (
    id              bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    line_id         bigint      NOT NULL REFERENCES billing.invoice_line,
    reasons         text[]      NOT NULL CHECK (cardinality(reasons) > 0),
    quantity_before numeric     NOT NULL,
    quantity_after  numeric     NOT NULL,
    amount_before   numeric     NOT NULL,
    amount_after    numeric     NOT NULL,
    quantity        numeric     GENERATED ALWAYS AS (quantity_after - quantity_before) STORED,
    amount          numeric     GENERATED ALWAYS AS (amount_after - amount_before) STORED,
    booked_at       timestamptz NOT NULL DEFAULT now(),
    booked_by       text        NOT NULL,
    note            text        NOT NULL DEFAULT '',
    CHECK (quantity_after <> quantity_before OR amount_after <> amount_before)
);
CREATE INDEX close_entry_line ON billing.close_entry (line_id);
COMMENT ON TABLE billing.close_entry IS 'Differences between what a line held (rows and earlier entries) and its closing price; append only. The line''s own quantity and amount hold them too';
COMMENT ON COLUMN billing.close_entry.reasons IS 'Why they differ: words of pipeline.billing.close_entries.Cause';
COMMENT ON COLUMN billing.close_entry.note IS 'What the person who booked it said';
CREATE TRIGGER close_entry_append_only BEFORE UPDATE OR DELETE ON billing.close_entry
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER close_entry_no_truncate BEFORE TRUNCATE ON billing.close_entry
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

CREATE VIEW billing.re_rated_period AS
SELECT DISTINCT invoice.account, invoice.period_start, invoice.period_end, invoice.state
FROM billing.close_entry AS entry
JOIN billing.invoice_line AS line ON line.id = entry.line_id
JOIN billing.invoice ON invoice.id = line.invoice_id
WHERE 'back_dated' = ANY(entry.reasons);
COMMENT ON VIEW billing.re_rated_period IS 'Periods in which usage was moved between lines by a back-dated price or contract: rows stand where they were rated, so only rows and entries together tell what a line holds';

CREATE VIEW finance.close_entries AS
SELECT
    entry.id AS entry_id,
    entry.line_id AS line_id,
    line.invoice_id AS invoice_id,
    invoice.account AS account,
    invoice.currency AS currency,
    invoice.period_start AS period_start,
    invoice.period_end AS period_end,
    line.charge AS charge,
    line.cell AS cell,
    line.price_version AS price_version,
    entry.reasons AS reasons,
    trim_scale(entry.quantity_before) AS quantity_before,
    trim_scale(entry.quantity_after) AS quantity_after,
    trim_scale(entry.quantity) AS quantity,
    trim_scale(entry.amount_before) AS amount_before,
    trim_scale(entry.amount_after) AS amount_after,
    trim_scale(entry.amount) AS exact_amount,
    entry.booked_at AS booked_at,
    entry.booked_by AS booked_by,
    entry.note AS note
FROM billing.close_entry AS entry
JOIN billing.invoice_line AS line ON line.id = entry.line_id
JOIN billing.invoice ON invoice.id = line.invoice_id;
COMMENT ON VIEW finance.close_entries IS 'What was booked on lines beside their events, and why: a line''s events and entries add up to it';
COMMENT ON COLUMN finance.close_entries.entry_id IS 'Id of the entry';
COMMENT ON COLUMN finance.close_entries.line_id IS 'Line it is on';
COMMENT ON COLUMN finance.close_entries.invoice_id IS 'Invoice it is on';
COMMENT ON COLUMN finance.close_entries.account IS 'Account to be billed';
COMMENT ON COLUMN finance.close_entries.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.close_entries.period_start IS 'Start of the billing period, inclusive, UTC';
COMMENT ON COLUMN finance.close_entries.period_end IS 'End of the billing period, exclusive, UTC';
COMMENT ON COLUMN finance.close_entries.charge IS 'Charge of the plan';
COMMENT ON COLUMN finance.close_entries.cell IS 'Dimension cell of the charge; empty where it has no dimensions';
COMMENT ON COLUMN finance.close_entries.price_version IS 'Where the line''s price comes from';
COMMENT ON COLUMN finance.close_entries.reasons IS 'Why the line differed from its closing price';
COMMENT ON COLUMN finance.close_entries.quantity_before IS 'Quantity of the line before';
COMMENT ON COLUMN finance.close_entries.quantity_after IS 'Quantity of the line after';
COMMENT ON COLUMN finance.close_entries.quantity IS 'What it added to the line''s quantity';
COMMENT ON COLUMN finance.close_entries.amount_before IS 'Exact amount of the line before: its events and earlier entries';
COMMENT ON COLUMN finance.close_entries.amount_after IS 'Exact amount of the line after: the closing price';
COMMENT ON COLUMN finance.close_entries.exact_amount IS 'What it added to the line''s amount, exact';
COMMENT ON COLUMN finance.close_entries.booked_at IS 'When it was booked, UTC';
COMMENT ON COLUMN finance.close_entries.booked_by IS 'Who booked it';
COMMENT ON COLUMN finance.close_entries.note IS 'What that person said';

COMMENT ON VIEW finance.line_events IS 'The events behind a line, for WHERE line_id = …: their exact amounts and those of its close entries add up to the line''s';
COMMENT ON COLUMN finance.invoice_lines.exact_amount IS 'Sum of its rows and close entries, exact, before any rounding';
COMMENT ON COLUMN finance.invoice_lines.quantity IS 'Quantity in the meter''s unit, exact, of its rows and close entries';
