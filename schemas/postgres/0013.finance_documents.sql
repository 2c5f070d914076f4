-- What finance reads of documents: invoices, credit notes, adjustments, their lines and taxes, what is still to bill, to
-- be paid and to be carried forward, the numbers and the closes; and whether it all adds up. Columns are only ever
-- added, at the end; what means something else becomes another view. finance.columns is the list of them all.
-- Money of documents is in whole units of the currency, rounded to its smallest unit; exact amounts are before rounding.

-- Documents -----------------------------------------------------------------------------------------------------------

CREATE VIEW finance.invoices AS
SELECT
    document.id AS document_id,
    document.kind::text AS kind,
    document.state::text AS state,
    document.number AS number,
    document.legal_entity AS legal_entity,
    document.account AS account,
    document.content -> 'buyer' ->> 'name' AS customer,
    document.currency AS currency,
    document.period_start AS period_start,
    document.period_end AS period_end,
    document.issue_date AS issue_date,
    document.tax_date AS tax_date,
    document.due_date AS due_date,
    document.lines_amount AS lines_amount,
    document.discounts_amount AS discounts_amount,
    document.net_amount AS net_amount,
    document.tax_amount AS tax_amount,
    document.total_amount AS total_amount,
    document.credits_amount AS credits_amount,
    document.balance_amount AS balance_amount,
    document.payable_amount AS payable_amount,
    payment.state AS payment_state,
    payment.open_amount AS open_amount,
    document.fx_currency AS fx_currency,
    document.fx_rate AS fx_rate,
    document.fx_date AS fx_date,
    document.fx_source AS fx_source,
    document.fx_net_amount AS fx_net_amount,
    document.fx_tax_amount AS fx_tax_amount,
    document.fx_total_amount AS fx_total_amount,
    document.corrects_id AS corrects_document_id,
    corrected.number AS corrects_number,
    document.reason_code AS reason_code,
    document.note AS note,
    document.created_at AS created_at,
    document.created_by AS created_by,
    document.reviewed_at AS reviewed_at,
    document.reviewed_by AS reviewed_by,
    document.issued_at AS issued_at,
    document.issued_by AS issued_by,
    document.voided_at AS voided_at,
    document.voided_by AS voided_by,
    document.void_reason_code AS void_reason_code,
    document.void_note AS void_note
FROM billing.document
LEFT JOIN billing.document AS corrected ON corrected.id = document.corrects_id
LEFT JOIN billing.document_payment AS payment ON payment.document_id = document.id;
COMMENT ON VIEW finance.invoices IS 'Every document: invoices, credit notes, adjustments and bills within a period, drafts and void ones too. Only state issued counts; a credit note''s amounts are below 0';
COMMENT ON COLUMN finance.invoices.document_id IS 'Id of the document';
COMMENT ON COLUMN finance.invoices.kind IS 'invoice; credit_note; adjustment: a last one about a period that was invoiced; progress: billed within the period';
COMMENT ON COLUMN finance.invoices.state IS 'draft, reviewed, issued or void';
COMMENT ON COLUMN finance.invoices.number IS 'Its number; null until it is issued';
COMMENT ON COLUMN finance.invoices.legal_entity IS 'Our company that sells';
COMMENT ON COLUMN finance.invoices.account IS 'Who pays';
COMMENT ON COLUMN finance.invoices.customer IS 'Name of who pays, as printed';
COMMENT ON COLUMN finance.invoices.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.invoices.period_start IS 'Start of the billing period, inclusive, UTC';
COMMENT ON COLUMN finance.invoices.period_end IS 'End of the billing period, exclusive, UTC';
COMMENT ON COLUMN finance.invoices.issue_date IS 'Day it was issued, by the seller''s calendar';
COMMENT ON COLUMN finance.invoices.tax_date IS 'Day whose tax rates hold';
COMMENT ON COLUMN finance.invoices.due_date IS 'Day it is to be paid by';
COMMENT ON COLUMN finance.invoices.lines_amount IS 'Sum of the lines, before discounts (with tax where prices include it)';
COMMENT ON COLUMN finance.invoices.discounts_amount IS 'Coupons and net credits; above 0 takes off';
COMMENT ON COLUMN finance.invoices.net_amount IS 'What is taxed';
COMMENT ON COLUMN finance.invoices.tax_amount IS 'Tax';
COMMENT ON COLUMN finance.invoices.total_amount IS 'Net and tax';
COMMENT ON COLUMN finance.invoices.credits_amount IS 'Paid by prepaid credits';
COMMENT ON COLUMN finance.invoices.balance_amount IS 'Paid by a balance carried forward; below 0: carried on to the next document';
COMMENT ON COLUMN finance.invoices.payable_amount IS 'Left to pay: total less credits less balance';
COMMENT ON COLUMN finance.invoices.payment_state IS 'unpaid, partly_paid, paid or uncollectible; null unless issued';
COMMENT ON COLUMN finance.invoices.open_amount IS 'What is still to be paid; below 0: owed to the customer';
COMMENT ON COLUMN finance.invoices.fx_currency IS 'Currency it is shown in as well; null where it is not';
COMMENT ON COLUMN finance.invoices.fx_rate IS 'Units of that currency for one';
COMMENT ON COLUMN finance.invoices.fx_date IS 'Day the rate was published for';
COMMENT ON COLUMN finance.invoices.fx_source IS 'Who published it';
COMMENT ON COLUMN finance.invoices.fx_net_amount IS 'Net in that currency';
COMMENT ON COLUMN finance.invoices.fx_tax_amount IS 'Tax in that currency';
COMMENT ON COLUMN finance.invoices.fx_total_amount IS 'Total in that currency';
COMMENT ON COLUMN finance.invoices.corrects_document_id IS 'Credit note: its invoice; issued anew: the void one; adjustment: whose period it is about';
COMMENT ON COLUMN finance.invoices.corrects_number IS 'Number of that document';
COMMENT ON COLUMN finance.invoices.reason_code IS 'Why it was made, of a credit note or an adjustment';
COMMENT ON COLUMN finance.invoices.note IS 'The same in words';
COMMENT ON COLUMN finance.invoices.created_at IS 'When it was made, UTC';
COMMENT ON COLUMN finance.invoices.created_by IS 'Who made it';
COMMENT ON COLUMN finance.invoices.reviewed_at IS 'When it was reviewed, UTC';
COMMENT ON COLUMN finance.invoices.reviewed_by IS 'Who reviewed it';
COMMENT ON COLUMN finance.invoices.issued_at IS 'When it was issued, UTC';
COMMENT ON COLUMN finance.invoices.issued_by IS 'Who issued it';
COMMENT ON COLUMN finance.invoices.voided_at IS 'When it was voided, UTC';
COMMENT ON COLUMN finance.invoices.voided_by IS 'Who voided it';
COMMENT ON COLUMN finance.invoices.void_reason_code IS 'Why';
COMMENT ON COLUMN finance.invoices.void_note IS 'The same in words';

CREATE VIEW finance.document_lines AS
SELECT
    line.id AS document_line_id,
    line.document_id AS document_id,
    document.number AS number,
    document.kind::text AS document_kind,
    document.state::text AS document_state,
    document.currency AS currency,
    line.position AS position,
    line.kind AS kind,
    line.role AS role,
    line.account AS account,
    line.period_start AS service_start,
    line.period_end AS service_end,
    line.contract AS contract,
    line.plan AS plan,
    line.plan_version AS plan_version,
    line.price_version AS price_version,
    line.charge AS charge,
    line.detail ->> 'name' AS name,
    line.meter AS meter,
    line.cell AS cell,
    line.segment_start AS segment_start,
    trim_scale(line.quantity) AS quantity,
    line.unit AS unit,
    trim_scale(line.exact_amount) AS exact_amount,
    line.amount AS amount,
    trim_scale(line.amount - line.exact_amount) AS rounding_difference,
    line.discount_amount AS discount_amount,
    line.net_amount AS net_amount,
    line.tax_amount AS tax_amount,
    line.total_amount AS total_amount,
    line.tax_category AS tax_category,
    line.detail -> 'references' AS reference_values,
    (line.detail ->> 'events')::bigint AS events,
    (line.detail ->> 'first_event_at')::timestamptz AS first_event_at,
    (line.detail ->> 'last_event_at')::timestamptz AS last_event_at,
    line.line_id AS line_id,
    line.adjusts_id AS adjusts_document_line_id,
    adjusted.document_id AS adjusts_document_id,
    original.number AS adjusts_number,
    line.detail AS detail
FROM billing.document_line AS line
JOIN billing.document ON document.id = line.document_id
LEFT JOIN billing.document_line AS adjusted ON adjusted.id = line.adjusts_id
LEFT JOIN billing.document AS original ON original.id = adjusted.document_id;
COMMENT ON VIEW finance.document_lines IS 'Every line of every document';
COMMENT ON COLUMN finance.document_lines.document_line_id IS 'Id of the line';
COMMENT ON COLUMN finance.document_lines.document_id IS 'Document it is on';
COMMENT ON COLUMN finance.document_lines.number IS 'Number of that document';
COMMENT ON COLUMN finance.document_lines.document_kind IS 'Kind of that document';
COMMENT ON COLUMN finance.document_lines.document_state IS 'State of that document';
COMMENT ON COLUMN finance.document_lines.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.document_lines.position IS 'Its place on the document, from 1';
COMMENT ON COLUMN finance.document_lines.kind IS 'usage, fee, minimum, commitment, adjustment or progress (billed within the period, taken back by the invoice)';
COMMENT ON COLUMN finance.document_lines.role IS 'new, or reversal: takes back an earlier line';
COMMENT ON COLUMN finance.document_lines.account IS 'Whose usage or fee it is: of a consolidated invoice the child';
COMMENT ON COLUMN finance.document_lines.service_start IS 'Start of the time it is for, inclusive, UTC';
COMMENT ON COLUMN finance.document_lines.service_end IS 'End of the time it is for, exclusive, UTC';
COMMENT ON COLUMN finance.document_lines.contract IS 'Contract in force';
COMMENT ON COLUMN finance.document_lines.plan IS 'Plan of the contract';
COMMENT ON COLUMN finance.document_lines.plan_version IS 'Version of the plan';
COMMENT ON COLUMN finance.document_lines.price_version IS 'Where the price comes from, as document@version';
COMMENT ON COLUMN finance.document_lines.charge IS 'Charge of the plan';
COMMENT ON COLUMN finance.document_lines.name IS 'What the customer reads';
COMMENT ON COLUMN finance.document_lines.meter IS 'Meter that gave the quantity';
COMMENT ON COLUMN finance.document_lines.cell IS 'Dimension cell of the charge; empty where it has none';
COMMENT ON COLUMN finance.document_lines.segment_start IS 'Start of the part of the period with one contract, plan and price version, UTC';
COMMENT ON COLUMN finance.document_lines.quantity IS 'Quantity, exact';
COMMENT ON COLUMN finance.document_lines.unit IS 'Its unit';
COMMENT ON COLUMN finance.document_lines.exact_amount IS 'Before any rounding';
COMMENT ON COLUMN finance.document_lines.amount IS 'Exact amount rounded once, half up, to the currency''s smallest unit';
COMMENT ON COLUMN finance.document_lines.rounding_difference IS 'Amount minus exact amount';
COMMENT ON COLUMN finance.document_lines.discount_amount IS 'Coupons and net credits, its share of those on the whole document too; above 0 takes off';
COMMENT ON COLUMN finance.document_lines.net_amount IS 'What is taxed';
COMMENT ON COLUMN finance.document_lines.tax_amount IS 'Tax';
COMMENT ON COLUMN finance.document_lines.total_amount IS 'Net and tax';
COMMENT ON COLUMN finance.document_lines.tax_category IS 'Category that its tax rates are looked up by';
COMMENT ON COLUMN finance.document_lines.reference_values IS 'Values of the charge''s reference properties, such as order numbers and file names';
COMMENT ON COLUMN finance.document_lines.events IS 'Events behind it; null where it has none';
COMMENT ON COLUMN finance.document_lines.first_event_at IS 'Time of the earliest, UTC';
COMMENT ON COLUMN finance.document_lines.last_event_at IS 'Time of the latest, UTC';
COMMENT ON COLUMN finance.document_lines.line_id IS 'The collected line behind it (finance.invoice_lines); its events: finance.document_line_events';
COMMENT ON COLUMN finance.document_lines.adjusts_document_line_id IS 'The line of an earlier document that it takes back or stands in for';
COMMENT ON COLUMN finance.document_lines.adjusts_document_id IS 'The document that line is on';
COMMENT ON COLUMN finance.document_lines.adjusts_number IS 'The number of that document';
COMMENT ON COLUMN finance.document_lines.detail IS 'All that is printed of it: parts of the price, taxes by rate';

CREATE VIEW finance.document_taxes AS
SELECT
    tax.document_id AS document_id,
    document.number AS number,
    document.kind::text AS document_kind,
    document.state::text AS document_state,
    document.legal_entity AS legal_entity,
    document.account AS account,
    document.issue_date AS issue_date,
    document.tax_date AS tax_date,
    document.currency AS currency,
    tax.position AS position,
    tax.tax AS tax,
    tax.treatment AS treatment,
    tax.percent AS percent,
    tax.base_amount AS base_amount,
    tax.tax_amount AS tax_amount,
    tax.note AS note
FROM billing.document_tax AS tax JOIN billing.document ON document.id = tax.document_id;
COMMENT ON VIEW finance.document_taxes IS 'Taxes of documents by rate: what a tax return adds up, for state issued';
COMMENT ON COLUMN finance.document_taxes.document_id IS 'Document';
COMMENT ON COLUMN finance.document_taxes.number IS 'Its number';
COMMENT ON COLUMN finance.document_taxes.document_kind IS 'Its kind';
COMMENT ON COLUMN finance.document_taxes.document_state IS 'Its state';
COMMENT ON COLUMN finance.document_taxes.legal_entity IS 'Our company that sells';
COMMENT ON COLUMN finance.document_taxes.account IS 'Who pays';
COMMENT ON COLUMN finance.document_taxes.issue_date IS 'Day it was issued';
COMMENT ON COLUMN finance.document_taxes.tax_date IS 'Day whose rates hold';
COMMENT ON COLUMN finance.document_taxes.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.document_taxes.position IS 'Its place on the document';
COMMENT ON COLUMN finance.document_taxes.tax IS 'VAT, GST and so on';
COMMENT ON COLUMN finance.document_taxes.treatment IS 'standard, reverse_charge, exempt or outside_scope';
COMMENT ON COLUMN finance.document_taxes.percent IS 'Per cent of the base';
COMMENT ON COLUMN finance.document_taxes.base_amount IS 'What it is charged on';
COMMENT ON COLUMN finance.document_taxes.tax_amount IS 'The tax';
COMMENT ON COLUMN finance.document_taxes.note IS 'What is said of it on the document';

CREATE VIEW finance.document_discounts AS
SELECT
    discount.document_id AS document_id,
    document.number AS number,
    document.state::text AS document_state,
    document.account AS account,
    document.currency AS currency,
    discount.position AS position,
    nullif(discount.coupon, '') AS coupon,
    discount.grant_id AS grant_id,
    discount.name AS name,
    discount.document_line_id AS document_line_id,
    discount.amount AS amount
FROM billing.document_discount AS discount JOIN billing.document ON document.id = discount.document_id;
COMMENT ON VIEW finance.document_discounts IS 'Discounts of documents, in the sequence they were applied';
COMMENT ON COLUMN finance.document_discounts.document_id IS 'Document';
COMMENT ON COLUMN finance.document_discounts.number IS 'Its number';
COMMENT ON COLUMN finance.document_discounts.document_state IS 'Its state';
COMMENT ON COLUMN finance.document_discounts.account IS 'Who pays';
COMMENT ON COLUMN finance.document_discounts.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.document_discounts.position IS 'Its place in the sequence';
COMMENT ON COLUMN finance.document_discounts.coupon IS 'The coupon; null for credits';
COMMENT ON COLUMN finance.document_discounts.grant_id IS 'The grant of credits (finance.credits); null for a coupon';
COMMENT ON COLUMN finance.document_discounts.name IS 'What the customer reads';
COMMENT ON COLUMN finance.document_discounts.document_line_id IS 'The line it is on; null: the whole document';
COMMENT ON COLUMN finance.document_discounts.amount IS 'What it takes off';

CREATE VIEW finance.credit_notes AS
SELECT
    note.id AS document_id,
    note.number AS number,
    note.state::text AS state,
    note.legal_entity AS legal_entity,
    note.account AS account,
    note.currency AS currency,
    note.issue_date AS issue_date,
    note.reason_code AS reason_code,
    note.note AS note,
    note.net_amount AS net_amount,
    note.tax_amount AS tax_amount,
    note.total_amount AS total_amount,
    note.balance_amount AS balance_amount,
    payment.open_amount AS open_amount,
    note.corrects_id AS invoice_document_id,
    invoice.number AS invoice_number,
    invoice.issue_date AS invoice_issue_date,
    invoice.total_amount AS invoice_total_amount,
    note.issued_by AS issued_by
FROM billing.document AS note
JOIN billing.document AS invoice ON invoice.id = note.corrects_id
LEFT JOIN billing.document_payment AS payment ON payment.document_id = note.id
WHERE note.kind = 'credit_note';
COMMENT ON VIEW finance.credit_notes IS 'Credit notes that were issued or will be, with the invoice each corrects; amounts are below 0';
COMMENT ON COLUMN finance.credit_notes.document_id IS 'Id of the credit note';
COMMENT ON COLUMN finance.credit_notes.number IS 'Its number; null until it is issued';
COMMENT ON COLUMN finance.credit_notes.state IS 'draft, reviewed, issued or void';
COMMENT ON COLUMN finance.credit_notes.legal_entity IS 'Our company that sells';
COMMENT ON COLUMN finance.credit_notes.account IS 'Who is credited';
COMMENT ON COLUMN finance.credit_notes.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.credit_notes.issue_date IS 'Day it was issued';
COMMENT ON COLUMN finance.credit_notes.reason_code IS 'Why';
COMMENT ON COLUMN finance.credit_notes.note IS 'The same in words';
COMMENT ON COLUMN finance.credit_notes.net_amount IS 'Net credited';
COMMENT ON COLUMN finance.credit_notes.tax_amount IS 'Tax credited';
COMMENT ON COLUMN finance.credit_notes.total_amount IS 'Credited altogether';
COMMENT ON COLUMN finance.credit_notes.balance_amount IS 'Of this, what goes to the balance and so to later documents';
COMMENT ON COLUMN finance.credit_notes.open_amount IS 'What is still to be refunded or set off';
COMMENT ON COLUMN finance.credit_notes.invoice_document_id IS 'The document it corrects';
COMMENT ON COLUMN finance.credit_notes.invoice_number IS 'Its number';
COMMENT ON COLUMN finance.credit_notes.invoice_issue_date IS 'Day that was issued';
COMMENT ON COLUMN finance.credit_notes.invoice_total_amount IS 'What that came to';
COMMENT ON COLUMN finance.credit_notes.issued_by IS 'Who issued it';

CREATE VIEW finance.adjustments AS
SELECT
    line.id AS document_line_id,
    line.document_id AS document_id,
    document.number AS number,
    document.state::text AS document_state,
    document.currency AS currency,
    line.role AS role,
    line.account AS account,
    line.charge AS charge,
    line.period_start AS service_start,
    line.period_end AS service_end,
    trim_scale(line.quantity) AS quantity,
    trim_scale(line.exact_amount) AS exact_amount,
    line.net_amount AS net_amount,
    line.tax_amount AS tax_amount,
    line.total_amount AS total_amount,
    line.adjusts_id AS original_document_line_id,
    original.id AS original_document_id,
    original.number AS original_number,
    original.tax_date AS original_tax_date
FROM billing.document_line AS line
JOIN billing.document ON document.id = line.document_id
LEFT JOIN billing.document_line AS adjusted ON adjusted.id = line.adjusts_id
LEFT JOIN billing.document AS original ON original.id = adjusted.document_id
WHERE line.kind = 'adjustment';
COMMENT ON VIEW finance.adjustments IS 'Lines that correct a period which was invoiced before, after late usage or a correction: what was billed is taken back, and what should have been is billed, each with a line';
COMMENT ON COLUMN finance.adjustments.document_line_id IS 'Id of the line';
COMMENT ON COLUMN finance.adjustments.document_id IS 'Document it is on';
COMMENT ON COLUMN finance.adjustments.number IS 'Its number; null until it is issued';
COMMENT ON COLUMN finance.adjustments.document_state IS 'Its state';
COMMENT ON COLUMN finance.adjustments.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.adjustments.role IS 'reversal: takes back the original line; new: stands in for it';
COMMENT ON COLUMN finance.adjustments.account IS 'Whose usage it is';
COMMENT ON COLUMN finance.adjustments.charge IS 'Charge of the plan';
COMMENT ON COLUMN finance.adjustments.service_start IS 'Start of the time it is for, inclusive, UTC';
COMMENT ON COLUMN finance.adjustments.service_end IS 'End of the time it is for, exclusive, UTC';
COMMENT ON COLUMN finance.adjustments.quantity IS 'Quantity, exact; of a reversal below 0';
COMMENT ON COLUMN finance.adjustments.exact_amount IS 'Before any rounding';
COMMENT ON COLUMN finance.adjustments.net_amount IS 'Net';
COMMENT ON COLUMN finance.adjustments.tax_amount IS 'Tax, at the original''s rates';
COMMENT ON COLUMN finance.adjustments.total_amount IS 'Net and tax';
COMMENT ON COLUMN finance.adjustments.original_document_line_id IS 'The line it is about; null for a counter that was not billed before';
COMMENT ON COLUMN finance.adjustments.original_document_id IS 'The document that line is on';
COMMENT ON COLUMN finance.adjustments.original_number IS 'The number of that document';
COMMENT ON COLUMN finance.adjustments.original_tax_date IS 'Its tax date, whose rates hold';

-- From a line to its events -------------------------------------------------------------------------------------------

-- A line's events lie in the months its period touches: only those partitions are opened, however many there are.
CREATE OR REPLACE VIEW finance.line_events AS
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
FROM billing.invoice_line AS line
JOIN billing.invoice ON invoice.id = line.invoice_id
JOIN billing.rated_usage AS usage ON usage.line_id = line.id
    AND usage.event_month >= date_trunc('month', invoice.period_start, 'UTC')::date
    AND usage.event_month <= date_trunc('month', invoice.period_end, 'UTC')::date;
COMMENT ON VIEW finance.line_events IS 'The events behind a line, for WHERE line_id = …: their exact amounts and those of its close entries add up to the line''s';
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

-- A document's line may stand for several collected ones of one counter: under each version of its meter, and in the
-- supplements up to the one it tells of.
CREATE VIEW finance.document_line_events AS
SELECT
    billed.id AS document_line_id,
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
FROM billing.document_line AS billed
JOIN billing.document ON document.id = billed.document_id
JOIN billing.invoice_line AS told ON told.id = billed.line_id
JOIN billing.invoice AS period ON period.id = told.invoice_id
JOIN billing.invoice ON (invoice.account, invoice.currency, invoice.period_start, invoice.period_end)
    = (period.account, period.currency, period.period_start, period.period_end)
JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
    AND (line.contract, line.charge, line.segment_start, line.cell, line.plan, line.plan_version, line.price_version)
    = (told.contract, told.charge, told.segment_start, told.cell, told.plan, told.plan_version, told.price_version)
JOIN billing.rated_usage AS usage ON usage.line_id = line.id
    AND usage.event_month >= date_trunc('month', invoice.period_start, 'UTC')::date
    AND usage.event_month <= date_trunc('month', invoice.period_end, 'UTC')::date
WHERE invoice.supplement <= period.supplement;
COMMENT ON VIEW finance.document_line_events IS 'The events behind a line of a document, for WHERE document_line_id = …';
COMMENT ON COLUMN finance.document_line_events.document_line_id IS 'Line of a document';
COMMENT ON COLUMN finance.document_line_events.line_id IS 'Collected line they are on';
COMMENT ON COLUMN finance.document_line_events.event_time IS 'When the use happened, UTC';
COMMENT ON COLUMN finance.document_line_events.idempotency_key IS 'Names the event inside its account; tally explain ACCOUNT/KEY shows it';
COMMENT ON COLUMN finance.document_line_events.event_type IS 'What happened';
COMMENT ON COLUMN finance.document_line_events.subject IS 'Who inside the account';
COMMENT ON COLUMN finance.document_line_events.properties IS 'Measures and dimensions as sent';
COMMENT ON COLUMN finance.document_line_events.entry IS 'Entry number of the event and charge: 0 for the usage itself, higher for what corrects it';
COMMENT ON COLUMN finance.document_line_events.kind IS 'What the entry is: usage, void or correction';
COMMENT ON COLUMN finance.document_line_events.quantity IS 'Quantity of the event in the meter''s unit';
COMMENT ON COLUMN finance.document_line_events.quantity_before IS 'Running quantity before the event';
COMMENT ON COLUMN finance.document_line_events.quantity_after IS 'Running quantity after the event';
COMMENT ON COLUMN finance.document_line_events.exact_amount IS 'Price of the quantity after minus price of the quantity before, exact';
COMMENT ON COLUMN finance.document_line_events.late IS 'Whether the event arrived after its period ended';
COMMENT ON COLUMN finance.document_line_events.arrived_at IS 'When the broker took the event in, UTC';
COMMENT ON COLUMN finance.document_line_events.origin IS 'Partition and offset of usage.events it arrived at';

-- To bill, to be paid, carried forward --------------------------------------------------------------------------------

CREATE VIEW finance.unbilled_usage AS
SELECT
    invoice.account AS account,
    invoice.currency AS currency,
    invoice.period_start AS period_start,
    invoice.period_end AS period_end,
    invoice.supplement AS supplement,
    invoice.state::text AS state,
    line.id AS line_id,
    line.contract AS contract,
    line.charge AS charge,
    line.cell AS cell,
    trim_scale(line.quantity) AS quantity,
    line.events AS events,
    trim_scale(line.amount) AS exact_amount,
    trim_scale(coalesce(progress.amount, 0)) AS progress_amount,
    trim_scale(line.amount - coalesce(progress.amount, 0)) AS unbilled_amount,
    line.price_class = 'period' AS provisional,
    line.last_event_at AS last_event_at,
    line.updated_at AS updated_at
FROM billing.invoice
JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
LEFT JOIN LATERAL (
    SELECT sum(billed.exact_amount) AS amount FROM billing.document_line AS billed
    JOIN billing.document ON document.id = billed.document_id
    WHERE billed.line_id = line.id AND document.state = 'issued' AND billed.kind = 'progress'
) AS progress ON true
WHERE invoice.state IN ('open', 'draft', 'reviewed');
COMMENT ON VIEW finance.unbilled_usage IS 'Usage that no issued document has billed yet, line by line: of periods that are open or under review, and what came after its period was closed';
COMMENT ON COLUMN finance.unbilled_usage.account IS 'Account to be billed';
COMMENT ON COLUMN finance.unbilled_usage.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.unbilled_usage.period_start IS 'Start of the billing period, inclusive, UTC';
COMMENT ON COLUMN finance.unbilled_usage.period_end IS 'End of the billing period, exclusive, UTC';
COMMENT ON COLUMN finance.unbilled_usage.supplement IS '0: of an open period; from 1 on: came after its period was closed, to be billed as an adjustment';
COMMENT ON COLUMN finance.unbilled_usage.state IS 'open, draft or reviewed';
COMMENT ON COLUMN finance.unbilled_usage.line_id IS 'Id of the line (finance.invoice_lines)';
COMMENT ON COLUMN finance.unbilled_usage.contract IS 'Contract in force';
COMMENT ON COLUMN finance.unbilled_usage.charge IS 'Charge of the plan';
COMMENT ON COLUMN finance.unbilled_usage.cell IS 'Dimension cell of the charge; empty where it has none';
COMMENT ON COLUMN finance.unbilled_usage.quantity IS 'Quantity so far, exact';
COMMENT ON COLUMN finance.unbilled_usage.events IS 'Events so far';
COMMENT ON COLUMN finance.unbilled_usage.exact_amount IS 'What it comes to so far, exact, before rounding, discounts and tax';
COMMENT ON COLUMN finance.unbilled_usage.progress_amount IS 'Of this, billed already within the period';
COMMENT ON COLUMN finance.unbilled_usage.unbilled_amount IS 'What is left to bill';
COMMENT ON COLUMN finance.unbilled_usage.provisional IS 'Whether the close may still price it otherwise: unique counts, maxima, pools and the like';
COMMENT ON COLUMN finance.unbilled_usage.last_event_at IS 'Time of the latest event, UTC';
COMMENT ON COLUMN finance.unbilled_usage.updated_at IS 'When usage was last added, UTC';

CREATE VIEW finance.usage_vs_billed AS
SELECT
    coalesce(used.account, billed.account) AS account,
    coalesce(used.currency, billed.currency) AS currency,
    coalesce(used.period_start, billed.period_start) AS period_start,
    coalesce(used.period_end, billed.period_end) AS period_end,
    coalesce(used.charge, billed.charge) AS charge,
    coalesce(used.closed, false) AS closed,
    trim_scale(coalesce(used.quantity, 0)) AS used_quantity,
    trim_scale(coalesce(billed.quantity, 0)) AS billed_quantity,
    trim_scale(coalesce(used.amount, 0)) AS used_amount,
    trim_scale(coalesce(billed.amount, 0)) AS billed_amount,
    trim_scale(coalesce(used.amount, 0) - coalesce(billed.amount, 0)) AS difference,
    trim_scale(coalesce(billed.credited, 0)) AS credited_amount
FROM (
    SELECT invoice.account, invoice.currency, invoice.period_start, invoice.period_end, line.charge,
        bool_or(invoice.state = 'issued') AS closed, sum(line.quantity) AS quantity, sum(line.amount) AS amount
    FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
    GROUP BY 1, 2, 3, 4, 5
) AS used
FULL JOIN (
    SELECT invoice.account, invoice.currency, invoice.period_start, invoice.period_end, line.charge,
        sum(billed.quantity) FILTER (WHERE document.kind <> 'credit_note') AS quantity,
        sum(billed.exact_amount) FILTER (WHERE document.kind <> 'credit_note') AS amount,
        sum(billed.exact_amount) FILTER (WHERE document.kind = 'credit_note') AS credited
    FROM billing.document_line AS billed
    JOIN billing.document ON document.id = billed.document_id AND document.state = 'issued'
    JOIN billing.invoice_line AS line ON line.id = billed.line_id
    JOIN billing.invoice ON invoice.id = line.invoice_id
    GROUP BY 1, 2, 3, 4, 5
) AS billed USING (account, currency, period_start, period_end, charge);
COMMENT ON VIEW finance.usage_vs_billed IS 'What was used against what issued documents billed of it, exact, by account, period and charge: of a closed period the difference is 0, but for late usage that the next document bills';
COMMENT ON COLUMN finance.usage_vs_billed.account IS 'Whose usage it is';
COMMENT ON COLUMN finance.usage_vs_billed.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.usage_vs_billed.period_start IS 'Start of the billing period, inclusive, UTC';
COMMENT ON COLUMN finance.usage_vs_billed.period_end IS 'End of the billing period, exclusive, UTC';
COMMENT ON COLUMN finance.usage_vs_billed.charge IS 'Charge of the plan';
COMMENT ON COLUMN finance.usage_vs_billed.closed IS 'Whether the period was closed';
COMMENT ON COLUMN finance.usage_vs_billed.used_quantity IS 'Quantity collected, exact';
COMMENT ON COLUMN finance.usage_vs_billed.billed_quantity IS 'Quantity billed, exact';
COMMENT ON COLUMN finance.usage_vs_billed.used_amount IS 'What was collected comes to, exact, before rounding, discounts and tax';
COMMENT ON COLUMN finance.usage_vs_billed.billed_amount IS 'What was billed, exact, before rounding, discounts and tax; credit notes aside';
COMMENT ON COLUMN finance.usage_vs_billed.difference IS 'What is left to bill, or too much was';
COMMENT ON COLUMN finance.usage_vs_billed.credited_amount IS 'What credit notes gave back of it, exact; below 0';

CREATE VIEW finance.receivables AS
SELECT
    document.id AS document_id,
    document.number AS number,
    document.kind::text AS kind,
    document.legal_entity AS legal_entity,
    document.account AS account,
    document.content -> 'buyer' ->> 'name' AS customer,
    document.currency AS currency,
    document.issue_date AS issue_date,
    document.due_date AS due_date,
    document.payable_amount AS payable_amount,
    payment.settled_amount AS settled_amount,
    payment.open_amount AS open_amount,
    payment.state AS payment_state,
    greatest(current_date - document.due_date, 0) AS days_overdue,
    CASE
        WHEN payment.open_amount < 0 THEN 'owed to the customer'
        WHEN document.due_date IS NULL OR current_date <= document.due_date THEN 'not due'
        WHEN current_date - document.due_date <= 30 THEN '1-30'
        WHEN current_date - document.due_date <= 60 THEN '31-60'
        WHEN current_date - document.due_date <= 90 THEN '61-90'
        ELSE 'over 90'
    END AS age
FROM billing.document JOIN billing.document_payment AS payment ON payment.document_id = document.id
WHERE payment.open_amount <> 0;
COMMENT ON VIEW finance.receivables IS 'Issued documents that are not settled: what customers owe, and what is owed to them (below 0)';
COMMENT ON COLUMN finance.receivables.document_id IS 'Document';
COMMENT ON COLUMN finance.receivables.number IS 'Its number';
COMMENT ON COLUMN finance.receivables.kind IS 'Its kind';
COMMENT ON COLUMN finance.receivables.legal_entity IS 'Our company that sells';
COMMENT ON COLUMN finance.receivables.account IS 'Who pays';
COMMENT ON COLUMN finance.receivables.customer IS 'Name of who pays, as printed';
COMMENT ON COLUMN finance.receivables.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.receivables.issue_date IS 'Day it was issued';
COMMENT ON COLUMN finance.receivables.due_date IS 'Day it is to be paid by';
COMMENT ON COLUMN finance.receivables.payable_amount IS 'What was to be paid';
COMMENT ON COLUMN finance.receivables.settled_amount IS 'What was paid, refunded, set off or written off';
COMMENT ON COLUMN finance.receivables.open_amount IS 'What is still to be paid; below 0: owed to the customer';
COMMENT ON COLUMN finance.receivables.payment_state IS 'unpaid or partly_paid';
COMMENT ON COLUMN finance.receivables.days_overdue IS 'Days since it was due; 0 before, null where nothing is due';
COMMENT ON COLUMN finance.receivables.age IS 'not due, 1-30, 31-60, 61-90 or over 90 days overdue, or owed to the customer';

CREATE VIEW finance.settlements AS
SELECT
    settlement.id AS settlement_id,
    settlement.document_id AS document_id,
    document.number AS number,
    document.account AS account,
    document.currency AS currency,
    settlement.kind AS kind,
    settlement.amount AS amount,
    settlement.at AS settled_at,
    settlement.by AS settled_by,
    settlement.reference AS reference
FROM billing.settlement JOIN billing.document ON document.id = settlement.document_id;
COMMENT ON VIEW finance.settlements IS 'What settled documents after they were issued: payments, refunds, write-offs, set-offs';
COMMENT ON COLUMN finance.settlements.settlement_id IS 'Id of the entry';
COMMENT ON COLUMN finance.settlements.document_id IS 'Document it settles';
COMMENT ON COLUMN finance.settlements.number IS 'Its number';
COMMENT ON COLUMN finance.settlements.account IS 'Who pays';
COMMENT ON COLUMN finance.settlements.currency IS 'ISO 4217 currency of the amount';
COMMENT ON COLUMN finance.settlements.kind IS 'payment, refund, write_off, credit_note (set off against one) or balance (carried forward)';
COMMENT ON COLUMN finance.settlements.amount IS 'Above 0 takes off what is to be paid; a refund is below 0';
COMMENT ON COLUMN finance.settlements.settled_at IS 'When, UTC';
COMMENT ON COLUMN finance.settlements.settled_by IS 'Who entered it';
COMMENT ON COLUMN finance.settlements.reference IS 'Reference of the payment';

CREATE VIEW finance.balances AS
SELECT
    entry.legal_entity AS legal_entity,
    entry.account AS account,
    entry.currency AS currency,
    sum(entry.amount) AS amount,
    count(*) AS entries,
    max(entry.at) AS changed_at
FROM billing.balance_entry AS entry
GROUP BY entry.legal_entity, entry.account, entry.currency HAVING sum(entry.amount) <> 0;
COMMENT ON VIEW finance.balances IS 'What each legal entity owes a customer and carries forward to its next documents; without those that came to nothing';
COMMENT ON COLUMN finance.balances.legal_entity IS 'Our company that sells';
COMMENT ON COLUMN finance.balances.account IS 'Customer';
COMMENT ON COLUMN finance.balances.currency IS 'ISO 4217 currency of the amount';
COMMENT ON COLUMN finance.balances.amount IS 'In the customer''s favour';
COMMENT ON COLUMN finance.balances.entries IS 'Entries it is the sum of (finance.balance_entries)';
COMMENT ON COLUMN finance.balances.changed_at IS 'When it last changed, UTC';

CREATE VIEW finance.balance_entries AS
SELECT
    entry.id AS entry_id,
    entry.legal_entity AS legal_entity,
    entry.account AS account,
    entry.currency AS currency,
    entry.amount AS amount,
    entry.kind AS kind,
    entry.document_id AS document_id,
    document.number AS number,
    entry.at AS at,
    entry.by AS by,
    entry.note AS note
FROM billing.balance_entry AS entry LEFT JOIN billing.document ON document.id = entry.document_id;
COMMENT ON VIEW finance.balance_entries IS 'Every change of a balance, with the document behind it; never changed';
COMMENT ON COLUMN finance.balance_entries.entry_id IS 'Id of the entry';
COMMENT ON COLUMN finance.balance_entries.legal_entity IS 'Our company that sells';
COMMENT ON COLUMN finance.balance_entries.account IS 'Customer';
COMMENT ON COLUMN finance.balance_entries.currency IS 'ISO 4217 currency of the amount';
COMMENT ON COLUMN finance.balance_entries.amount IS 'Above 0 in the customer''s favour; below 0 used up';
COMMENT ON COLUMN finance.balance_entries.kind IS 'carried: a negative total carried on; applied: used on a document; credit_note; refund: paid out; void: taken back';
COMMENT ON COLUMN finance.balance_entries.document_id IS 'Document behind it';
COMMENT ON COLUMN finance.balance_entries.number IS 'Its number';
COMMENT ON COLUMN finance.balance_entries.at IS 'When, UTC';
COMMENT ON COLUMN finance.balance_entries.by IS 'Who';
COMMENT ON COLUMN finance.balance_entries.note IS 'Why';

-- Numbers and closes --------------------------------------------------------------------------------------------------

CREATE VIEW finance.numbers AS
SELECT
    range.legal_entity AS legal_entity,
    range.series AS series,
    range.year AS year,
    range.last AS last_serial,
    used.documents AS documents,
    used.void AS void_documents,
    range.last - used.documents AS missing,
    CASE WHEN range.last <> used.documents THEN (
        SELECT min(serial) FROM generate_series(1, range.last) AS serial
        WHERE NOT EXISTS (
            SELECT FROM billing.document AS taken
            WHERE (taken.legal_entity, taken.number_series, taken.number_year, taken.number_serial)
                = (range.legal_entity, range.series, range.year, serial)
        )
    ) END AS first_missing,
    newest.number AS last_number
FROM billing.number_range AS range
CROSS JOIN LATERAL (
    SELECT count(*) AS documents, count(*) FILTER (WHERE state = 'void') AS void
    FROM billing.document
    WHERE (legal_entity, number_series, number_year) = (range.legal_entity, range.series, range.year)
) AS used
LEFT JOIN billing.document AS newest
    ON (newest.legal_entity, newest.number_series, newest.number_year, newest.number_serial)
    = (range.legal_entity, range.series, range.year, range.last);
COMMENT ON VIEW finance.numbers IS 'Series of document numbers by year: none lost, none used twice';
COMMENT ON COLUMN finance.numbers.legal_entity IS 'Our company that sells';
COMMENT ON COLUMN finance.numbers.series IS 'Pattern of the numbers, or kind of document, that is numbered for itself';
COMMENT ON COLUMN finance.numbers.year IS 'Year of the issue date';
COMMENT ON COLUMN finance.numbers.last_serial IS 'Last place given';
COMMENT ON COLUMN finance.numbers.documents IS 'Documents with a number of the series';
COMMENT ON COLUMN finance.numbers.void_documents IS 'Of these, void ones: their numbers stay used';
COMMENT ON COLUMN finance.numbers.missing IS 'Numbers given to no document; always 0';
COMMENT ON COLUMN finance.numbers.first_missing IS 'The first of them';
COMMENT ON COLUMN finance.numbers.last_number IS 'Number of the last document';

CREATE VIEW finance.close_runs AS
SELECT
    run.id AS run_id,
    run.month AS month,
    run.accounts AS accounts,
    run.started_at AS started_at,
    run.started_by AS started_by,
    run.finished_at AS finished_at,
    task.waiting AS waiting,
    task.done AS done,
    task.failed AS failed,
    task.documents AS documents,
    override.missing AS missing,
    override.why AS override_reason,
    override.by AS overridden_by,
    override.at AS overridden_at
FROM billing.close_run AS run
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE state = 'waiting') AS waiting, count(*) FILTER (WHERE state = 'done') AS done,
        count(*) FILTER (WHERE state = 'failed') AS failed, coalesce(sum(documents), 0) AS documents
    FROM billing.close_task WHERE run_id = run.id
) AS task
LEFT JOIN LATERAL (
    SELECT * FROM billing.close_override AS decided WHERE decided.run_id = run.id ORDER BY decided.id DESC LIMIT 1
) AS override ON true;
COMMENT ON VIEW finance.close_runs IS 'Closes of months: who ran them, how far they are, and what was missing when somebody decided to close anyway';
COMMENT ON COLUMN finance.close_runs.run_id IS 'Number of the run';
COMMENT ON COLUMN finance.close_runs.month IS 'Month that was closed, YYYY-MM';
COMMENT ON COLUMN finance.close_runs.accounts IS 'Payers closed; empty: all';
COMMENT ON COLUMN finance.close_runs.started_at IS 'When it began, UTC';
COMMENT ON COLUMN finance.close_runs.started_by IS 'Who began it';
COMMENT ON COLUMN finance.close_runs.finished_at IS 'When it was done, UTC; null: it goes on with the next close of the month';
COMMENT ON COLUMN finance.close_runs.waiting IS 'Payers still to close';
COMMENT ON COLUMN finance.close_runs.done IS 'Payers closed';
COMMENT ON COLUMN finance.close_runs.failed IS 'Payers that something stood in the way of; the next close tries them again';
COMMENT ON COLUMN finance.close_runs.documents IS 'Documents made';
COMMENT ON COLUMN finance.close_runs.missing IS 'What the gate found; null where it found nothing';
COMMENT ON COLUMN finance.close_runs.override_reason IS 'Why it was closed anyway';
COMMENT ON COLUMN finance.close_runs.overridden_by IS 'Who decided that';
COMMENT ON COLUMN finance.close_runs.overridden_at IS 'When, UTC';

-- Whether it adds up --------------------------------------------------------------------------------------------------

CREATE VIEW finance.document_checks AS
WITH line AS (
    SELECT document_id, sum(amount) AS amount, sum(discount_amount) AS discount, sum(net_amount) AS net,
        sum(tax_amount) AS tax, sum(total_amount) AS total, sum(net_amount + tax_amount) AS net_and_tax
    FROM billing.document_line GROUP BY document_id
), tax AS (
    SELECT document_id, sum(tax_amount) AS tax FROM billing.document_tax GROUP BY document_id
), line_tax AS (
    SELECT document_id, part ->> 'tax' AS tax, part ->> 'treatment' AS treatment,
        (part ->> 'percent')::numeric AS percent, sum((part ->> 'amount')::numeric) AS amount
    FROM billing.document_line CROSS JOIN LATERAL jsonb_array_elements(detail -> 'taxes') AS part
    GROUP BY 1, 2, 3, 4
), rate_tax AS (
    SELECT document_id, tax, treatment, percent, sum(tax_amount) AS amount FROM billing.document_tax GROUP BY 1, 2, 3, 4
), credited AS (
    SELECT corrects_id AS document_id, sum(total_amount) AS total FROM billing.document
    WHERE kind = 'credit_note' AND state = 'issued' GROUP BY corrects_id
), checked AS (
    SELECT document.id AS document_id, document.number, check_name, expected, found
    FROM billing.document
    LEFT JOIN line ON line.document_id = document.id
    LEFT JOIN tax ON tax.document_id = document.id
    LEFT JOIN credited ON credited.document_id = document.id
    CROSS JOIN LATERAL (VALUES
        ('lines = amount of the lines', document.lines_amount, coalesce(line.amount, 0)),
        ('discounts = discounts of the lines', document.discounts_amount, coalesce(line.discount, 0)),
        ('net = net of the lines', document.net_amount, coalesce(line.net, 0)),
        ('tax = tax of the lines', document.tax_amount, coalesce(line.tax, 0)),
        ('tax = tax by rate', document.tax_amount, coalesce(tax.tax, 0)),
        ('total = total of the lines', document.total_amount, coalesce(line.total, 0)),
        ('total = net and tax of the lines', document.total_amount, coalesce(line.net_and_tax, 0)),
        ('total = net and tax', document.total_amount, document.net_amount + document.tax_amount),
        ('in the other currency: total = net and tax', coalesce(document.fx_total_amount, 0),
            coalesce(document.fx_net_amount + document.fx_tax_amount, 0)),
        ('nothing below 0 is to be paid, but of credit notes',
            CASE WHEN document.kind = 'credit_note' THEN document.payable_amount
                ELSE greatest(document.payable_amount, 0) END,
            document.payable_amount),
        ('credit notes take back no more than there was',
            greatest(document.total_amount + coalesce(credited.total, 0), least(document.total_amount, 0)),
            document.total_amount + coalesce(credited.total, 0))
    ) AS checks (check_name, expected, found)
    WHERE document.state = 'issued'
)
SELECT check_name, document_id, number, expected, found FROM checked WHERE expected IS DISTINCT FROM found
UNION ALL
SELECT 'tax of the lines, ' || concat_ws(' ', by_rate.tax, by_rate.treatment, trim_scale(by_rate.percent)),
    document.id, document.number, coalesce(by_rate.expected, 0), coalesce(by_rate.found, 0)
FROM (
    SELECT document_id, tax, treatment, percent, rate_tax.amount AS expected, line_tax.amount AS found
    FROM rate_tax FULL JOIN line_tax USING (document_id, tax, treatment, percent)
) AS by_rate
JOIN billing.document ON document.id = by_rate.document_id AND document.state = 'issued'
WHERE coalesce(by_rate.expected, 0) <> coalesce(by_rate.found, 0)
UNION ALL
SELECT 'numbers without a hole', NULL, concat_ws(' ', legal_entity, series, year), last_serial, documents
FROM finance.numbers WHERE missing <> 0
UNION ALL
SELECT 'balances in the customer''s favour', NULL, concat_ws(' ', legal_entity, account, currency), 0, amount
FROM finance.balances WHERE amount < 0;
COMMENT ON VIEW finance.document_checks IS 'What does not add up in issued documents, numbers and balances: no row is right';
COMMENT ON COLUMN finance.document_checks.check_name IS 'What should be equal';
COMMENT ON COLUMN finance.document_checks.document_id IS 'Document; null where it is about none';
COMMENT ON COLUMN finance.document_checks.number IS 'Its number, or the series';
COMMENT ON COLUMN finance.document_checks.expected IS 'What it should be';
COMMENT ON COLUMN finance.document_checks.found IS 'What it is';

-- What there is to read -----------------------------------------------------------------------------------------------

CREATE VIEW finance.columns AS
SELECT
    class.relname::text AS view,
    obj_description(class.oid, 'pg_class') AS view_meaning,
    attribute.attnum::integer AS position,
    attribute.attname::text AS "column",
    format_type(attribute.atttypid, attribute.atttypmod) AS type,
    col_description(class.oid, attribute.attnum) AS meaning
FROM pg_class AS class JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid
WHERE class.relnamespace = 'finance'::regnamespace AND class.relkind = 'v' AND attribute.attnum > 0
ORDER BY 1, 3;
COMMENT ON VIEW finance.columns IS 'Every view and column of this schema with its meaning: the documentation, as the database has it';
COMMENT ON COLUMN finance.columns.view IS 'Name of the view';
COMMENT ON COLUMN finance.columns.view_meaning IS 'What it shows';
COMMENT ON COLUMN finance.columns.position IS 'Place of the column; columns are only ever added behind the last';
COMMENT ON COLUMN finance.columns."column" IS 'Name of the column';
COMMENT ON COLUMN finance.columns.type IS 'Its type';
COMMENT ON COLUMN finance.columns.meaning IS 'What it says';

CREATE VIEW finance.versions AS
SELECT
    change.version AS version,
    change.what AS change
FROM (VALUES
    (1, 'open_invoices, invoice_lines, rated_usage, line_events, unrated_usage, quarantined_usage'),
    (2, 'usage_gaps'),
    (3, 'credits, credit_balances, credit_entries, commitments, alerts; provisional amounts'),
    (4, 'price_changes, usage_corrections, close_entries'),
    (5, 'supplements in open_invoices'),
    (6, 'exchange_rates, invoicing_changes'),
    (7, 'invoices, document_lines, document_taxes, document_discounts, credit_notes, adjustments'),
    (8, 'document_line_events; line_events reads only the months it needs'),
    (9, 'unbilled_usage, usage_vs_billed, receivables, settlements, balances, balance_entries'),
    (10, 'numbers, close_runs, document_checks, columns, versions')
) AS change (version, what)
ORDER BY change.version;
COMMENT ON VIEW finance.versions IS 'What changed in this schema; nothing was ever taken away';
COMMENT ON COLUMN finance.versions.version IS 'Number of the change';
COMMENT ON COLUMN finance.versions.change IS 'What was added';
