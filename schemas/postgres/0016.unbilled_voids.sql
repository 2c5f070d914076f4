-- What was voided and is billed nowhere since: nothing reminds of it but this, since its month is closed.

CREATE INDEX document_void ON billing.document (tax_date) WHERE state = 'void';

-- Issued anew, or billed with a later document as an adjustment of its month, all of its lines stand somewhere again. A voided
-- adjustment is not billed by the line that it restated, and what it took back stands again until something else takes it back.
CREATE VIEW billing.unbilled_void AS
SELECT document.id AS document_id, document.number, document.kind, document.account, document.legal_entity,
    document.currency, document.total_amount, document.tax_date, document.void_reason_code, document.voided_at,
    document.voided_by
FROM billing.document
WHERE document.state = 'void' AND document.kind IN ('invoice', 'adjustment')
    AND NOT EXISTS (
        SELECT FROM billing.document AS again
        WHERE again.corrects_id = document.id AND again.reason_code = 'reissue' AND again.state <> 'void'
    )
    AND EXISTS (
        SELECT FROM billing.document_line AS line
        WHERE line.document_id = document.id AND CASE line.role
            WHEN 'new' THEN NOT EXISTS (
                SELECT FROM billing.document_line AS again JOIN billing.document AS later ON later.id = again.document_id
                WHERE (again.account, again.contract, again.charge, again.cell, again.segment_start)
                        = (line.account, line.contract, line.charge, line.cell, line.segment_start)
                    AND again.period_end >= line.period_start AND again.role = 'new' AND later.id > document.id
                    AND later.state IN ('reviewed', 'issued') AND later.kind <> 'credit_note'
            )
            ELSE NOT EXISTS (
                SELECT FROM billing.document_line AS again JOIN billing.document AS later ON later.id = again.document_id
                WHERE again.adjusts_id = line.adjusts_id AND again.role = 'reversal'
                    AND later.state IN ('reviewed', 'issued') AND later.kind <> 'credit_note'
            ) AND EXISTS (
                SELECT FROM billing.document_line AS taken_back JOIN billing.document AS before
                    ON before.id = taken_back.document_id
                WHERE taken_back.id = line.adjusts_id AND before.state <> 'void'
            )
        END
    );
COMMENT ON VIEW billing.unbilled_void IS 'Voided invoices and adjustments of which something is billed, or taken back, nowhere since: neither issued anew nor settled with a later document';

CREATE VIEW finance.unbilled_voids AS
SELECT
    void.document_id AS document_id,
    void.number AS number,
    void.kind::text AS kind,
    void.account AS account,
    void.legal_entity AS legal_entity,
    void.currency AS currency,
    void.total_amount AS total_amount,
    void.tax_date AS tax_date,
    void.void_reason_code AS reason,
    void.voided_at AS voided_at,
    void.voided_by AS voided_by
FROM billing.unbilled_void AS void;
COMMENT ON VIEW finance.unbilled_voids IS 'Voided invoices and adjustments of which something is billed, or taken back, nowhere since: to be issued anew, where they were not withdrawn for good';
COMMENT ON COLUMN finance.unbilled_voids.document_id IS 'Document (finance.invoices)';
COMMENT ON COLUMN finance.unbilled_voids.number IS 'Its number, which stays used';
COMMENT ON COLUMN finance.unbilled_voids.kind IS 'invoice or adjustment';
COMMENT ON COLUMN finance.unbilled_voids.account IS 'Who was to pay';
COMMENT ON COLUMN finance.unbilled_voids.legal_entity IS 'Who sold';
COMMENT ON COLUMN finance.unbilled_voids.currency IS 'ISO 4217 currency of the amount';
COMMENT ON COLUMN finance.unbilled_voids.total_amount IS 'What it came to, with tax';
COMMENT ON COLUMN finance.unbilled_voids.tax_date IS 'Its tax date: the last day of its period';
COMMENT ON COLUMN finance.unbilled_voids.reason IS 'Why it was voided, as a code';
COMMENT ON COLUMN finance.unbilled_voids.voided_at IS 'When it was voided, UTC';
COMMENT ON COLUMN finance.unbilled_voids.voided_by IS 'Who voided it';
