-- Each view that counts learns to be asked about a span of time: there is a function for each, which
-- counts from one moment to another, and the view asks it hour by hour or day by day. So a WHERE on
-- that column of the view reads those days and no others. Columns of views are only added, at the
-- end, so that grants and other people's views on them stay.
--
-- The functions run with their caller's rights. JIT is off in them: it takes seconds over the parts
-- of a partitioned table, and saves less. With BEGIN ATOMIC they mean these tables whatever the
-- caller's search_path says.

CREATE FUNCTION access_log_remotes(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, requests bigint, bytes numeric, failures bigint,
               p50_ms double precision, p95_ms double precision, p99_ms double precision)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT coalesce(remote, host), count(*), sum(response_bytes),
         count(*) FILTER (WHERE status_code IS NULL OR status_code >= 500),
         percentile_cont(0.5) WITHIN GROUP (ORDER BY duration_ms),
         percentile_cont(0.95) WITHIN GROUP (ORDER BY duration_ms),
         percentile_cont(0.99) WITHIN GROUP (ORDER BY duration_ms)
  FROM access_log WHERE started_at >= since AND started_at < until
  GROUP BY 1;
END;

CREATE FUNCTION access_log_cache(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, cache_source text, requests bigint, hits bigint, bytes numeric, hit_bytes numeric)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT remote, cache_source, count(*),
         count(*) FILTER (WHERE cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED')),
         sum(response_bytes),
         coalesce(sum(response_bytes)
                  FILTER (WHERE cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED')), 0)
  FROM access_log WHERE started_at >= since AND started_at < until AND cache_status IS NOT NULL
  GROUP BY 1, 2;
END;

CREATE FUNCTION access_log_unknown_hosts(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (host text, port integer, scheme text, requests bigint, callers bigint, sent_bytes numeric,
               first_at timestamptz, last_at timestamptz)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT host, port, scheme, count(*), count(DISTINCT coalesce(proxy_user, host(client_ip))),
         sum(request_bytes), min(started_at), max(started_at)
  FROM access_log WHERE started_at >= since AND started_at < until AND remote IS NULL
  GROUP BY 1, 2, 3;
END;

CREATE FUNCTION access_log_not_found(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, package text, requests bigint, callers bigint,
               first_at timestamptz, last_at timestamptz)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT remote, package, count(*), count(DISTINCT coalesce(proxy_user, host(client_ip))),
         min(started_at), max(started_at)
  FROM access_log
  WHERE started_at >= since AND started_at < until AND status_code IN (404, 410) AND package IS NOT NULL
  GROUP BY 1, 2;
END;

-- Only an artifact's first fetch ever tells what no cache could have saved, whatever the span.
CREATE FUNCTION access_log_redundant(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (purl text, remote text, fetches bigint, clients bigint, avoidable_bytes numeric)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT purl, min(access_log.remote), count(*), count(DISTINCT client_ip),
         sum(response_bytes) FILTER (WHERE started_at > first_seen)
  FROM access_log JOIN artifact USING (purl)
  WHERE started_at >= since AND started_at < until AND artifact_kind = 'artifact' AND status_code = 200
  GROUP BY 1 HAVING bool_or(started_at > first_seen);
END;

COMMENT ON FUNCTION access_log_remotes(timestamptz, timestamptz) IS 'As the view, from one moment up to another, all of it in one row a remote';
COMMENT ON FUNCTION access_log_cache(timestamptz, timestamptz) IS 'As the view, from one moment up to another, all of it in one row a remote and evidence';
COMMENT ON FUNCTION access_log_unknown_hosts(timestamptz, timestamptz) IS 'As the view, from one moment up to another, all of it in one row a host, port and scheme';
COMMENT ON FUNCTION access_log_not_found(timestamptz, timestamptz) IS 'As the view, from one moment up to another, all of it in one row a remote and package';
COMMENT ON FUNCTION access_log_redundant(timestamptz, timestamptz) IS 'As the view, from one moment up to another, all of it in one row an artifact';

CREATE OR REPLACE VIEW access_log_remotes AS
  SELECT hour, counted.*
  FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
  CROSS JOIN generate_series(date_trunc('hour', oldest), newest, interval '1 hour') AS hour
  CROSS JOIN access_log_remotes(hour, hour + interval '1 hour') AS counted;

CREATE OR REPLACE VIEW access_log_cache AS
  SELECT day, counted.*
  FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
  CROSS JOIN generate_series(date_trunc('day', oldest), newest, interval '1 day') AS day
  CROSS JOIN access_log_cache(day, day + interval '1 day') AS counted;

CREATE OR REPLACE VIEW access_log_unknown_hosts AS
  SELECT counted.*, day
  FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
  CROSS JOIN generate_series(date_trunc('day', oldest), newest, interval '1 day') AS day
  CROSS JOIN access_log_unknown_hosts(day, day + interval '1 day') AS counted;

CREATE OR REPLACE VIEW access_log_not_found AS
  SELECT counted.*, day
  FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
  CROSS JOIN generate_series(date_trunc('day', oldest), newest, interval '1 day') AS day
  CROSS JOIN access_log_not_found(day, day + interval '1 day') AS counted;

CREATE OR REPLACE VIEW access_log_redundant AS
  SELECT counted.*, day
  FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
  CROSS JOIN generate_series(date_trunc('day', oldest), newest, interval '1 day') AS day
  CROSS JOIN access_log_redundant(day, day + interval '1 day') AS counted;

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
