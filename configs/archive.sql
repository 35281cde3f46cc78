-- The views of access_log over archived days, for DuckDB 1.4 or newer:
--
--   cd archive && duckdb -init ../configs/archive.sql
--
-- Or, from another folder:
--
--   SET VARIABLE archive = '/srv/archive';
--   .read configs/archive.sql
--
-- The names, columns and results are those of the views in PostgreSQL. Differences: addresses are text, and the
-- artifacts' first fetches are the first ones in the archive, because the counts of artifacts are not in it. Like there,
-- hours and days are those of the session's time zone, and each view by hour or day is also a function, which counts
-- any time span as a whole: SELECT * FROM access_log_cache('2026-11-01', '2026-11-15').

SET VARIABLE archive = coalesce(getvariable('archive'), '.');

CREATE OR REPLACE VIEW access_log AS
  FROM read_parquet(getvariable('archive') || '/day=*/*.parquet', union_by_name = true, hive_partitioning = false);
CREATE OR REPLACE VIEW access_log_fetches AS SELECT * FROM access_log WHERE artifact_complete;


-- The words that every count uses.

CREATE OR REPLACE MACRO access_log_failed(status_code) AS status_code IS NULL OR status_code >= 500;
CREATE OR REPLACE MACRO access_log_refused(status_code) AS status_code BETWEEN 400 AND 499;
CREATE OR REPLACE MACRO access_log_from_cache(cache_status) AS
  cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED');
CREATE OR REPLACE MACRO access_log_caller(proxy_user, client_ip) AS coalesce(proxy_user, client_ip);


-- What each proxy user (build) did.

CREATE OR REPLACE VIEW access_log_artifacts AS
  SELECT proxy_user, purl, min(filename) AS filename, min(remote) AS remote, count(*) AS fetches,
         sum(response_bytes) AS bytes, min(started_at) AS first_at, max(started_at) AS last_at,
         bool_or(access_log_from_cache(cache_status)) AS from_cache
  FROM access_log_fetches
  GROUP BY proxy_user, purl;

CREATE OR REPLACE VIEW access_log_partial_reads AS
  SELECT proxy_user, purl, min(filename) AS filename, min(remote) AS remote, count(*) AS reads,
         sum(response_bytes) AS bytes, min(started_at) AS first_at, max(started_at) AS last_at
  FROM access_log WHERE NOT artifact_complete
  GROUP BY proxy_user, purl;

CREATE OR REPLACE VIEW access_log_first_seen AS
  SELECT min(started_at) AS first_seen, purl, arg_min_null(remote, started_at) AS remote,
         arg_min_null(proxy_user, started_at) AS first_user, count(*) AS fetches,
         coalesce(sum(response_bytes), 0) AS bytes, max(started_at) AS last_seen
  FROM access_log_fetches
  GROUP BY purl;


-- Counts by hour or day, and over any time span.

CREATE OR REPLACE VIEW access_log_days AS
  SELECT unnest(generate_series(date_trunc('day', min(started_at)), max(started_at), INTERVAL 1 DAY)) AS day
  FROM access_log;

CREATE OR REPLACE VIEW access_log_remotes AS
  SELECT date_trunc('hour', started_at) AS hour, coalesce(remote, host) AS remote, count(*) AS requests,
         sum(response_bytes) AS bytes, count(*) FILTER (WHERE access_log_failed(status_code)) AS failures,
         quantile_cont(duration_ms::DOUBLE, 0.5) AS p50_ms, quantile_cont(duration_ms::DOUBLE, 0.95) AS p95_ms,
         quantile_cont(duration_ms::DOUBLE, 0.99) AS p99_ms
  FROM access_log
  GROUP BY ALL;

CREATE OR REPLACE MACRO access_log_remotes(since, until := 'infinity') AS TABLE
  SELECT coalesce(remote, host) AS remote, count(*) AS requests,
         sum(response_bytes) AS bytes, count(*) FILTER (WHERE access_log_failed(status_code)) AS failures,
         quantile_cont(duration_ms::DOUBLE, 0.5) AS p50_ms, quantile_cont(duration_ms::DOUBLE, 0.95) AS p95_ms,
         quantile_cont(duration_ms::DOUBLE, 0.99) AS p99_ms
  FROM access_log WHERE started_at >= since::TIMESTAMPTZ AND started_at < until::TIMESTAMPTZ
  GROUP BY ALL;

CREATE OR REPLACE VIEW access_log_cache AS
  SELECT date_trunc('day', started_at) AS day, remote, cache_source, count(*) AS requests,
         count(*) FILTER (WHERE access_log_from_cache(cache_status)) AS hits,
         sum(response_bytes) AS bytes,
         coalesce(sum(response_bytes) FILTER (WHERE access_log_from_cache(cache_status)), 0) AS hit_bytes
  FROM access_log WHERE cache_status IS NOT NULL
  GROUP BY ALL;

CREATE OR REPLACE MACRO access_log_cache(since, until := 'infinity') AS TABLE
  SELECT remote, cache_source, count(*) AS requests,
         count(*) FILTER (WHERE access_log_from_cache(cache_status)) AS hits,
         sum(response_bytes) AS bytes,
         coalesce(sum(response_bytes) FILTER (WHERE access_log_from_cache(cache_status)), 0) AS hit_bytes
  FROM access_log
  WHERE started_at >= since::TIMESTAMPTZ AND started_at < until::TIMESTAMPTZ AND cache_status IS NOT NULL
  GROUP BY ALL;

CREATE OR REPLACE VIEW access_log_unknown_hosts AS
  SELECT host, port, scheme, count(*) AS requests,
         count(DISTINCT access_log_caller(proxy_user, client_ip)) AS callers, sum(request_bytes) AS sent_bytes,
         min(started_at) AS first_at, max(started_at) AS last_at, date_trunc('day', started_at) AS day
  FROM access_log WHERE remote IS NULL
  GROUP BY ALL;

CREATE OR REPLACE MACRO access_log_unknown_hosts(since, until := 'infinity') AS TABLE
  SELECT host, port, scheme, count(*) AS requests,
         count(DISTINCT access_log_caller(proxy_user, client_ip)) AS callers, sum(request_bytes) AS sent_bytes,
         min(started_at) AS first_at, max(started_at) AS last_at
  FROM access_log
  WHERE started_at >= since::TIMESTAMPTZ AND started_at < until::TIMESTAMPTZ AND remote IS NULL
  GROUP BY ALL;

CREATE OR REPLACE VIEW access_log_not_found AS
  SELECT remote, package, count(*) AS requests,
         count(DISTINCT access_log_caller(proxy_user, client_ip)) AS callers,
         min(started_at) AS first_at, max(started_at) AS last_at, date_trunc('day', started_at) AS day
  FROM access_log WHERE status_code IN (404, 410) AND package IS NOT NULL
  GROUP BY ALL;

CREATE OR REPLACE MACRO access_log_not_found(since, until := 'infinity') AS TABLE
  SELECT remote, package, count(*) AS requests,
         count(DISTINCT access_log_caller(proxy_user, client_ip)) AS callers,
         min(started_at) AS first_at, max(started_at) AS last_at
  FROM access_log
  WHERE started_at >= since::TIMESTAMPTZ AND started_at < until::TIMESTAMPTZ
  AND status_code IN (404, 410) AND package IS NOT NULL
  GROUP BY ALL;

CREATE OR REPLACE VIEW access_log_redundant AS
  SELECT purl, min(fetched.remote) AS remote, count(*) AS fetches, count(DISTINCT client_ip) AS clients,
         sum(response_bytes) FILTER (WHERE started_at > first_seen) AS avoidable_bytes,
         date_trunc('day', started_at) AS day
  FROM access_log_fetches AS fetched JOIN access_log_first_seen USING (purl)
  WHERE status_code = 200
  GROUP BY purl, day
  HAVING bool_or(started_at > first_seen);

CREATE OR REPLACE MACRO access_log_redundant(since, until := 'infinity') AS TABLE
  SELECT purl, min(fetched.remote) AS remote, count(*) AS fetches, count(DISTINCT client_ip) AS clients,
         sum(response_bytes) FILTER (WHERE started_at > first_seen) AS avoidable_bytes
  FROM access_log_fetches AS fetched JOIN access_log_first_seen USING (purl)
  WHERE started_at >= since::TIMESTAMPTZ AND started_at < until::TIMESTAMPTZ AND status_code = 200
  GROUP BY purl
  HAVING bool_or(started_at > first_seen);
