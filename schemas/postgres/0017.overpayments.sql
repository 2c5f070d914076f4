-- Payments of more than what is open, payments taken back, and what stands between a legal entity and a customer.

ALTER TABLE billing.balance_entry DROP CONSTRAINT balance_entry_kind_check,
    ADD CONSTRAINT balance_entry_kind_check
    CHECK (kind IN ('carried', 'applied', 'credit_note', 'refund', 'void', 'overpayment'));
COMMENT ON COLUMN billing.balance_entry.kind IS 'carried: a negative total carried on; applied: used on a document; credit_note: credited instead of refunded; refund: paid out; void: a voided document''s entries taken back; overpayment: paid beyond what was open, below 0 where that payment was taken back';

ALTER TABLE billing.settlement ADD COLUMN takes_back_id bigint UNIQUE REFERENCES billing.settlement;
COMMENT ON COLUMN billing.settlement.takes_back_id IS 'The payment or refund that it takes back, all of it and once: booked by mistake, or bounced';
COMMENT ON COLUMN billing.settlement.kind IS 'payment; refund: paid out; write_off: given up, below 0 where it was paid after all; credit_note: set off; balance: paid from the balance, below 0 what was paid beyond the document and put into it';

CREATE OR REPLACE VIEW finance.settlements AS
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
    settlement.reference AS reference,
    settlement.takes_back_id AS takes_back
FROM billing.settlement JOIN billing.document ON document.id = settlement.document_id;
COMMENT ON COLUMN finance.settlements.kind IS 'payment, refund, write_off, credit_note (set off against one) or balance (paid from it; below 0: paid too much and carried forward)';
COMMENT ON COLUMN finance.settlements.takes_back IS 'The settlement that it takes back: a payment booked by mistake, or one that bounced';
COMMENT ON COLUMN finance.balance_entries.kind IS 'carried: a negative total carried on; applied: used on a document; credit_note; refund: paid out; void: taken back; overpayment: paid beyond what was open';

CREATE VIEW finance.statements AS
SELECT
    entry.legal_entity AS legal_entity,
    entry.account AS account,
    entry.currency AS currency,
    entry.at AS at,
    entry.kind AS kind,
    entry.document_id AS document_id,
    entry.number AS number,
    entry.amount AS amount,
    sum(entry.amount) OVER entries AS open_amount,
    entry.balance AS balance,
    sum(entry.balance) OVER entries AS balance_amount,
    entry.reference AS reference,
    entry.by AS by,
    row_number() OVER entries AS position
FROM (
    SELECT legal_entity, account, currency, issued_at AS at, kind::text AS kind, id AS document_id, number,
        payable_amount AS amount, 0::numeric AS balance, '' AS reference, issued_by AS by, 1 AS part, id
    FROM billing.document WHERE state = 'issued'
    UNION ALL
    SELECT document.legal_entity, document.account, document.currency, settlement.at, settlement.kind, document.id,
        document.number, -settlement.amount, 0, settlement.reference, settlement.by, 2, settlement.id
    FROM billing.settlement JOIN billing.document ON document.id = settlement.document_id
    -- What a credit note settles it takes from its own side: together nothing, beside the credit note's own line.
    WHERE document.state = 'issued' AND settlement.kind <> 'credit_note'
    UNION ALL
    SELECT entry.legal_entity, entry.account, entry.currency,
        CASE WHEN entry.kind IN ('carried', 'applied') THEN coalesce(document.issued_at, entry.at) ELSE entry.at END,
        entry.kind, entry.document_id, document.number, 0, entry.amount, entry.note, entry.by, 3, entry.id
    FROM billing.balance_entry AS entry LEFT JOIN billing.document ON document.id = entry.document_id
) AS entry
WINDOW entries AS (
    PARTITION BY entry.legal_entity, entry.account, entry.currency ORDER BY entry.at, entry.part, entry.id
);
COMMENT ON VIEW finance.statements IS 'Statements of accounts: what each customer was asked for, what settled it, and what is carried forward, in order of time; of documents that are void only what went through the balance';
COMMENT ON COLUMN finance.statements.legal_entity IS 'Our company that sells';
COMMENT ON COLUMN finance.statements.account IS 'Who pays';
COMMENT ON COLUMN finance.statements.currency IS 'ISO 4217 currency of the amounts';
COMMENT ON COLUMN finance.statements.at IS 'When, UTC';
COMMENT ON COLUMN finance.statements.kind IS 'Kind of the document issued, of what settled one (finance.settlements), or of the change of the balance (finance.balance_entries)';
COMMENT ON COLUMN finance.statements.document_id IS 'Document it is about';
COMMENT ON COLUMN finance.statements.number IS 'Its number';
COMMENT ON COLUMN finance.statements.amount IS 'What is to be paid by it; below 0 what settled that, or is to be paid back';
COMMENT ON COLUMN finance.statements.open_amount IS 'What is open after it, over all documents with this seller in this currency';
COMMENT ON COLUMN finance.statements.balance IS 'Put into the balance that is carried forward; below 0 taken out';
COMMENT ON COLUMN finance.statements.balance_amount IS 'The balance after it, in the customer''s favour';
COMMENT ON COLUMN finance.statements.reference IS 'Reference of the payment, or why';
COMMENT ON COLUMN finance.statements.by IS 'Who';
COMMENT ON COLUMN finance.statements.position IS 'Place within the statement, from 1';

CREATE OR REPLACE VIEW finance.versions AS
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
    (10, 'numbers, close_runs, document_checks, columns, versions'),
    (11, 'unbilled_voids'),
    (12, 'statements; takes_back in settlements; overpayments'),
    (13, 'kind in credit_entries, restates in document_discounts')
) AS change (version, what)
ORDER BY change.version;
