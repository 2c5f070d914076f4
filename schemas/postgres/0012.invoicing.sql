-- What invoices need beside prices: who invoices and who pays, taxes, coupons, rates of exchange. Every version is kept,
-- so that an invoice made again from what was known then is the same.

CREATE TABLE billing.invoicing_version (
    kind       text        NOT NULL CHECK (kind IN ('legal_entity', 'customer', 'tax', 'coupon')),
    id         text        NOT NULL,
    version    integer     NOT NULL CHECK (version >= 1),
    valid_from date        NOT NULL DEFAULT '1970-01-01',
    document   jsonb       NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    applied_by text        NOT NULL CHECK (btrim(applied_by) <> ''),
    reason     text        NOT NULL DEFAULT '',
    PRIMARY KEY (kind, id, version)
);
CREATE INDEX invoicing_version_applied ON billing.invoicing_version (kind, applied_at);
COMMENT ON TABLE billing.invoicing_version IS 'Immutable versions of legal entities, customers, taxes and coupons. On a day the newest version that is valid by then counts';
COMMENT ON COLUMN billing.invoicing_version.valid_from IS 'First day it counts, by the tax date of a document';
COMMENT ON COLUMN billing.invoicing_version.applied_at IS 'By the clock of the database, under a lock: see billing.invoicing_mark';
CREATE TRIGGER invoicing_version_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.invoicing_version
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

-- Versions and rates get their times under a lock, so that what a mark is before stays before it.
CREATE FUNCTION billing.lock_invoicing() RETURNS void LANGUAGE sql AS $$
    SELECT pg_advisory_xact_lock(hashtextextended('tally.invoicing', 0))
$$;
COMMENT ON FUNCTION billing.lock_invoicing IS 'Wait until nobody else adds versions or rates, and keep others out until the transaction ends';

CREATE FUNCTION billing.invoicing_mark() RETURNS timestamptz LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('tally.invoicing', 0));
    RETURN clock_timestamp();
END $$;
COMMENT ON FUNCTION billing.invoicing_mark IS 'A time that versions and rates known by now are before, and all later ones behind';

CREATE TABLE billing.asset (
    sha256     text        PRIMARY KEY CHECK (sha256 = encode(sha256(content), 'hex')),
    media_type text        NOT NULL CHECK (media_type IN ('image/svg+xml', 'image/png', 'image/jpeg')),
    content    bytea       NOT NULL CHECK (octet_length(content) <= 1048576),
    added_at   timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE billing.asset IS 'Images that documents show, by their content: a logo that changed is another asset, and old documents keep theirs';
CREATE TRIGGER asset_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.asset
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

CREATE TABLE billing.fx_rate (
    source    text        NOT NULL,
    base      text        NOT NULL CHECK (base ~ '^[A-Z]{3}$'),
    currency  text        NOT NULL CHECK (currency ~ '^[A-Z]{3}$' AND currency <> base),
    day       date        NOT NULL,
    revision  integer     NOT NULL DEFAULT 1 CHECK (revision >= 1),
    rate      numeric     NOT NULL CHECK (rate > 0),
    loaded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    loaded_by text        NOT NULL CHECK (btrim(loaded_by) <> ''),
    reason    text        NOT NULL DEFAULT '' CHECK (revision = 1 OR btrim(reason) <> ''),
    PRIMARY KEY (source, base, currency, day, revision)
);
COMMENT ON TABLE billing.fx_rate IS 'Reference rates of exchange as their source published them, loaded from files; append only: a correction is a further revision, and the last one counts';
COMMENT ON COLUMN billing.fx_rate.source IS 'Who published it, such as ECB';
COMMENT ON COLUMN billing.fx_rate.day IS 'Day it was published for, by the source''s calendar; there is none for days without trade';
COMMENT ON COLUMN billing.fx_rate.rate IS 'Units of the currency for one of the base';
CREATE TRIGGER fx_rate_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.fx_rate
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

-- What finance reads -----------------------------------------------------------------------------------------------------

CREATE VIEW finance.exchange_rates AS
SELECT DISTINCT ON (rate.source, rate.base, rate.currency, rate.day)
    rate.source AS source,
    rate.base AS base,
    rate.currency AS currency,
    rate.day AS day,
    rate.rate AS rate,
    rate.revision AS revision,
    rate.loaded_at AS loaded_at,
    rate.loaded_by AS loaded_by,
    rate.reason AS reason
FROM billing.fx_rate AS rate
ORDER BY rate.source, rate.base, rate.currency, rate.day, rate.revision DESC;
COMMENT ON VIEW finance.exchange_rates IS 'Reference rates of exchange that count, by day; an invoice takes the last one on or before its day';
COMMENT ON COLUMN finance.exchange_rates.source IS 'Who published it, such as ECB';
COMMENT ON COLUMN finance.exchange_rates.base IS 'ISO 4217 currency that one unit is of';
COMMENT ON COLUMN finance.exchange_rates.currency IS 'ISO 4217 currency of the rate';
COMMENT ON COLUMN finance.exchange_rates.day IS 'Day it was published for';
COMMENT ON COLUMN finance.exchange_rates.rate IS 'Units of the currency for one of the base, as published';
COMMENT ON COLUMN finance.exchange_rates.revision IS '1, or how often it was loaded with another rate';
COMMENT ON COLUMN finance.exchange_rates.loaded_at IS 'When it was loaded, UTC';
COMMENT ON COLUMN finance.exchange_rates.loaded_by IS 'Who loaded it';
COMMENT ON COLUMN finance.exchange_rates.reason IS 'Why it was corrected';

CREATE VIEW finance.invoicing_changes AS
SELECT
    version.kind AS kind,
    version.id AS id,
    version.version AS version,
    version.valid_from AS valid_from,
    version.document AS document,
    version.applied_at AS applied_at,
    version.applied_by AS applied_by,
    version.reason AS reason
FROM billing.invoicing_version AS version;
COMMENT ON VIEW finance.invoicing_changes IS 'Every version of the legal entities, customers, taxes and coupons that invoices are made with';
COMMENT ON COLUMN finance.invoicing_changes.kind IS 'legal_entity, customer, tax or coupon';
COMMENT ON COLUMN finance.invoicing_changes.id IS 'Its id; of a customer the account''s';
COMMENT ON COLUMN finance.invoicing_changes.version IS 'Counts from 1';
COMMENT ON COLUMN finance.invoicing_changes.valid_from IS 'First day it counts, by the tax date of a document; 1970-01-01 is always';
COMMENT ON COLUMN finance.invoicing_changes.document IS 'What it says';
COMMENT ON COLUMN finance.invoicing_changes.applied_at IS 'When it was applied, UTC';
COMMENT ON COLUMN finance.invoicing_changes.applied_by IS 'Who applied it';
COMMENT ON COLUMN finance.invoicing_changes.reason IS 'Why';
