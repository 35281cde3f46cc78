-- An artifact counts as fetched when a GET brought it to its client without an error: not by HEAD, an
-- upload or a download that broke off. Answers 200, 206 and 304 (RFC 9110 15.3.1, 15.3.7, 15.4.5).

CREATE OR REPLACE VIEW access_log_artifacts AS
  SELECT proxy_user, purl, min(filename) AS filename, min(remote) AS remote, count(*) AS fetches,
         sum(response_bytes) AS bytes, min(started_at) AS first_at, max(started_at) AS last_at,
         bool_or(cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED')) AS from_cache
  FROM access_log
  WHERE artifact_kind = 'artifact' AND purl IS NOT NULL AND method = 'GET' AND error_type IS NULL
    AND status_code IN (200, 206, 304)
  GROUP BY proxy_user, purl;
COMMENT ON COLUMN access_log_artifacts.fetches IS 'How often: GET, answered without an error by 200, 206 or 304';

CREATE OR REPLACE FUNCTION access_log_redundant(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (purl text, remote text, fetches bigint, clients bigint, avoidable_bytes numeric)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT purl, min(access_log.remote), count(*), count(DISTINCT client_ip),
         sum(response_bytes) FILTER (WHERE started_at > first_seen)
  FROM access_log JOIN artifact USING (purl)
  WHERE started_at >= since AND started_at < until AND artifact_kind = 'artifact'
    AND method = 'GET' AND error_type IS NULL AND status_code = 200
  GROUP BY 1 HAVING bool_or(started_at > first_seen);
END;

COMMENT ON COLUMN artifact.fetches IS 'How often it was fetched: GET, answered without an error by 200, 206 or 304';
