-- Proxies of earlier versions can still write.
--
-- Advisories that `artifactapi affected --keep` stores, and the fetched packages that they are about.
-- PostgreSQL cannot compare versions as each ecosystem does, so the command stores what it found.


CREATE TABLE advisory (
  advisory_number  bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
  advisory_id      text        NOT NULL,
  package          text        NOT NULL,
  summary          text        NOT NULL,
  severity         text        NOT NULL,
  aliases          text        NOT NULL,
  source           text        NOT NULL,
  withdrawn        text        NOT NULL,
  modified         text        NOT NULL,
  affected         text        NOT NULL,
  kept_at          timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX advisory_package_idx ON advisory (package);
COMMENT ON TABLE advisory IS 'Advisories of `artifactapi affected --keep`: one row for each package that an advisory names';
COMMENT ON COLUMN advisory.advisory_number IS 'Number of the row';
COMMENT ON COLUMN advisory.advisory_id IS 'Id of the advisory, such as GHSA-...; the name of the file if it was a list';
COMMENT ON COLUMN advisory.package IS 'Package URL type, namespace and name, normalized: npm/@scope/name';
COMMENT ON COLUMN advisory.summary IS 'Summary of the advisory; empty = none';
COMMENT ON COLUMN advisory.severity IS 'A word such as high, malicious or listed, or a CVSS vector; empty = not known';
COMMENT ON COLUMN advisory.aliases IS 'Other ids of the advisory, separated by commas';
COMMENT ON COLUMN advisory.source IS 'File that the advisory is from';
COMMENT ON COLUMN advisory.withdrawn IS 'When the advisory was withdrawn; empty = it is valid';
COMMENT ON COLUMN advisory.modified IS 'When the advisory was modified, as it says; empty = not known';
COMMENT ON COLUMN advisory.affected IS 'Affected ranges and versions, in JSON';
COMMENT ON COLUMN advisory.kept_at IS 'When the row was stored';

CREATE TABLE advisory_match (
  purl         text NOT NULL,
  advisory_id  text NOT NULL,
  verdict      text NOT NULL CHECK (verdict IN ('affected', 'possible')),
  severity     text NOT NULL,
  summary      text NOT NULL,
  PRIMARY KEY (purl, advisory_id)
);
COMMENT ON TABLE advisory_match IS 'Fetched packages that kept advisories are about, as of advisory_state.compared_at';
COMMENT ON COLUMN advisory_match.purl IS 'Package URL, as in the table artifact';
COMMENT ON COLUMN advisory_match.advisory_id IS 'Id of the advisory';
COMMENT ON COLUMN advisory_match.verdict IS 'affected; possible = the version cannot be compared';
COMMENT ON COLUMN advisory_match.severity IS 'Severity of the advisory; empty = not known';
COMMENT ON COLUMN advisory_match.summary IS 'Summary of the advisory; empty = none';

CREATE TABLE advisory_state (
  only_row     boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
  kept_at      timestamptz NOT NULL,
  compared_at  timestamptz NOT NULL,
  advisories   bigint      NOT NULL,
  packages     bigint      NOT NULL,
  compared     bigint      NOT NULL
);
COMMENT ON TABLE advisory_state IS 'How old the kept advisories and their comparison are. Empty = none are kept';
COMMENT ON COLUMN advisory_state.only_row IS 'The table has at most one row';
COMMENT ON COLUMN advisory_state.kept_at IS 'When the advisories were stored';
COMMENT ON COLUMN advisory_state.compared_at IS 'When they were last compared with the fetched packages';
COMMENT ON COLUMN advisory_state.advisories IS 'Number of advisories';
COMMENT ON COLUMN advisory_state.packages IS 'Number of different packages that they name';
COMMENT ON COLUMN advisory_state.compared IS 'Number of rows of the table artifact that were compared; later ones were not';

CREATE VIEW access_log_affected AS
  SELECT started_at, flow_id, verdict, advisory_id, severity, summary, purl, package, version, proxy_user, client_ip,
         node, remote, host, response_bytes, cache_status, sha256
  FROM access_log_fetches JOIN advisory_match USING (purl);
COMMENT ON VIEW access_log_affected IS 'Fetches of packages that kept advisories are about: one row for each fetch and advisory. Filter with WHERE started_at >= ...; unfiltered, it scans the whole log';
COMMENT ON COLUMN access_log_affected.verdict IS 'affected; possible = the version cannot be compared';
COMMENT ON COLUMN access_log_affected.advisory_id IS 'Id of the advisory';
COMMENT ON COLUMN access_log_affected.severity IS 'Severity of the advisory; empty = not known';
COMMENT ON COLUMN access_log_affected.summary IS 'Summary of the advisory; empty = none';
DO $$  -- Its other columns mean what they mean in access_log.
DECLARE
  name text;
  meaning text;
BEGIN
  FOR name, meaning IN SELECT attname, col_description(attrelid, attnum) FROM pg_attribute
                       WHERE attrelid = 'access_log'::regclass AND attnum > 0 AND attname IN (
                         SELECT attname FROM pg_attribute WHERE attrelid = 'access_log_affected'::regclass) LOOP
    EXECUTE format('COMMENT ON COLUMN access_log_affected.%I IS %L', name, meaning);
  END LOOP;
END $$;


-- To find the fetched packages that an advisory names, among millions. An index on an expression needs no
-- work when a fetch only changes the counts of a row.
CREATE FUNCTION access_log_package_key(purl text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
  RETURN translate(lower(split_part(split_part(split_part(purl, '@', 1), '?', 1), '#', 1)), '_', '-');
COMMENT ON FUNCTION access_log_package_key(text) IS 'Package URL without version and qualifiers, in lower case and with - for _. Different packages can have the same key';
-- Building it would block the writers of a large table, which gets it later; see exporter/postgres/indexes.py.
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM artifact) THEN
    CREATE INDEX artifact_package_idx ON artifact (access_log_package_key(purl));
  END IF;
END $$;
