-- Proxies of earlier versions can still write.
--
-- What a log on a Citus cluster needs, as far as it is the same on one server. exporter/postgres/citus.sql does the
-- rest when someone distributes the log.


-- Functions with a parsed body (BEGIN ATOMIC) depend on their tables, and views on these functions. Citus refuses to
-- distribute tables with such cycles, and plans queries with parameters only in PL/pgSQL.

CREATE OR REPLACE FUNCTION access_log_remotes(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, requests bigint, bytes numeric, failures bigint,
               p50_ms double precision, p95_ms double precision, p99_ms double precision)
LANGUAGE plpgsql STABLE SET jit = off AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  SELECT coalesce(remote, host), count(*), sum(response_bytes),
         count(*) FILTER (WHERE access_log_failed(status_code)),
         percentile_cont(0.5) WITHIN GROUP (ORDER BY duration_ms),
         percentile_cont(0.95) WITHIN GROUP (ORDER BY duration_ms),
         percentile_cont(0.99) WITHIN GROUP (ORDER BY duration_ms)
  FROM access_log WHERE started_at >= since AND started_at < until
  GROUP BY 1;
END $$;

CREATE OR REPLACE FUNCTION access_log_cache(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, cache_source text, requests bigint, hits bigint, bytes numeric, hit_bytes numeric)
LANGUAGE plpgsql STABLE SET jit = off AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  SELECT remote, cache_source, count(*),
         count(*) FILTER (WHERE access_log_from_cache(cache_status)),
         sum(response_bytes),
         coalesce(sum(response_bytes) FILTER (WHERE access_log_from_cache(cache_status)), 0)
  FROM access_log WHERE started_at >= since AND started_at < until AND cache_status IS NOT NULL
  GROUP BY 1, 2;
END $$;

CREATE OR REPLACE FUNCTION access_log_unknown_hosts(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (host text, port integer, scheme text, requests bigint, callers bigint, sent_bytes numeric,
               first_at timestamptz, last_at timestamptz)
LANGUAGE plpgsql STABLE SET jit = off AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  SELECT host, port, scheme, count(*), count(DISTINCT access_log_caller(proxy_user, client_ip)),
         sum(request_bytes), min(started_at), max(started_at)
  FROM access_log WHERE started_at >= since AND started_at < until AND remote IS NULL
  GROUP BY 1, 2, 3;
END $$;

CREATE OR REPLACE FUNCTION access_log_not_found(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, package text, requests bigint, callers bigint,
               first_at timestamptz, last_at timestamptz)
LANGUAGE plpgsql STABLE SET jit = off AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  SELECT remote, package, count(*), count(DISTINCT access_log_caller(proxy_user, client_ip)),
         min(started_at), max(started_at)
  FROM access_log
  WHERE started_at >= since AND started_at < until AND status_code IN (404, 410) AND package IS NOT NULL
  GROUP BY 1, 2;
END $$;

-- Whatever the span, only an artifact's first fetch ever could not have come from a cache.
CREATE OR REPLACE FUNCTION access_log_redundant(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (purl text, remote text, fetches bigint, clients bigint, avoidable_bytes numeric)
LANGUAGE plpgsql STABLE SET jit = off AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  SELECT purl, min(access_log_fetches.remote), count(*), count(DISTINCT client_ip),
         sum(response_bytes) FILTER (WHERE started_at > first_seen)
  FROM access_log_fetches JOIN artifact USING (purl)
  WHERE started_at >= since AND started_at < until AND status_code = 200
  GROUP BY 1 HAVING bool_or(started_at > first_seen);
END $$;


-- A worker cannot create tables; its coordinator can.
CREATE OR REPLACE FUNCTION access_log_ensure_partition(day date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET timezone = 'UTC' AS $$
DECLARE
  plain_name text := 'access_log_' || to_char(day, 'YYYYMMDD');
  partition_name text := plain_name;
  taken integer := 1;
  is_worker boolean := false;
  created boolean;
  answer text;
BEGIN
  -- If a partition holds part of the day, someone else divides the log into spans.
  IF EXISTS (SELECT FROM access_log_partitions WHERE from_at < day + 1 AND until_at > day) THEN
    RETURN;
  END IF;
  IF to_regclass('pg_catalog.pg_dist_local_group') IS NOT NULL THEN
    EXECUTE 'SELECT groupid > 0 FROM pg_catalog.pg_dist_local_group' INTO is_worker;
  END IF;
  IF is_worker THEN
    EXECUTE 'SELECT success, result FROM pg_catalog.run_command_on_coordinator($1)' INTO created, answer
    USING format('SELECT %I.access_log_ensure_partition(%L)', current_schema(), day);
    IF created IS NOT TRUE THEN
      RAISE EXCEPTION 'The coordinator did not create a partition for %: %', day, answer USING ERRCODE = 'connection_exception';
    END IF;
    RETURN;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtext('artifactapi'), hashtext(current_schema()));
  IF EXISTS (SELECT FROM access_log_partitions WHERE from_at < day + 1 AND until_at > day) THEN
    RETURN;
  END IF;
  -- Query pg_class: the cache behind to_regclass still holds what was true before the wait.
  WHILE EXISTS (SELECT FROM pg_class WHERE relname = partition_name
                AND relnamespace = current_schema()::regnamespace) LOOP
    -- Someone detached this day and kept the table. Late rows for that day still need a partition.
    taken := taken + 1;
    partition_name := plain_name || '_' || taken;
  END LOOP;
  EXECUTE format('CREATE TABLE %I (LIKE access_log INCLUDING ALL)', partition_name);
  EXECUTE format('ALTER TABLE access_log ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                 partition_name, day::timestamptz, (day + 1)::timestamptz);
END $$;


CREATE FUNCTION access_log_size(relation regclass) RETURNS bigint LANGUAGE sql
  RETURN pg_total_relation_size(relation);
COMMENT ON FUNCTION access_log_size(regclass) IS 'Bytes of a partition of access_log with its indexes; of all nodes if the log is distributed';


-- What a proxy calls once for each node of a batch. On Citus, a call runs on the worker that has the rows of its node.

-- One upsert, in the batch's transaction. Sorted, so that two proxies cannot deadlock.
CREATE FUNCTION artifact_add(
  node_name text, purls text[], remotes text[], users text[], firsts timestamptz[], lasts timestamptz[], counts bigint[],
  sizes bigint[]
) RETURNS void LANGUAGE sql SECURITY DEFINER AS $$
  INSERT INTO artifact (purl, remote, first_user, first_seen, last_seen, fetches, bytes)
  SELECT * FROM unnest(purls, remotes, users, firsts, lasts, counts, sizes) AS seen ORDER BY 1
  ON CONFLICT (purl) DO UPDATE SET
    remote = CASE WHEN excluded.first_seen < artifact.first_seen THEN excluded.remote ELSE artifact.remote END,
    first_user = CASE WHEN excluded.first_seen < artifact.first_seen THEN excluded.first_user ELSE artifact.first_user END,
    first_seen = least(artifact.first_seen, excluded.first_seen),
    last_seen = greatest(artifact.last_seen, excluded.last_seen),
    fetches = artifact.fetches + excluded.fetches,
    bytes = artifact.bytes + excluded.bytes
$$;
COMMENT ON FUNCTION artifact_add(text, text[], text[], text[], timestamptz[], timestamptz[], bigint[], bigint[])
  IS 'Adds fetches of one node to the table artifact, one array element per artifact';
REVOKE EXECUTE ON FUNCTION artifact_add(text, text[], text[], text[], timestamptz[], timestamptz[], bigint[], bigint[]) FROM PUBLIC;

-- For proxies of earlier versions.
CREATE OR REPLACE FUNCTION artifact_record(
  purls text[], remotes text[], users text[], firsts timestamptz[], lasts timestamptz[], counts bigint[], sizes bigint[]
) RETURNS void LANGUAGE sql SECURITY DEFINER AS $$
  SELECT artifact_add('', purls, remotes, users, firsts, lasts, counts, sizes)
$$;

-- Without seen_count it only counts rows: those of another node, whose run is recorded under its own node.
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


CREATE OR REPLACE FUNCTION access_log_run_confirm(run uuid, confirmed bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  counted bigint;
  lost bigint;
BEGIN
  SELECT coalesce(sum(rows), 0) INTO counted FROM access_log_run_day WHERE run_id = run;
  UPDATE access_log_run SET vanished = greatest(vanished, confirmed - counted)
  WHERE run_id = run AND owner = session_user
  RETURNING vanished INTO lost;
  RETURN lost;
END $$;


-- A fixed search_path, so that a caller cannot substitute another table. And the roles that may write or read the log
-- before this upgrade may use the new functions as well.
DO $$
DECLARE
  function regprocedure;
  grantee_name text;
BEGIN
  FOR function IN SELECT oid FROM pg_proc WHERE pronamespace = current_schema()::regnamespace AND proname IN (
    'access_log_remotes', 'access_log_cache', 'access_log_unknown_hosts', 'access_log_not_found', 'access_log_redundant',
    'access_log_ensure_partition', 'artifact_add', 'artifact_record', 'access_log_run_record', 'access_log_run_confirm') LOOP
    EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', function, current_schema());
  END LOOP;
  FOR grantee_name IN SELECT granted.grantee::regrole::text FROM pg_proc, aclexplode(proacl) AS granted
                      WHERE pg_proc.oid = 'artifact_record'::regproc AND grantee <> proowner AND grantee <> 0 LOOP
    EXECUTE format('GRANT EXECUTE ON FUNCTION artifact_add TO %s', grantee_name);
  END LOOP;
END $$;
