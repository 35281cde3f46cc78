-- The views learn to be asked about a span of time: one that counts does it hour by hour or day by
-- day, each read by itself, so that a WHERE on that column reads those days and no others. Columns
-- are only added, at the end, so that grants and other people's views on them stay.

CREATE OR REPLACE VIEW access_log_remotes AS
  SELECT hour, counted.*
  FROM (SELECT min(started_at) AS first_at, max(started_at) AS last_at FROM access_log) AS span
  CROSS JOIN LATERAL generate_series(date_trunc('hour', first_at), last_at, interval '1 hour') AS hour
  CROSS JOIN LATERAL (
    SELECT coalesce(remote, host) AS remote, count(*) AS requests, sum(response_bytes) AS bytes,
           count(*) FILTER (WHERE status_code IS NULL OR status_code >= 500) AS failures,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY duration_ms) AS p50_ms,
           percentile_cont(0.95) WITHIN GROUP (ORDER BY duration_ms) AS p95_ms,
           percentile_cont(0.99) WITHIN GROUP (ORDER BY duration_ms) AS p99_ms
    FROM access_log WHERE started_at >= hour AND started_at < hour + interval '1 hour'
    GROUP BY 1
  ) AS counted;

CREATE OR REPLACE VIEW access_log_cache AS
  SELECT day, counted.*
  FROM (SELECT min(started_at) AS first_at, max(started_at) AS last_at FROM access_log) AS span
  CROSS JOIN LATERAL generate_series(date_trunc('day', first_at), last_at, interval '1 day') AS day
  CROSS JOIN LATERAL (
    SELECT remote, cache_source, count(*) AS requests,
           count(*) FILTER (WHERE cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED')) AS hits,
           sum(response_bytes) AS bytes,
           coalesce(sum(response_bytes)
                    FILTER (WHERE cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED')), 0) AS hit_bytes
    FROM access_log
    WHERE started_at >= day AND started_at < day + interval '1 day' AND cache_status IS NOT NULL
    GROUP BY 1, 2
  ) AS counted;

CREATE OR REPLACE VIEW access_log_unknown_hosts AS
  SELECT counted.*, day
  FROM (SELECT min(started_at) AS first_at, max(started_at) AS last_at FROM access_log) AS span
  CROSS JOIN LATERAL generate_series(date_trunc('day', span.first_at), span.last_at, interval '1 day') AS day
  CROSS JOIN LATERAL (
    SELECT host, port, scheme, count(*) AS requests, count(DISTINCT coalesce(proxy_user, host(client_ip))) AS callers,
           sum(request_bytes) AS sent_bytes, min(started_at) AS first_at, max(started_at) AS last_at
    FROM access_log
    WHERE started_at >= day AND started_at < day + interval '1 day' AND remote IS NULL
    GROUP BY host, port, scheme
  ) AS counted;

CREATE OR REPLACE VIEW access_log_not_found AS
  SELECT counted.*, day
  FROM (SELECT min(started_at) AS first_at, max(started_at) AS last_at FROM access_log) AS span
  CROSS JOIN LATERAL generate_series(date_trunc('day', span.first_at), span.last_at, interval '1 day') AS day
  CROSS JOIN LATERAL (
    SELECT remote, package, count(*) AS requests, count(DISTINCT coalesce(proxy_user, host(client_ip))) AS callers,
           min(started_at) AS first_at, max(started_at) AS last_at
    FROM access_log
    WHERE started_at >= day AND started_at < day + interval '1 day'
      AND status_code IN (404, 410) AND package IS NOT NULL
    GROUP BY remote, package
  ) AS counted;

-- By day, only the artifact's very first fetch tells what a cache could not have saved.
CREATE OR REPLACE VIEW access_log_redundant AS
  SELECT counted.*, day
  FROM (SELECT min(started_at) AS first_at, max(started_at) AS last_at FROM access_log) AS span
  CROSS JOIN LATERAL generate_series(date_trunc('day', first_at), last_at, interval '1 day') AS day
  CROSS JOIN LATERAL (
    SELECT purl, min(access_log.remote) AS remote, count(*) AS fetches, count(DISTINCT client_ip) AS clients,
           sum(response_bytes) FILTER (WHERE started_at > first_seen) AS avoidable_bytes
    FROM access_log JOIN artifact USING (purl)
    WHERE started_at >= day AND started_at < day + interval '1 day'
      AND artifact_kind = 'artifact' AND status_code = 200
    GROUP BY purl HAVING bool_or(started_at > first_seen)
  ) AS counted;

COMMENT ON VIEW access_log_artifacts IS 'What each proxy user (build) downloaded. Ask for one user, WHERE proxy_user = ...: the whole log is read otherwise';
COMMENT ON COLUMN access_log_artifacts.proxy_user IS 'Proxy login name; NULL = those who logged in as nobody, together';
COMMENT ON COLUMN access_log_artifacts.purl IS 'Package URL';
COMMENT ON COLUMN access_log_artifacts.filename IS 'File name; the first in the alphabet, where the package has several files';
COMMENT ON COLUMN access_log_artifacts.remote IS 'Where from; the first in the alphabet, where there were several';
COMMENT ON COLUMN access_log_artifacts.fetches IS 'How often: answers 200, 206 and 304';
COMMENT ON COLUMN access_log_artifacts.bytes IS 'Bytes transferred, all fetches together; NULL = not known of any';
COMMENT ON COLUMN access_log_artifacts.first_at IS 'started_at of the first fetch';
COMMENT ON COLUMN access_log_artifacts.last_at IS 'started_at of the latest fetch';
COMMENT ON COLUMN access_log_artifacts.from_cache IS 'Whether any of the fetches was answered from a cache; NULL = no evidence';

COMMENT ON VIEW access_log_first_seen IS 'When each artifact was fetched for the first time, and by whom: ask WHERE first_seen >= .... Reads the table artifact, which outlives the log';
COMMENT ON COLUMN access_log_first_seen.first_seen IS 'started_at of the first fetch ever';
COMMENT ON COLUMN access_log_first_seen.purl IS 'Package URL';
COMMENT ON COLUMN access_log_first_seen.remote IS 'Where it was first fetched from';
COMMENT ON COLUMN access_log_first_seen.first_user IS 'proxy_user of the first fetch; NULL = none';
COMMENT ON COLUMN access_log_first_seen.fetches IS 'How often it was fetched since';
COMMENT ON COLUMN access_log_first_seen.bytes IS 'Bytes transferred for it, all fetches together';
COMMENT ON COLUMN access_log_first_seen.last_seen IS 'started_at of the latest fetch';

COMMENT ON VIEW access_log_cache IS 'Answers from a cache (HIT, STALE, UPDATING, and REVALIDATED, where only the origin was asked whether it still holds) by day, remote and evidence: a CDN''s HIT is not one''s own. Ask WHERE day >= ...: the whole log is read otherwise';
COMMENT ON COLUMN access_log_cache.day IS 'Day in the session''s time zone, its beginning';
COMMENT ON COLUMN access_log_cache.remote IS 'Name in the table of remotes; NULL = all hosts that are no known remote';
COMMENT ON COLUMN access_log_cache.cache_source IS 'Which evidence said so, such as cache-status, x-cache, age, 304';
COMMENT ON COLUMN access_log_cache.requests IS 'Requests of which it is known whether a cache answered';
COMMENT ON COLUMN access_log_cache.hits IS 'Of these, answered from a cache';
COMMENT ON COLUMN access_log_cache.bytes IS 'Bytes of requests; NULL = not known of any';
COMMENT ON COLUMN access_log_cache.hit_bytes IS 'Bytes of hits';

COMMENT ON VIEW access_log_remotes IS 'Requests, bytes, failures and durations by hour and remote. Ask WHERE hour >= ...: the whole log is read otherwise';
COMMENT ON COLUMN access_log_remotes.hour IS 'Hour, its beginning';
COMMENT ON COLUMN access_log_remotes.remote IS 'Name in the table of remotes; the host, where it is no known remote';
COMMENT ON COLUMN access_log_remotes.requests IS 'How many requests';
COMMENT ON COLUMN access_log_remotes.bytes IS 'Bytes of response bodies; NULL = not known of any';
COMMENT ON COLUMN access_log_remotes.failures IS 'Requests without a response, or with a status of 500 or more';
COMMENT ON COLUMN access_log_remotes.p50_ms IS 'Median of duration_ms';
COMMENT ON COLUMN access_log_remotes.p95_ms IS '95th percentile of duration_ms';
COMMENT ON COLUMN access_log_remotes.p99_ms IS '99th percentile of duration_ms';

COMMENT ON VIEW access_log_unknown_hosts IS 'Hosts that are no known remote, by day: where else builds talk to. Ask WHERE day >= ...: the whole log is read otherwise';
COMMENT ON COLUMN access_log_unknown_hosts.host IS 'Host that was asked';
COMMENT ON COLUMN access_log_unknown_hosts.port IS 'Port that was asked';
COMMENT ON COLUMN access_log_unknown_hosts.scheme IS 'http or https';
COMMENT ON COLUMN access_log_unknown_hosts.requests IS 'How many requests';
COMMENT ON COLUMN access_log_unknown_hosts.callers IS 'How many proxy users (addresses, of those without), on that day';
COMMENT ON COLUMN access_log_unknown_hosts.sent_bytes IS 'Bytes of request bodies; NULL = not known of any';
COMMENT ON COLUMN access_log_unknown_hosts.first_at IS 'started_at of the first request of the day';
COMMENT ON COLUMN access_log_unknown_hosts.last_at IS 'started_at of the last request of the day';
COMMENT ON COLUMN access_log_unknown_hosts.day IS 'Day in the session''s time zone, its beginning';

COMMENT ON VIEW access_log_not_found IS 'Packages asked of a remote and not found there (404, 410), by day: candidates for dependency confusion. Ask WHERE day >= ...: the whole log is read otherwise';
COMMENT ON COLUMN access_log_not_found.remote IS 'Name in the table of remotes';
COMMENT ON COLUMN access_log_not_found.package IS 'Package name with its namespace, normalised';
COMMENT ON COLUMN access_log_not_found.requests IS 'How many requests';
COMMENT ON COLUMN access_log_not_found.callers IS 'How many proxy users (addresses, of those without), on that day';
COMMENT ON COLUMN access_log_not_found.first_at IS 'started_at of the first request of the day';
COMMENT ON COLUMN access_log_not_found.last_at IS 'started_at of the last request of the day';
COMMENT ON COLUMN access_log_not_found.day IS 'Day in the session''s time zone, its beginning';

COMMENT ON VIEW access_log_redundant IS 'Bytes that a cache would have saved, by day and artifact: those of every 200 answer but the artifact''s first fetch ever. Ask WHERE day >= ...: the whole log is read otherwise';
COMMENT ON COLUMN access_log_redundant.purl IS 'Package URL';
COMMENT ON COLUMN access_log_redundant.remote IS 'Where from; the first in the alphabet, where there were several';
COMMENT ON COLUMN access_log_redundant.fetches IS 'How many 200 answers on that day, the first ever among them';
COMMENT ON COLUMN access_log_redundant.clients IS 'How many client addresses, on that day';
COMMENT ON COLUMN access_log_redundant.avoidable_bytes IS 'Bytes of those after the first fetch ever; NULL = not known of any';
COMMENT ON COLUMN access_log_redundant.day IS 'Day in the session''s time zone, its beginning';
