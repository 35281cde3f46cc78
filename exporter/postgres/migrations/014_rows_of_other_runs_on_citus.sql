-- Proxies of earlier versions can still write.
--
-- On Citus, rows of an earlier run are counted again: nothing may ask there for the runs of other nodes, not even in a
-- condition that is never reached.

CREATE OR REPLACE FUNCTION access_log_run_record(
  run uuid, node_name text, version_name text, age_s double precision, ago_s double precision, ending text,
  seen_count bigint, written_count bigint, dropped_count bigint, rejected_count bigint, spooled_count bigint,
  rate real, origins uuid[], nodes text[], days date[], row_counts bigint[], lost_counts bigint[]
) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  seen_at timestamptz := now() - make_interval(secs => ago_s);
BEGIN
  IF seen_count IS NOT NULL THEN
    UPDATE access_log_run SET
      version = version_name, rows_per_s = rate,
      last_seen_at = greatest(last_seen_at, seen_at),
      ended_at = CASE WHEN ending IS NOT NULL THEN greatest(last_seen_at, seen_at) END, end_reason = ending,
      seen = greatest(seen, seen_count), written = greatest(written, written_count),
      dropped = greatest(dropped, dropped_count), rejected = greatest(rejected, rejected_count),
      spooled = spooled_count
    WHERE run_id = run AND node = node_name AND owner = session_user;
    IF NOT FOUND THEN
      IF EXISTS (SELECT 1 FROM access_log_run WHERE run_id = run AND node = node_name) THEN
        RETURN false;
      END IF;
      INSERT INTO access_log_run (run_id, node, version, started_at, last_seen_at, ended_at, end_reason, seen, written,
                                  dropped, rejected, spooled, rows_per_s, owner)
      VALUES (run, node_name, version_name, seen_at - make_interval(secs => age_s), seen_at,
              CASE WHEN ending IS NOT NULL THEN seen_at END, ending, seen_count, written_count,
              dropped_count, rejected_count, spooled_count, rate, session_user);
    END IF;
  -- A worker of a Citus cluster cannot see the runs of other nodes.
  ELSIF to_regclass('pg_catalog.pg_dist_partition') IS NULL THEN
    IF EXISTS (SELECT 1 FROM access_log_run WHERE run_id = run AND owner <> session_user) THEN
      RETURN false;
    END IF;
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

DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION access_log_run_record SET search_path = %I, pg_temp', current_schema());
END $$;
