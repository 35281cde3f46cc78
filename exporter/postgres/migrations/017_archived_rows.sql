-- Proxies of earlier versions can still write.
--
-- Rows that were written again after their day had left the table are removed, if the archive has them. So it must be
-- known which files the totals of pruned rows count, and how many rows were removed. An archive belongs to one log.

DO $$ BEGIN
  ALTER TABLE access_log_rollup ADD COLUMN IF NOT EXISTS archive_files text[];
END $$;
COMMENT ON COLUMN access_log_rollup.archive_files IS 'Names of the files of the archive that have these rows, once they left access_log; empty = none has; NULL = they are still there, or an earlier version pruned them';

CREATE TABLE IF NOT EXISTS access_log_repeated (
  day         date        NOT NULL,
  node        text        NOT NULL,
  requests    bigint      NOT NULL,
  removed_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE access_log_repeated IS 'Rows that were written again after they had left access_log, and were removed again because the archive has them. access_log_run_day counts them twice';
COMMENT ON COLUMN access_log_repeated.day IS 'Day (UTC) of started_at of the rows';
COMMENT ON COLUMN access_log_repeated.node IS 'node of the rows; empty = not known';
COMMENT ON COLUMN access_log_repeated.requests IS 'Number of rows';
COMMENT ON COLUMN access_log_repeated.removed_at IS 'When they were removed';

-- Who may read the ledger may read what corrects it.
DO $$
DECLARE
  statement text;
BEGIN
  FOR statement IN
    SELECT format('GRANT SELECT ON access_log_repeated TO %s', CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END)
    FROM pg_class, aclexplode(relacl)
    WHERE oid = 'access_log_run_day'::regclass AND privilege_type = 'SELECT' AND grantee <> relowner
  LOOP
    EXECUTE statement;
  END LOOP;
END $$;

DO $$ BEGIN
  IF to_regprocedure('access_log_id()') IS NULL THEN
    EXECUTE format('CREATE FUNCTION access_log_id() RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE AS %L',
                   format('SELECT %L::uuid', gen_random_uuid()));
  END IF;
END $$;
COMMENT ON FUNCTION access_log_id() IS 'Tells this log from others. The folder of its archive has the same id';

-- What an earlier version made of days that began at another hour, after a change of the clock.
DO $$ BEGIN
  IF EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
    SET LOCAL citus.multi_shard_modify_mode TO 'sequential';
  END IF;
  DELETE FROM access_log_rollup
  WHERE pruned_at IS NULL AND until_at - from_at = interval '24 hours'
  AND (from_at AT TIME ZONE 'UTC')::time <> '00:00';
END $$;
