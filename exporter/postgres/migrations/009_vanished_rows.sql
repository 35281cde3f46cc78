-- Proxies of earlier versions can still write.
--
-- What a server has confirmed and then lost: rows of an asynchronous failover, of a restored backup, or of a crash
-- with synchronous_commit = off. IF NOT EXISTS: the ledger may be older than the other tables.

ALTER TABLE access_log_run ADD COLUMN IF NOT EXISTS vanished bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN access_log_run.vanished IS
  'Rows that the server had confirmed and then lost, as in a failover to a standby that lagged behind; found at the next connection';

-- A proxy calls it when it connects. It compares what the server has confirmed to this run with what its ledger has,
-- which was committed in the same transactions. Rows may be in doubt, but these are not among the confirmed ones.
CREATE OR REPLACE FUNCTION access_log_run_confirm(run uuid, confirmed bigint) RETURNS bigint
LANGUAGE sql SECURITY DEFINER AS $$
  UPDATE access_log_run SET vanished = greatest(vanished, confirmed - (
    SELECT coalesce(sum(rows), 0) FROM access_log_run_day WHERE access_log_run_day.run_id = run))
  WHERE run_id = run AND owner = session_user
  RETURNING vanished
$$;
COMMENT ON FUNCTION access_log_run_confirm(uuid, bigint) IS
  'Records how many of the rows that were confirmed to a run its ledger does not have any more, and returns it';
REVOKE EXECUTE ON FUNCTION access_log_run_confirm(uuid, bigint) FROM PUBLIC;
DO $$
DECLARE
  grantee_name text;
BEGIN
  EXECUTE format('ALTER FUNCTION access_log_run_confirm(uuid, bigint) SET search_path = %I, pg_temp', current_schema());
  FOR grantee_name IN SELECT granted.grantee::regrole::text FROM pg_proc, aclexplode(proacl) AS granted
                      WHERE pg_proc.oid = 'access_log_run_record'::regproc AND grantee <> proowner AND grantee <> 0 LOOP
    EXECUTE format('GRANT EXECUTE ON FUNCTION access_log_run_confirm(uuid, bigint) TO %s', grantee_name);
  END LOOP;
END $$;
