-- What came of documents after they were issued: why credits were given back, discounts of lines taken back or restated,
-- and checks that nothing is given back twice.

-- Why an entry is there. The table is append only: what there is says it by its note, and a new type of the column fills
-- it in without an UPDATE, past no trigger.
ALTER TABLE billing.credit_entry ADD COLUMN kind text;
ALTER TABLE billing.credit_entry
    ALTER COLUMN kind TYPE text USING CASE
        WHEN amount < 0 AND document_id IS NOT NULL AND note LIKE 'credit note %' THEN 'credited'
        WHEN amount < 0 AND document_id IS NOT NULL AND note LIKE 'void of %' THEN 'voided'
        WHEN amount < 0 AND document_id IS NOT NULL THEN 'restated'
        ELSE 'drawn'
    END,
    ALTER COLUMN kind SET DEFAULT 'drawn',
    ALTER COLUMN kind SET NOT NULL,
    ADD CHECK (kind IN ('drawn', 'credited', 'voided', 'restated')),
    ADD CHECK (kind = 'drawn' OR amount < 0);
COMMENT ON COLUMN billing.credit_entry.kind IS 'drawn (of units also given back, since less was used); below 0 and given back: credited by a credit note, voided with its document, restated: its month needs less';

CREATE OR REPLACE VIEW finance.credit_entries AS
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
    entry.note AS note,
    entry.kind AS kind
FROM billing.credit_entry AS entry
JOIN billing.credit_grant AS given ON given.id = entry.grant_id;
COMMENT ON COLUMN finance.credit_entries.kind IS 'drawn; credited: given back by a credit note; voided: with its document; restated: its month, reckoned anew, needs less';

ALTER TABLE billing.document_discount ADD COLUMN restates boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN billing.document_discount.restates IS 'Whether it is of lines that take back or restate those of other documents: then it is no further use of the coupon';

CREATE OR REPLACE VIEW finance.document_discounts AS
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
    discount.amount AS amount,
    discount.restates AS restates
FROM billing.document_discount AS discount JOIN billing.document ON document.id = discount.document_id;
COMMENT ON COLUMN finance.document_discounts.restates IS 'Whether it is of lines that take back or restate lines of other documents, such as late usage or a credit note';

CREATE OR REPLACE VIEW billing.coupon_use AS
SELECT
    discount.coupon AS coupon,
    document.account AS account,
    document.legal_entity AS legal_entity,
    document.currency AS currency,
    document.period_start AS period_start,
    sum(discount.amount) AS amount
FROM billing.document_discount AS discount
JOIN billing.document ON document.id = discount.document_id
WHERE document.state IN ('reviewed', 'issued') AND document.kind = 'invoice' AND discount.coupon <> ''
    AND NOT discount.restates
GROUP BY discount.coupon, document.account, document.legal_entity, document.currency, document.period_start;
COMMENT ON VIEW billing.coupon_use IS 'Billing periods in which an invoice that is issued, or reviewed to be, took a coupon: a use each. A voided invoice gives its use back; restating one is no further use';

CREATE OR REPLACE VIEW finance.document_checks AS
WITH line AS (
    SELECT document_id, sum(amount) AS amount, sum(discount_amount) AS discount, sum(net_amount) AS net,
        sum(tax_amount) AS tax, sum(total_amount) AS total, sum(net_amount + tax_amount) AS net_and_tax,
        -- Of lines that take back or restate others nobody wrote down before this migration which discounts they have.
        sum(discount_amount) FILTER (
            WHERE (role = 'reversal' OR kind = 'adjustment') AND NOT detail ? 'discounts'
        ) AS unnamed
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
), discount AS (
    -- Of the whole document, coupons that pay the total lower no line.
    SELECT document_id, sum(amount) AS amount
    FROM billing.document_discount AS discount JOIN billing.document ON document.id = discount.document_id
    WHERE discount.document_line_id IS NOT NULL OR discount.coupon = ''
        OR coalesce(document.content #>> '{policies,coupons}', '') <> 'after_tax'
    GROUP BY document_id
), credited AS (
    SELECT line.adjusts_id AS line_id, sum(line.total_amount) AS total
    FROM billing.document_line AS line JOIN billing.document ON document.id = line.document_id
    WHERE document.kind = 'credit_note' AND document.state = 'issued' GROUP BY line.adjusts_id
), beyond AS (
    SELECT line.document_id, sum(abs(line.total_amount + credited.total)) AS total
    FROM billing.document_line AS line JOIN credited ON credited.line_id = line.id
    WHERE -credited.total NOT BETWEEN least(line.total_amount, 0) AND greatest(line.total_amount, 0)
    GROUP BY line.document_id
), given_twice AS (
    -- Credited after a later document took it back, and before that was undone.
    SELECT line.document_id, sum(-credit.total_amount) AS total
    FROM billing.document_line AS line
    JOIN billing.document_line AS credit ON credit.adjusts_id = line.id
    JOIN billing.document AS note ON note.id = credit.document_id AND note.kind = 'credit_note' AND note.state = 'issued'
    WHERE EXISTS (
        SELECT FROM billing.document_line AS reversal JOIN billing.document AS later ON later.id = reversal.document_id
        WHERE reversal.adjusts_id = line.id AND reversal.role = 'reversal' AND later.id < note.id
            AND later.kind <> 'credit_note' AND later.state = 'issued' AND NOT EXISTS (
                SELECT FROM billing.document_line AS undoing
                JOIN billing.document AS before ON before.id = undoing.document_id
                WHERE undoing.adjusts_id = reversal.id AND before.id < note.id
                    AND before.kind = 'credit_note' AND before.state = 'issued'
            )
    )
    GROUP BY line.document_id
), checked AS (
    SELECT document.id AS document_id, document.number, check_name, expected, found
    FROM billing.document
    LEFT JOIN line ON line.document_id = document.id
    LEFT JOIN tax ON tax.document_id = document.id
    LEFT JOIN discount ON discount.document_id = document.id
    LEFT JOIN beyond ON beyond.document_id = document.id
    LEFT JOIN given_twice ON given_twice.document_id = document.id
    CROSS JOIN LATERAL (VALUES
        ('lines = amount of the lines', document.lines_amount, coalesce(line.amount, 0)),
        ('discounts = discounts of the lines', document.discounts_amount, coalesce(line.discount, 0)),
        ('discounts = discounts by coupon and grant', document.discounts_amount - coalesce(line.unnamed, 0),
            coalesce(discount.amount, 0)),
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
        ('credit notes take back no more of a line than there was', 0, coalesce(beyond.total, 0)),
        ('no credit note takes back what another document had taken back', 0, coalesce(given_twice.total, 0))
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
