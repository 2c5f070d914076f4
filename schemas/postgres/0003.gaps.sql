-- Gap detection: what each producing source sent, by its sequence numbers and by its own control totals, against what
-- arrived. A block of numbers is settled when each of them arrived or was accepted as missing; settled blocks from the
-- first on are folded into one number, so what is looked at is what is open, however much ever arrived.

CREATE TABLE billing.source (
    source         text        PRIMARY KEY,
    name           text        GENERATED ALWAYS AS (regexp_replace(source, '/[0-9a-f]{12}$', '')) STORED,
    settled_blocks bigint      NOT NULL DEFAULT 0,
    highest        bigint      NOT NULL DEFAULT 0,
    first_at       timestamptz,
    last_at        timestamptz,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    mark           bigint      NOT NULL DEFAULT 0,
    mark_at        timestamptz NOT NULL DEFAULT '-infinity',
    older_mark     bigint      NOT NULL DEFAULT 0,
    older_mark_at  timestamptz NOT NULL DEFAULT '-infinity',
    closed_at      timestamptz
);
COMMENT ON TABLE billing.source IS 'Every producing source that numbers its events, and how far its numbers are settled';
COMMENT ON COLUMN billing.source.name IS 'The source without its epoch: the name the service gave itself';
COMMENT ON COLUMN billing.source.settled_blocks IS 'Every number below 1000 times this arrived or was accepted as missing; rows of source_sequence below are folded away';
COMMENT ON COLUMN billing.source.highest IS 'Highest number that arrived; 0 where only its control totals did';
COMMENT ON COLUMN billing.source.first_at IS 'When a rater first committed events of it';
COMMENT ON COLUMN billing.source.last_at IS 'When a rater last committed events of it';
COMMENT ON COLUMN billing.source.updated_at IS 'When highest was last written';
COMMENT ON COLUMN billing.source.mark IS 'Highest number as it stood at mark_at; with older_mark it tells what was due a grace time ago';
COMMENT ON COLUMN billing.source.closed_at IS 'When its producer closed with nothing left to send; null while it is open, or never said';

CREATE TABLE billing.source_hour (
    source   text        NOT NULL,
    hour     timestamptz NOT NULL,
    began_at timestamptz NOT NULL,
    highest  bigint      NOT NULL,
    PRIMARY KEY (source, hour)
);
COMMENT ON TABLE billing.source_hour IS 'Hours of the rater''s commits in which events of a source came, UTC; kept for 37 days. Tells a source''s rhythm, and when a missing number was passed';
COMMENT ON COLUMN billing.source_hour.began_at IS 'When the first events of the hour were committed';
COMMENT ON COLUMN billing.source_hour.highest IS 'Highest number of the source that had arrived then';

CREATE TABLE billing.control_total (
    source         text        NOT NULL,
    hour           timestamptz NOT NULL,
    first_sequence bigint      NOT NULL CHECK (first_sequence >= 1),
    last_sequence  bigint      NOT NULL CHECK (last_sequence >= first_sequence),
    delivered      bigint      NOT NULL,
    rejected       bigint      NOT NULL,
    spooled        bigint      NOT NULL,
    first_spooled  bigint      NOT NULL,
    rejections     jsonb       NOT NULL DEFAULT '[]',
    said_at        timestamptz NOT NULL,
    received_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, hour)
);
COMMENT ON TABLE billing.control_total IS 'What each producer last said of an hour: how many events it emitted and what became of them on its side. Settled hours are kept for 37 days';
COMMENT ON COLUMN billing.control_total.rejections IS 'Numbers that will never be delivered, as [{"first", "last", "reason"}]';

CREATE TABLE billing.accepted_gap (
    id             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source         text        NOT NULL,
    first_sequence bigint      NOT NULL CHECK (first_sequence >= 1),
    last_sequence  bigint      NOT NULL CHECK (last_sequence >= first_sequence),
    verdict        text        NOT NULL CHECK (verdict IN ('lost', 'never_existed', 'sent_again')),
    reason         text        NOT NULL CHECK (reason <> ''),
    actor          text        NOT NULL,
    at             timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX accepted_gap_source ON billing.accepted_gap (source);
COMMENT ON TABLE billing.accepted_gap IS 'Missing numbers that a person accepted, with verdict and reason; append only';
COMMENT ON COLUMN billing.accepted_gap.verdict IS 'lost: was used and cannot be billed; never_existed: the number was never given to an event; sent_again: its event came under another number';
CREATE TRIGGER accepted_gap_append_only BEFORE UPDATE OR DELETE ON billing.accepted_gap
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER accepted_gap_no_truncate BEFORE TRUNCATE ON billing.accepted_gap
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

-- Missing numbers ------------------------------------------------------------------------------------------------------

CREATE FUNCTION billing.accepted(of_source text) RETURNS int8multirange LANGUAGE sql STABLE AS $$
    SELECT coalesce(range_agg(int8range(first_sequence, last_sequence, '[]')), '{}')
    FROM billing.accepted_gap WHERE source = of_source
$$;

CREATE FUNCTION billing.missing_in_block(block bigint, bits bit) RETURNS int8multirange LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(range_agg(int8range(block * 1000 + i, block * 1000 + i + 1)), '{}')
    FROM generate_series(CASE block WHEN 0 THEN 1 ELSE 0 END, 999) AS i
    WHERE get_bit(bits, i) = 0
$$;
COMMENT ON FUNCTION billing.missing_in_block IS 'Numbers of a block whose bit is 0; number 0 is never given';

-- Walks up from the first block that is not settled: what it costs is what it settles, whatever lies above a hole.
CREATE FUNCTION billing.settle(of_source text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    reached  bigint;
    started  bigint;
    stored   bit(1000);
    accepted int8multirange;
    jump     bigint;
BEGIN
    SELECT settled_blocks INTO reached FROM billing.source WHERE source = of_source FOR UPDATE;
    started := reached;
    LOOP
        SELECT bits INTO stored FROM billing.source_sequence WHERE source = of_source AND block = reached;
        IF FOUND AND bit_count(stored) = 1000 THEN
            reached := reached + 1;
            CONTINUE;
        END IF;
        accepted := coalesce(accepted, billing.accepted(of_source));
        IF FOUND THEN
            EXIT WHEN NOT billing.missing_in_block(reached, stored) <@ accepted;
            reached := reached + 1;
        ELSE
            -- No number of this block came: settled only where all of it was accepted, and then as far as that goes.
            SELECT upper(span) / 1000 INTO jump FROM unnest(accepted) AS span
            WHERE span @> int8range(greatest(reached * 1000, 1), (reached + 1) * 1000);
            EXIT WHEN NOT FOUND;
            reached := jump;
        END IF;
    END LOOP;
    IF reached > started THEN
        UPDATE billing.source SET settled_blocks = reached WHERE source = of_source;
        DELETE FROM billing.source_sequence WHERE source = of_source AND block < reached;
    END IF;
END $$;
COMMENT ON FUNCTION billing.settle IS 'Fold the blocks of a source that are settled, from the first on';

CREATE FUNCTION billing.due_sequences(grace interval)
RETURNS TABLE (source text, settled_blocks bigint, due bigint) LANGUAGE sql STABLE AS $$
    -- Nobody counts to 10^18: a client that says more must not make the arithmetic below overflow.
    SELECT source.source, source.settled_blocks, least(1000000000000000000, greatest(
        CASE
            WHEN source.updated_at <= now() - grace THEN source.highest
            WHEN source.mark_at <= now() - grace THEN source.mark
            WHEN source.older_mark_at <= now() - grace THEN source.older_mark
            ELSE 0
        END,
        coalesce(said.last_sequence, 0)
    ))
    FROM billing.source
    LEFT JOIN LATERAL (
        SELECT total.last_sequence FROM billing.control_total AS total
        WHERE total.source = source.source AND total.received_at <= now() - grace
        ORDER BY total.hour DESC LIMIT 1
    ) AS said ON true
$$;
COMMENT ON FUNCTION billing.due_sequences IS 'Per source the number up to which all should have arrived: what had arrived, or its producer had said it emitted, a grace time ago';

-- This one and gap_facts run as their owner: the finance role reads them through its view, and no table behind them.
CREATE FUNCTION billing.sequence_gaps(grace interval)
RETURNS TABLE (source text, first_missing bigint, last_missing bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH due AS (
        SELECT * FROM billing.due_sequences(grace) AS due WHERE due.due >= due.settled_blocks * 1000
    ), incomplete AS MATERIALIZED (  -- counting bits is cheap; only where they fall short is it asked which
        SELECT due.* FROM due
        WHERE due.due - greatest(due.settled_blocks * 1000 - 1, 0) > (
            SELECT coalesce(sum(CASE
                WHEN stored.block < due.due / 1000 THEN bit_count(stored.bits)
                ELSE bit_count(substring(stored.bits FROM 1 FOR (due.due % 1000 + 1)::integer))
            END), 0)
            FROM billing.source_sequence AS stored
            WHERE stored.source = due.source AND stored.block BETWEEN due.settled_blocks AND due.due / 1000
        )
    ), blocks AS (  -- and a last one behind the due number, to see what is absent before it
        SELECT incomplete.source, stored.block, stored.bits, due FROM incomplete
        JOIN billing.source_sequence AS stored ON stored.source = incomplete.source
            AND stored.block BETWEEN incomplete.settled_blocks AND due / 1000
        UNION ALL SELECT incomplete.source, due / 1000 + 1, NULL, due FROM incomplete
        UNION ALL SELECT incomplete.source, settled_blocks - 1, NULL, due FROM incomplete
    ), neighbours AS (
        SELECT blocks.*, lag(block) OVER (PARTITION BY blocks.source ORDER BY block) AS before FROM blocks
    ), missing AS (
        SELECT neighbours.source, int8multirange(int8range(
            greatest((before + 1) * 1000, 1), least(block * 1000, due + 1)
        )) AS numbers
        FROM neighbours WHERE block > before + 1
        UNION ALL
        SELECT blocks.source, billing.missing_in_block(block, bits) * int8multirange(int8range(1, due + 1))
        FROM blocks WHERE bit_count(bits) < 1000
    ), gaps AS (
        SELECT missing.source, range_agg(numbers) - billing.accepted(missing.source) AS numbers
        FROM missing GROUP BY missing.source
    )
    SELECT gaps.source, lower(gap), upper(gap) - 1 FROM gaps, unnest(numbers) AS gap
$$;
COMMENT ON FUNCTION billing.sequence_gaps IS 'Every run of numbers that should have arrived a grace time ago, did not, and was not accepted: usage that may be missing';

CREATE FUNCTION billing.short_hours(grace interval)
RETURNS TABLE (source text, hour timestamptz, emitted bigint, missing bigint) LANGUAGE sql STABLE AS $$
    SELECT total.source, total.hour, total.last_sequence - total.first_sequence + 1, sum(
        least(gap.last_missing, total.last_sequence) - greatest(gap.first_missing, total.first_sequence) + 1
    )::bigint
    FROM billing.sequence_gaps(grace) AS gap
    JOIN billing.control_total AS total ON total.source = gap.source
        AND total.first_sequence <= gap.last_missing AND total.last_sequence >= gap.first_missing
    WHERE total.received_at <= now() - grace
    GROUP BY total.source, total.hour
$$;
COMMENT ON FUNCTION billing.short_hours IS 'Hours of which less arrived, accepted gaps aside, than their producer says it emitted';

CREATE FUNCTION billing.gap_facts(of_source text, first_missing bigint, last_missing bigint)
RETURNS TABLE (
    passed_after timestamptz, passed_before timestamptz, emitted_from timestamptz, emitted_until timestamptz,
    rejected_because text, spooled bigint, said_at timestamptz, confirmed boolean,
    newer_source text, newer_since timestamptz
) LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH said AS (
        SELECT total.* FROM billing.control_total AS total
        WHERE total.source = of_source
            AND total.first_sequence <= gap_facts.last_missing AND total.last_sequence >= gap_facts.first_missing
    )
    SELECT
        (
            SELECT passed.began_at FROM billing.source_hour AS passed
            WHERE passed.source = of_source AND passed.highest < gap_facts.first_missing ORDER BY hour DESC LIMIT 1
        ),
        coalesce((
            SELECT passed.began_at FROM billing.source_hour AS passed
            WHERE passed.source = of_source AND passed.highest > gap_facts.last_missing ORDER BY hour LIMIT 1
        ), (
            SELECT last_at FROM billing.source WHERE source = of_source AND highest > gap_facts.last_missing
        )),
        (SELECT min(hour) FROM said),
        (SELECT max(hour) + interval '1 hour' FROM said),
        (
            SELECT rejection ->> 'reason' FROM said, jsonb_array_elements(rejections) AS rejection
            WHERE (rejection ->> 'first')::bigint <= gap_facts.last_missing
                AND (rejection ->> 'last')::bigint >= gap_facts.first_missing
            LIMIT 1
        ),
        (SELECT sum(said.spooled) FROM said WHERE said.spooled > 0 AND said.first_spooled <= gap_facts.last_missing),
        (SELECT max(said.said_at) FROM said),
        (
            SELECT range_agg(int8range(said.first_sequence, said.last_sequence, '[]'))
                @> int8range(gap_facts.first_missing, gap_facts.last_missing, '[]')
            FROM said
        ),
        newer.source,
        newer.first_at
    FROM (VALUES (true)) AS one
    LEFT JOIN LATERAL (
        SELECT another.source, another.first_at
        FROM billing.source AS this JOIN billing.source AS another USING (name)
        WHERE this.source = of_source AND another.source <> this.source AND another.first_at > this.last_at
        ORDER BY another.first_at LIMIT 1
    ) AS newer ON true
$$;
COMMENT ON FUNCTION billing.gap_facts IS 'What is known of missing numbers: between which commits of the rater the source passed them, in which hours and how their producer says it sent them, and whether the source began anew since';
CREATE INDEX source_name ON billing.source (name);

CREATE FUNCTION billing.likely_cause(
    rejected_because text, spooled bigint, confirmed boolean, newer_source text
) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN rejected_because IS NOT NULL THEN 'rejected'
        WHEN spooled > 0 THEN 'spooled'
        WHEN confirmed THEN 'confirmed'
        WHEN newer_source IS NOT NULL THEN 'restarted'
        ELSE 'unknown'
    END
$$;

CREATE VIEW finance.usage_gaps AS
SELECT
    gap.source AS source,
    gap.first_missing AS first_missing,
    gap.last_missing AS last_missing,
    gap.last_missing - gap.first_missing + 1 AS missing,
    'open' AS state,
    facts.passed_after AS passed_after,
    facts.passed_before AS passed_before,
    facts.emitted_from AS emitted_from,
    facts.emitted_until AS emitted_until,
    billing.likely_cause(facts.rejected_because, facts.spooled, facts.confirmed, facts.newer_source) AS likely_cause,
    NULL::text AS decided_by,
    NULL::timestamptz AS decided_at,
    NULL::text AS decision_reason
FROM billing.sequence_gaps(interval '15 minutes') AS gap
CROSS JOIN LATERAL billing.gap_facts(gap.source, gap.first_missing, gap.last_missing) AS facts
UNION ALL
SELECT
    accepted.source, accepted.first_sequence, accepted.last_sequence,
    accepted.last_sequence - accepted.first_sequence + 1, accepted.verdict, facts.passed_after, facts.passed_before,
    facts.emitted_from, facts.emitted_until,
    billing.likely_cause(facts.rejected_because, facts.spooled, facts.confirmed, facts.newer_source),
    accepted.actor, accepted.at, accepted.reason
FROM billing.accepted_gap AS accepted
CROSS JOIN LATERAL billing.gap_facts(accepted.source, accepted.first_sequence, accepted.last_sequence) AS facts;
COMMENT ON VIEW finance.usage_gaps IS 'Usage that may be missing: sequence numbers that a source used, or passed over, and that did not arrive within 15 minutes; open, or accepted by a person';
COMMENT ON COLUMN finance.usage_gaps.source IS 'Service instance that numbers its events';
COMMENT ON COLUMN finance.usage_gaps.first_missing IS 'First number missing';
COMMENT ON COLUMN finance.usage_gaps.last_missing IS 'Last number missing of this run';
COMMENT ON COLUMN finance.usage_gaps.missing IS 'How many numbers that are: at most as many events';
COMMENT ON COLUMN finance.usage_gaps.state IS 'open, or what a person found: lost, never_existed, or sent_again under another number';
COMMENT ON COLUMN finance.usage_gaps.passed_after IS 'Numbers before it had been rated at this time, UTC; null where none had, or that is more than 37 days ago';
COMMENT ON COLUMN finance.usage_gaps.passed_before IS 'Numbers behind it had been rated at this time, UTC; null where none were';
COMMENT ON COLUMN finance.usage_gaps.emitted_from IS 'Start of the hour in which its producer says it emitted them, UTC; null where it has not said';
COMMENT ON COLUMN finance.usage_gaps.emitted_until IS 'End of that hour or hours, UTC';
COMMENT ON COLUMN finance.usage_gaps.likely_cause IS 'rejected: Kafka refused them for good, or the spool was damaged; spooled: they wait on the producer''s disk; confirmed: Kafka confirmed them to the producer, yet no rater met them; restarted: the source began a new journal since; unknown: nothing tells';
COMMENT ON COLUMN finance.usage_gaps.decided_by IS 'Who accepted it';
COMMENT ON COLUMN finance.usage_gaps.decided_at IS 'When, UTC';
COMMENT ON COLUMN finance.usage_gaps.decision_reason IS 'Why';

-- What arrived before there were sources -------------------------------------------------------------------------------

INSERT INTO billing.source (source, highest, first_at, last_at, updated_at)
SELECT DISTINCT ON (source) source, block * 1000 + length(rtrim(bits::text, '0')) - 1,
    updated_at, updated_at, updated_at
FROM billing.source_sequence ORDER BY source, block DESC;
DO $$ BEGIN PERFORM billing.settle(source) FROM billing.source; END $$;
