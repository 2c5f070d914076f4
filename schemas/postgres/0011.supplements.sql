-- Usage that comes after its period was closed: a further container of the same period takes it, beside the closed one,
-- and the account's next document bills the difference that it makes.

ALTER TABLE billing.invoice ADD COLUMN supplement integer NOT NULL DEFAULT 0 CHECK (supplement >= 0);
ALTER TABLE billing.invoice DROP CONSTRAINT invoice_account_currency_period_start_period_end_key;
ALTER TABLE billing.invoice ADD UNIQUE (account, currency, period_start, period_end, supplement);
COMMENT ON TABLE billing.invoice IS 'Usage of an account, currency and period, collected until the close; what comes later stands in a supplement. What a customer gets is a billing.document';
COMMENT ON COLUMN billing.invoice.supplement IS '0: the period''s own; from 1 on: usage that came after the one before was closed';
COMMENT ON COLUMN billing.quarantine.reason IS 'already_billed: the event has this row already; undecodable: not a record of its topic; already_receipted: a second receipt for the same offsets; period_closed: of sinks that knew no supplements, its invoice was not open';

CREATE OR REPLACE VIEW finance.open_invoices AS
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
    max(line.updated_at) AS updated_at,
    trim_scale(coalesce(sum(line.amount) FILTER (WHERE line.price_class = 'period'), 0)) AS provisional_amount,
    invoice.supplement AS supplement
FROM billing.invoice
LEFT JOIN billing.currency ON currency.code = invoice.currency
LEFT JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.state = 'open'
GROUP BY invoice.id;
COMMENT ON COLUMN finance.quarantined_usage.reason IS 'already_billed, undecodable or already_receipted; period_closed: of sinks that knew no supplements';
COMMENT ON COLUMN finance.open_invoices.supplement IS '0: usage of a period that is open; from 1 on: usage that came after its period was closed, to be billed as an adjustment';

ALTER TABLE billing.credit_entry ADD COLUMN document_id bigint REFERENCES billing.document;
CREATE INDEX credit_entry_document ON billing.credit_entry (document_id) WHERE document_id IS NOT NULL;
COMMENT ON COLUMN billing.credit_entry.document_id IS 'The document it paid for or, below 0, whose credit note or void gave it back';
