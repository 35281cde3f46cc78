-- Proxies of earlier versions can still write.
--
-- The ledger of runs: which proxies ran when, what they saw, and how many rows they wrote for each day.
-- `artifactapi audit` compares it with access_log. docs/architecture.md says what that proves.
-- IF NOT EXISTS: if someone has dropped access_log, the ledger still says what it held.

CREATE TABLE IF NOT EXISTS access_log_run (
  run_id        uuid        PRIMARY KEY,
  node          text        NOT NULL,
  version       text,
  started_at    timestamptz NOT NULL,
  last_seen_at  timestamptz NOT NULL,
  ended_at      timestamptz,
  end_reason    text        CHECK (end_reason IN ('stopped', 'killed', 'unknown')),
  seen          bigint      NOT NULL,
  written       bigint      NOT NULL,
  dropped       bigint      NOT NULL,
  rejected      bigint      NOT NULL,
  waiting       bigint      GENERATED ALWAYS AS (greatest(0, seen - written - dropped - rejected - spooled)) STORED,
  spooled       bigint      NOT NULL,
  rows_per_s    real,
  owner         name        NOT NULL,
  CHECK ((ended_at IS NULL) = (end_reason IS NULL))
) WITH (fillfactor = 50);  -- each batch updates one row, in place
COMMENT ON TABLE access_log_run IS 'One row for each run of a proxy, from its start to its end. Times are those of the database''s clock';
COMMENT ON COLUMN access_log_run.run_id IS 'Random id that the proxy chose at its start';
COMMENT ON COLUMN access_log_run.node IS 'Name of the proxy';
COMMENT ON COLUMN access_log_run.version IS 'Version of artifactapi; NULL = not installed as a package';
COMMENT ON COLUMN access_log_run.started_at IS 'When the run started';
COMMENT ON COLUMN access_log_run.last_seen_at IS 'When the proxy last reported: with each batch, and every 10 s without one';
COMMENT ON COLUMN access_log_run.ended_at IS 'When the run ended; NULL = it runs, or nobody knows that it ended';
COMMENT ON COLUMN access_log_run.end_reason IS 'stopped = an ordinary stop; killed = it was killed, and its journal says what it had seen; unknown = it is gone, and nobody knows what it had seen last; NULL = see ended_at';
COMMENT ON COLUMN access_log_run.seen IS 'Requests that had ended, as the proxy last reported';
COMMENT ON COLUMN access_log_run.written IS 'Of these, requests with a row in access_log';
COMMENT ON COLUMN access_log_run.dropped IS 'Of these, requests lost because memory and disk were full, or unreadable; recorded in access_log_gap';
COMMENT ON COLUMN access_log_run.rejected IS 'Of these, requests whose row PostgreSQL rejected; recorded in access_log_gap';
COMMENT ON COLUMN access_log_run.waiting IS 'Of these, requests whose row waited in memory';
COMMENT ON COLUMN access_log_run.spooled IS 'Of these, requests whose row waited on disk';
COMMENT ON COLUMN access_log_run.rows_per_s IS 'Rows written per second, over the last 10 s or more; NULL = not known yet';
COMMENT ON COLUMN access_log_run.owner IS 'Role that recorded the run; only this role can update it';

CREATE TABLE IF NOT EXISTS access_log_run_day (
  run_id         uuid    NOT NULL,
  origin_run_id  uuid    NOT NULL,
  node           text    NOT NULL,
  day            date    NOT NULL,
  rows           bigint  NOT NULL,
  lost           bigint  NOT NULL,
  PRIMARY KEY (run_id, origin_run_id, node, day)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS access_log_run_day_day_idx ON access_log_run_day (day);
COMMENT ON TABLE access_log_run_day IS 'How many rows each run wrote for each day. Updated in the transaction that writes them, so the sums equal the rows of access_log';
COMMENT ON COLUMN access_log_run_day.run_id IS 'Run that wrote the rows';
COMMENT ON COLUMN access_log_run_day.origin_run_id IS 'Run that saw the requests; differs from run_id if a later run wrote them. All zeros = not recorded';
COMMENT ON COLUMN access_log_run_day.node IS 'node of the rows';
COMMENT ON COLUMN access_log_run_day.day IS 'Day (UTC) of started_at of the rows';
COMMENT ON COLUMN access_log_run_day.rows IS 'Rows inserted into access_log';
COMMENT ON COLUMN access_log_run_day.lost IS 'Sum of entries of the gaps inserted into access_log_gap, by the day of from_at';

ALTER TABLE access_log_gap ADD COLUMN run_id uuid;
COMMENT ON COLUMN access_log_gap.run_id IS 'Run that saw the requests; NULL = written by a version that recorded no runs';


-- What a proxy calls, in the query of each batch. It runs with its owner's rights, so a proxy role needs no
-- privilege on the tables. Nothing ever decreases, so a proxy cannot hide that a row is missing.
CREATE OR REPLACE FUNCTION access_log_run_record(
  run uuid, node_name text, version_name text, age_s double precision, ago_s double precision, ending text,
  seen_count bigint, written_count bigint, dropped_count bigint, rejected_count bigint, spooled_count bigint,
  rate real, origins uuid[], nodes text[], days date[], row_counts bigint[], lost_counts bigint[]
) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  seen_at timestamptz := now() - make_interval(secs => ago_s);
BEGIN
  UPDATE access_log_run SET
    node = node_name, version = version_name, rows_per_s = rate,
    last_seen_at = greatest(last_seen_at, seen_at),
    ended_at = CASE WHEN ending IS NOT NULL THEN greatest(last_seen_at, seen_at) END, end_reason = ending,
    seen = greatest(seen, seen_count), written = greatest(written, written_count),
    dropped = greatest(dropped, dropped_count), rejected = greatest(rejected, rejected_count),
    spooled = spooled_count
  WHERE run_id = run AND owner = session_user;
  IF NOT FOUND THEN
    IF EXISTS (SELECT 1 FROM access_log_run WHERE run_id = run) THEN
      RETURN false;
    END IF;
    INSERT INTO access_log_run (run_id, node, version, started_at, last_seen_at, ended_at, end_reason, seen, written,
                                dropped, rejected, spooled, rows_per_s, owner)
    VALUES (run, node_name, version_name, seen_at - make_interval(secs => age_s), seen_at,
            CASE WHEN ending IS NOT NULL THEN seen_at END, ending, seen_count, written_count,
            dropped_count, rejected_count, spooled_count, rate, session_user);
  END IF;
  IF cardinality(days) > 0 THEN
    INSERT INTO access_log_run_day AS counted (run_id, origin_run_id, node, day, rows, lost)
    SELECT run, origin, name, of_day, greatest(0, row_count), greatest(0, lost_count)
    FROM unnest(origins, nodes, days, row_counts, lost_counts) AS given (origin, name, of_day, row_count, lost_count)
    ON CONFLICT (run_id, origin_run_id, node, day) DO UPDATE SET
      rows = counted.rows + excluded.rows, lost = counted.lost + excluded.lost;
  END IF;
  RETURN true;
END $$;
COMMENT ON FUNCTION access_log_run_record(uuid, text, text, double precision, double precision, text, bigint, bigint, bigint, bigint, bigint, real, uuid[], text[], date[], bigint[], bigint[])
  IS 'Records what a run of a proxy has done. Only for the role that recorded it first; false = it was another role';
REVOKE EXECUTE ON FUNCTION access_log_run_record(uuid, text, text, double precision, double precision, text, bigint, bigint, bigint, bigint, bigint, real, uuid[], text[], date[], bigint[], bigint[]) FROM PUBLIC;

CREATE OR REPLACE FUNCTION access_log_run_state(end_reason text, last_seen_at timestamptz) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
  RETURN coalesce(end_reason, CASE WHEN last_seen_at > now() - interval '30 seconds' THEN 'running' ELSE 'silent' END);
COMMENT ON FUNCTION access_log_run_state(text, timestamptz) IS 'running, silent (has not reported for 30 s), stopped, killed or unknown';

CREATE OR REPLACE VIEW access_log_nodes AS
  SELECT node, access_log_run_state(end_reason, last_seen_at) AS state, version, started_at, last_seen_at, ended_at,
         CASE WHEN access_log_run_state(end_reason, last_seen_at) = 'running' THEN rows_per_s END AS rows_per_s,
         seen, written, waiting, spooled, dropped, rejected, run_id
  FROM (
    SELECT *, row_number() OVER (PARTITION BY node ORDER BY last_seen_at DESC, run_id) AS place FROM access_log_run
    WHERE last_seen_at > now() - interval '7 days'
  ) AS recent
  WHERE end_reason IS NULL OR place = 1;
COMMENT ON VIEW access_log_nodes IS 'The proxies of the last 7 days: every run that has not ended, and the last run of each other node';
COMMENT ON COLUMN access_log_nodes.node IS 'Name of the proxy';
COMMENT ON COLUMN access_log_nodes.state IS 'running; silent = has not reported for 30 s; stopped; killed; unknown = gone, and nobody knows what it had seen last';
COMMENT ON COLUMN access_log_nodes.version IS 'Version of artifactapi; NULL = not installed as a package';
COMMENT ON COLUMN access_log_nodes.started_at IS 'When the run started';
COMMENT ON COLUMN access_log_nodes.last_seen_at IS 'When the proxy last reported';
COMMENT ON COLUMN access_log_nodes.ended_at IS 'When the run ended; NULL = running or silent';
COMMENT ON COLUMN access_log_nodes.rows_per_s IS 'Rows written per second, over the last 10 s or more; NULL = not running, or not known yet';
COMMENT ON COLUMN access_log_nodes.seen IS 'Requests that had ended';
COMMENT ON COLUMN access_log_nodes.written IS 'Of these, requests with a row in access_log';
COMMENT ON COLUMN access_log_nodes.waiting IS 'Of these, requests whose row waits in memory';
COMMENT ON COLUMN access_log_nodes.spooled IS 'Of these, requests whose row waits on disk';
COMMENT ON COLUMN access_log_nodes.dropped IS 'Of these, requests lost because memory and disk were full, or unreadable';
COMMENT ON COLUMN access_log_nodes.rejected IS 'Of these, requests whose row PostgreSQL rejected';
COMMENT ON COLUMN access_log_nodes.run_id IS 'Id of the run; see access_log_run';

-- A fixed search_path, so that a caller cannot substitute another table. And the roles that may write or read
-- the log before this upgrade may use the new tables as well.
DO $$
DECLARE
  signature text := 'access_log_run_record(uuid, text, text, double precision, double precision, text, bigint, bigint, bigint, bigint, bigint, real, uuid[], text[], date[], bigint[], bigint[])';
  grantee_name text;
BEGIN
  EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', signature, current_schema());
  FOR grantee_name IN SELECT granted.grantee::regrole::text FROM pg_proc, aclexplode(proacl) AS granted
                      WHERE pg_proc.oid = 'artifact_record'::regproc AND grantee <> proowner AND grantee <> 0 LOOP
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', signature, grantee_name);
  END LOOP;
  FOR grantee_name IN SELECT granted.grantee::regrole::text FROM pg_class, aclexplode(relacl) AS granted
                      WHERE pg_class.oid = 'access_log_gap'::regclass AND privilege_type = 'SELECT'
                        AND grantee <> relowner AND grantee <> 0 LOOP
    EXECUTE format('GRANT SELECT ON access_log_run, access_log_run_day, access_log_nodes TO %s', grantee_name);
    EXECUTE format('GRANT EXECUTE ON FUNCTION access_log_run_state TO %s', grantee_name);
  END LOOP;
END $$;
