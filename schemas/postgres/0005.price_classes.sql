-- What a line's amount is worth before the close: by its charge's price class, it is final or provisional.

CREATE TYPE billing.price_class AS ENUM ('running', 'per_event', 'period');
COMMENT ON TYPE billing.price_class IS 'What amounts of the stream are worth, the surest first. running: the price of an additive quantity; per_event: each event''s own price; period: estimates, until the close prices the whole period';

ALTER TABLE billing.invoice_line ADD COLUMN price_class billing.price_class NOT NULL DEFAULT 'running';
COMMENT ON COLUMN billing.invoice_line.price_class IS 'The least sure class that any of its rows came with: a contract that ends early may make a charge that was running one of the whole period';
COMMENT ON COLUMN billing.invoice_line.quantity IS 'Sum of quantity_after - quantity_before of its rows: what they moved their counters by, so the maximum of a maximum, not a sum of maxima';

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
    trim_scale(coalesce(sum(line.amount) FILTER (WHERE line.price_class = 'period'), 0)) AS provisional_amount
FROM billing.invoice
LEFT JOIN billing.currency ON currency.code = invoice.currency
LEFT JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.state = 'open'
GROUP BY invoice.id;
COMMENT ON COLUMN finance.open_invoices.provisional_amount IS 'Part of exact_amount that is an estimate until the close';

CREATE OR REPLACE VIEW finance.invoice_lines AS
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
    line.updated_at AS updated_at,
    line.price_class::text AS price_class,
    line.price_class = 'period' AND invoice.state = 'open' AS provisional
FROM billing.invoice_line AS line
JOIN billing.invoice ON invoice.id = line.invoice_id
LEFT JOIN billing.currency ON currency.code = invoice.currency;
COMMENT ON COLUMN finance.invoice_lines.quantity IS 'Quantity in the meter''s unit, exact; of a meter that is no sum, what it measured over the line''s time so far';
COMMENT ON COLUMN finance.invoice_lines.price_class IS 'running: price of an additive quantity; per_event: each event''s own price; period: priced at the close';
COMMENT ON COLUMN finance.invoice_lines.provisional IS 'Whether quantity and amounts are estimates that the close will set right';

CREATE OR REPLACE VIEW finance.rated_usage AS
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
    usage.event_month AS event_month,
    line.price_class::text AS price_class,
    line.price_class = 'period' AND invoice.state = 'open' AS provisional
FROM billing.rated_usage AS usage
JOIN billing.invoice_line AS line ON line.id = usage.line_id
JOIN billing.invoice ON invoice.id = line.invoice_id;
COMMENT ON COLUMN finance.rated_usage.cell IS 'Dimension cell of the charge: the values of its dimensions joined by commas; empty where it has none';
COMMENT ON COLUMN finance.rated_usage.quantity_before IS 'Running quantity before the event; of a meter that is no sum, what it measured so far';
COMMENT ON COLUMN finance.rated_usage.exact_amount IS 'What the event adds, exact: the difference its quantity makes to the price, its own price, or an estimate of class period';
COMMENT ON COLUMN finance.rated_usage.price_class IS 'running: price of an additive quantity; per_event: each event''s own price; period: priced at the close';
COMMENT ON COLUMN finance.rated_usage.provisional IS 'Whether the amount is an estimate that the close will set right';
