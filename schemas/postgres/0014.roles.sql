-- Who may do what. The program works as tally_program, which owns nothing: it adds rows, changes only the columns named
-- here, and deletes only where something is not yet anybody's document. So no mistake of it changes what was billed.
-- Guards of what is reviewed or issued hold the owner too, short of switching them off.

-- Roles belong to the whole server: another database may have made it already. For a login of production see
-- deploy/database.md.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tally_program') THEN
        CREATE ROLE tally_program NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL; -- another database's migration made it at this moment
END $$;

-- An owner that is no superuser may take the role only where it is granted; of one that somebody else made, connecting
-- says who has to grant it.
DO $$
BEGIN
    IF NOT pg_has_role(current_user, 'tally_program', 'SET') THEN
        GRANT tally_program TO CURRENT_USER WITH INHERIT FALSE, SET TRUE;
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    NULL;
END $$;

DO $$
BEGIN
    -- TEMPORARY: batches are staged before they are written.
    EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO tally_program', current_database());
    -- Which migrations are applied, for tally doctor.
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO tally_program', current_schema());
END $$;
GRANT SELECT ON _yoyo_migration TO tally_program;

-- The program reads everything, also what a later migration adds. What else it may do with a table each migration says.
GRANT USAGE ON SCHEMA billing, finance TO tally_program;
GRANT SELECT ON ALL TABLES IN SCHEMA billing, finance TO tally_program;
ALTER DEFAULT PRIVILEGES IN SCHEMA billing GRANT SELECT ON TABLES TO tally_program;
ALTER DEFAULT PRIVILEGES IN SCHEMA finance GRANT SELECT ON TABLES TO tally_program;

-- Append only ----------------------------------------------------------------------------------------------------------

GRANT INSERT ON
    billing.accepted_gap, billing.alert, billing.asset, billing.audit, billing.backfill_event, billing.balance_entry,
    billing.budget, billing.catalog_version, billing.close_entry, billing.close_override, billing.commitment,
    billing.correction, billing.credit_decision, billing.credit_entry, billing.credit_grant, billing.credit_request,
    billing.fx_rate, billing.invoicing_version, billing.overdraft, billing.proposal, billing.proposal_decision,
    billing.proposal_document, billing.proposal_version, billing.quarantine, billing.rated_usage, billing.receipt,
    billing.settlement
TO tally_program;

-- Where it stands ------------------------------------------------------------------------------------------------------

GRANT INSERT, UPDATE (next_offset) ON billing.sink_position TO tally_program;
GRANT INSERT, UPDATE (relayed_at) ON billing.outbox, billing.alert_outbox TO tally_program;
GRANT INSERT, DELETE ON billing.correction_outbox TO tally_program;
GRANT INSERT, UPDATE (events, sent, state, updated_at) ON billing.backfill TO tally_program;
GRANT INSERT, UPDATE (
    state, stage, reason, message, attempts, replays, parked_at, not_before, account, idempotency_key, event_type,
    event_time, appended_at, key, value, letter_topic, letter_partition, letter_offset, letter_dead, updated_at,
    decision, decided_at, decided_by, decision_reason
) ON billing.unrated_event TO tally_program;
GRANT INSERT, UPDATE (
    settled_blocks, highest, first_at, last_at, updated_at, mark, mark_at, older_mark, older_mark_at, closed_at
) ON billing.source TO tally_program;
GRANT INSERT, UPDATE (bits, updated_at), DELETE ON billing.source_sequence TO tally_program;
GRANT INSERT, DELETE ON billing.source_hour TO tally_program;
GRANT INSERT, UPDATE (
    first_sequence, last_sequence, delivered, rejected, spooled, first_spooled, rejections, said_at, received_at
), DELETE ON billing.control_total TO tally_program;
GRANT INSERT, UPDATE (usage_mark, computed_at) ON billing.balance_mark TO tally_program;
GRANT INSERT, UPDATE (drawn) ON billing.credit_estimate TO tally_program;
GRANT INSERT, DELETE ON billing.credit_balance TO tally_program;

-- Usage and documents --------------------------------------------------------------------------------------------------

GRANT INSERT, UPDATE (state) ON billing.invoice TO tally_program;
GRANT INSERT, UPDATE (
    quantity, amount, events, late_events, first_event_at, last_event_at, reference_values, price_class, updated_at
) ON billing.invoice_line TO tally_program;
GRANT INSERT, UPDATE (finished_at) ON billing.close_run TO tally_program;
GRANT INSERT, UPDATE (state, outcome, problem, documents, finished_at) ON billing.close_task TO tally_program;
GRANT INSERT, UPDATE (last) ON billing.number_range TO tally_program;
-- Drafts are deleted, with their rows: the guards below keep all others.
GRANT INSERT, UPDATE (
    state, number, number_series, number_year, number_serial, issue_date, due_date, issued_at, issued_by,
    reviewed_at, reviewed_by, voided_at, voided_by, void_reason_code, void_note,
    fx_currency, fx_rate, fx_date, fx_source, fx_net_amount, fx_tax_amount, fx_total_amount
), DELETE ON billing.document TO tally_program;
GRANT INSERT ON billing.document_line, billing.document_tax, billing.document_discount TO tally_program;
-- Ids are taken before the rows are written; where the row takes its own, no right is needed.
GRANT USAGE ON SEQUENCE billing.correction_number, billing.document_id_seq, billing.document_line_id_seq
TO tally_program;

-- Months of rated usage ------------------------------------------------------------------------------------------------

-- Partitions are created by who may not create tables, so as the owner, and nothing but a month.
CREATE FUNCTION billing.ensure_month(month date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name text := to_char(month, '"rated_usage_"YYYY_MM');
BEGIN
    IF month IS DISTINCT FROM date_trunc('month', month)::date THEN
        RAISE EXCEPTION 'expected the first day of a month, got %', month;
    END IF;
    PERFORM pg_advisory_xact_lock(2047934465); -- two sinks that meet a new month take turns
    IF to_regclass(format('billing.%I', name)) IS NOT NULL THEN
        RETURN;
    END IF;
    -- Made beside the parent and then attached: that waits for no reader or writer of other months, where creating it as
    -- a partition would lock the parent against both.
    EXECUTE format('CREATE TABLE billing.%I (LIKE billing.rated_usage INCLUDING ALL)', name);
    EXECUTE format(
        'CREATE TRIGGER %I BEFORE TRUNCATE ON billing.%I FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()',
        name || '_no_truncate', name
    );
    EXECUTE format('GRANT SELECT ON billing.%I TO tally_program', name);
    EXECUTE format(
        'ALTER TABLE billing.rated_usage ATTACH PARTITION billing.%I FOR VALUES FROM (%L) TO (%L)',
        name, month, (month + interval '1 month')::date
    );
END $$;
COMMENT ON FUNCTION billing.ensure_month IS 'Create the partition of rated_usage for a month, given by its first day, where it is missing';
REVOKE ALL ON FUNCTION billing.ensure_month FROM PUBLIC;
GRANT EXECUTE ON FUNCTION billing.ensure_month TO tally_program;

-- Rated usage is never changed. Old months go as a whole: ALTER TABLE ... DETACH PARTITION, which no trigger sees.
CREATE TRIGGER rated_usage_append_only BEFORE UPDATE OR DELETE ON billing.rated_usage
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER rated_usage_no_truncate BEFORE TRUNCATE ON billing.rated_usage
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
DO $$
DECLARE
    name text;
BEGIN
    FOR name IN
        SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = 'billing.rated_usage'::regclass
    LOOP
        EXECUTE format(
            'CREATE TRIGGER %I BEFORE TRUNCATE ON billing.%I FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()',
            name || '_no_truncate', name
        );
    END LOOP;
    -- By statement, as the tables of later migrations: a change that finds no row is one as well.
    FOREACH name IN ARRAY '{accepted_gap,audit,backfill_event,catalog_version,close_entry,correction}'::text[] LOOP
        EXECUTE format('DROP TRIGGER %I ON billing.%I', name || '_append_only', name);
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON billing.%I', name || '_no_truncate', name);
        EXECUTE format(
            'CREATE TRIGGER %I BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.%I '
            'FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change()',
            name || '_append_only', name
        );
    END LOOP;
END $$;

-- Immutable once reviewed ----------------------------------------------------------------------------------------------

-- A document is frozen when it is reviewed, or issued without. What happens to it then is one of these, whole.
CREATE OR REPLACE FUNCTION billing.guard_document() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    lawful text[];
BEGIN
    IF TG_OP = 'INSERT' THEN
        RAISE EXCEPTION 'expected a document to begin as draft, got %', NEW.state;
    END IF;
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'document % is %: it is never deleted, void it instead', coalesce(OLD.number, OLD.id::text), OLD.state;
    END IF;
    lawful := CASE
        WHEN OLD.state = 'issued' AND NEW.state = 'void'
            THEN '{state,voided_at,voided_by,void_reason_code,void_note}'::text[]
        WHEN OLD.state = 'reviewed' AND NEW.state = 'issued'
            THEN '{state,number,number_series,number_year,number_serial,issue_date,due_date,issued_at,issued_by}'::text[]
        WHEN OLD.state = 'reviewed' AND NEW.state = 'reviewed' AND OLD.fx_currency IS NULL  -- in the transaction that issues
            THEN '{fx_currency,fx_rate,fx_date,fx_source,fx_net_amount,fx_tax_amount,fx_total_amount}'::text[]
    END;
    IF to_jsonb(NEW) - lawful = to_jsonb(OLD) - lawful THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'document % is %: nothing changes it, but reviewed may become issued and issued void. Write a credit note or void it',
        coalesce(OLD.number, OLD.id::text), OLD.state;
END $$;
COMMENT ON FUNCTION billing.guard_document IS 'Refuses what would change a reviewed or issued document';
DROP TRIGGER document_immutable ON billing.document;
CREATE TRIGGER document_immutable BEFORE UPDATE ON billing.document
    FOR EACH ROW WHEN (OLD.state <> 'draft') EXECUTE FUNCTION billing.guard_document();
DROP TRIGGER document_kept ON billing.document;
CREATE TRIGGER document_kept BEFORE DELETE ON billing.document
    FOR EACH ROW WHEN (OLD.state <> 'draft') EXECUTE FUNCTION billing.guard_document();

CREATE OR REPLACE FUNCTION billing.guard_document_rows() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    frozen record;
BEGIN
    SELECT coalesce(document.number, document.id::text) AS name, document.state INTO frozen
    FROM changed JOIN billing.document ON document.id = changed.document_id WHERE document.state <> 'draft' LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'document % is %: % of %', frozen.name, frozen.state, lower(TG_OP), TG_TABLE_NAME
            USING HINT = 'Write a credit note, or void it and issue it anew.';
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION billing.guard_document_rows IS 'Refuses rows added to or taken from a reviewed or issued document';

-- The usage behind a document is frozen with it: its container, and the container's lines. What comes later goes to a
-- supplement.
DROP TRIGGER invoice_stays_issued ON billing.invoice;
CREATE OR REPLACE FUNCTION billing.guard_invoice_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND OLD.state = 'reviewed' AND NEW.state = 'issued'
        AND to_jsonb(NEW) - 'state' = to_jsonb(OLD) - 'state' THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'invoice % is %: it is never opened again, changed or deleted, what comes now is an adjustment',
        OLD.id, OLD.state;
END $$;
COMMENT ON FUNCTION billing.guard_invoice_state IS 'Refuses what would change a closed container, but that reviewed becomes issued';
CREATE TRIGGER invoice_immutable BEFORE UPDATE ON billing.invoice
    FOR EACH ROW WHEN (OLD.state NOT IN ('open', 'draft') AND OLD IS DISTINCT FROM NEW)
    EXECUTE FUNCTION billing.guard_invoice_state();
DROP TRIGGER invoice_kept ON billing.invoice;
CREATE TRIGGER invoice_kept BEFORE DELETE ON billing.invoice
    FOR EACH ROW WHEN (OLD.state NOT IN ('open', 'draft')) EXECUTE FUNCTION billing.guard_invoice_state();

-- Lines are what the sink writes most: one look per statement, by the containers' keys. What a line counts under is never
-- changed, open or not; a trigger on columns costs nothing where they are not named.
CREATE FUNCTION billing.guard_lines() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    closed record;
BEGIN
    SELECT id, state INTO closed FROM billing.invoice
    WHERE id = ANY(ARRAY(SELECT invoice_id FROM changed)) AND state NOT IN ('open', 'draft');
    IF FOUND THEN
        RAISE EXCEPTION 'invoice % is %: % of its lines', closed.id, closed.state, lower(TG_OP)
            USING HINT = 'Usage of a closed period goes to a supplement, a difference to an adjustment.';
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION billing.guard_lines IS 'Refuses changed or deleted lines of a closed container';
CREATE TRIGGER invoice_line_changed AFTER UPDATE ON billing.invoice_line REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION billing.guard_lines();
CREATE TRIGGER invoice_line_deleted AFTER DELETE ON billing.invoice_line REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION billing.guard_lines();
CREATE TRIGGER invoice_line_terms BEFORE UPDATE OF invoice_id, contract, plan, plan_version, price_version, meter,
        meter_version, charge, segment_start, cell ON billing.invoice_line
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
