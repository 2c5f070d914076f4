-- The life of a price change: one person proposes it, another decides, and what is approved is published in the
-- transaction of the decision. Nothing here is ever changed or deleted.

CREATE TABLE billing.proposal (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    proposed_at timestamptz NOT NULL DEFAULT now(),
    proposed_by text        NOT NULL CHECK (btrim(proposed_by) <> ''),
    reason      text        NOT NULL CHECK (btrim(reason) <> ''),
    valid_from  timestamptz,
    valid_after interval,
    back_dated  boolean     NOT NULL,
    CHECK (num_nonnulls(valid_from, valid_after) <= 1)
);
COMMENT ON TABLE billing.proposal IS 'Price changes that somebody proposed, and why';
COMMENT ON COLUMN billing.proposal.valid_from IS 'From which event time all of it is to count, in place of what its documents say; null leaves it to them';
COMMENT ON COLUMN billing.proposal.valid_after IS 'The same, as a time after its approval';
COMMENT ON COLUMN billing.proposal.back_dated IS 'Whether it may count from before its approval: a correction of open periods';

CREATE TABLE billing.proposal_document (
    proposal_id    bigint               NOT NULL REFERENCES billing.proposal,
    kind           billing.catalog_kind NOT NULL,
    id             text                 NOT NULL,
    version_before integer,
    document       jsonb                NOT NULL,
    valid_from     timestamptz,
    file           text                 NOT NULL,
    line           integer              NOT NULL,
    path           text                 NOT NULL,
    PRIMARY KEY (proposal_id, kind, id),
    FOREIGN KEY (kind, id, version_before) REFERENCES billing.catalog_version (kind, id, version)
);
COMMENT ON TABLE billing.proposal_document IS 'The documents of a proposal as they are to become, and the versions they were held against';
COMMENT ON COLUMN billing.proposal_document.version_before IS 'The newest version when it was proposed; null for a new document. It can be approved only while that is still the newest';
COMMENT ON COLUMN billing.proposal_document.file IS 'File it was read from, with line and path, for messages';

CREATE TYPE billing.proposal_verdict AS ENUM ('approved', 'rejected');

CREATE TABLE billing.proposal_decision (
    proposal_id bigint                   PRIMARY KEY REFERENCES billing.proposal,
    verdict     billing.proposal_verdict NOT NULL,
    decided_at  timestamptz              NOT NULL DEFAULT now(),
    decided_by  text                     NOT NULL CHECK (btrim(decided_by) <> ''),
    reason      text                     NOT NULL DEFAULT ''
);
COMMENT ON TABLE billing.proposal_decision IS 'What became of a proposal: decided once, approved only under another name than the proposer''s';

CREATE TABLE billing.proposal_version (
    proposal_id bigint               NOT NULL REFERENCES billing.proposal_decision,
    kind        billing.catalog_kind NOT NULL,
    id          text                 NOT NULL,
    version     integer              NOT NULL,
    PRIMARY KEY (kind, id, version),
    FOREIGN KEY (kind, id, version) REFERENCES billing.catalog_version
);
COMMENT ON TABLE billing.proposal_version IS 'The versions that an approved proposal became';
CREATE INDEX proposal_version_proposal ON billing.proposal_version (proposal_id);

-- Names are compared as people read them. Whether a name is the person's own, nothing here can know.
CREATE FUNCTION billing.refuse_own_approval() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    proposer text;
BEGIN
    SELECT proposed_by INTO proposer FROM billing.proposal WHERE id = NEW.proposal_id;
    IF NEW.verdict = 'approved' AND lower(btrim(NEW.decided_by)) = lower(btrim(proposer)) THEN
        RAISE EXCEPTION 'proposal % is %''s own: expected another person to approve it', NEW.proposal_id, proposer;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER proposal_decision_second_person BEFORE INSERT ON billing.proposal_decision
    FOR EACH ROW EXECUTE FUNCTION billing.refuse_own_approval();

CREATE TRIGGER proposal_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.proposal
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER proposal_document_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.proposal_document
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER proposal_decision_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.proposal_decision
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER proposal_version_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.proposal_version
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

CREATE VIEW finance.price_changes AS
SELECT
    proposal.id AS proposal_id,
    document.kind::text AS kind,
    document.id AS id,
    coalesce(decision.verdict::text, 'open') AS state,
    document.version_before AS version_before,
    published.version AS version_after,
    catalog.valid_from AS valid_from,
    proposal.proposed_by AS proposed_by,
    proposal.proposed_at AS proposed_at,
    proposal.reason AS reason,
    decision.decided_by AS decided_by,
    decision.decided_at AS decided_at,
    decision.reason AS decision_reason
FROM billing.proposal
JOIN billing.proposal_document AS document ON document.proposal_id = proposal.id
LEFT JOIN billing.proposal_decision AS decision ON decision.proposal_id = proposal.id
LEFT JOIN billing.proposal_version AS published
    ON published.proposal_id = proposal.id AND published.kind = document.kind AND published.id = document.id
LEFT JOIN billing.catalog_version AS catalog
    ON catalog.kind = published.kind AND catalog.id = published.id AND catalog.version = published.version;
COMMENT ON VIEW finance.price_changes IS 'Every proposed change of a meter, plan or price list: who, when, why, what it replaced and what it became';
COMMENT ON COLUMN finance.price_changes.proposal_id IS 'Id of the proposal; tally plans proposals ID shows it';
COMMENT ON COLUMN finance.price_changes.kind IS 'What kind of document changes: meter, plan or price_list';
COMMENT ON COLUMN finance.price_changes.id IS 'Id of the document';
COMMENT ON COLUMN finance.price_changes.state IS 'open, approved or rejected';
COMMENT ON COLUMN finance.price_changes.version_before IS 'Version it replaces; null for a new document';
COMMENT ON COLUMN finance.price_changes.version_after IS 'Version it became; null unless approved';
COMMENT ON COLUMN finance.price_changes.valid_from IS 'From which event time that version counts, UTC';
COMMENT ON COLUMN finance.price_changes.proposed_by IS 'Who proposed it';
COMMENT ON COLUMN finance.price_changes.proposed_at IS 'When, UTC';
COMMENT ON COLUMN finance.price_changes.reason IS 'Why';
COMMENT ON COLUMN finance.price_changes.decided_by IS 'Who approved or rejected it';
COMMENT ON COLUMN finance.price_changes.decided_at IS 'When, UTC';
COMMENT ON COLUMN finance.price_changes.decision_reason IS 'Why, where a reason was given';
