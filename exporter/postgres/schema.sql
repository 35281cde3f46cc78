-- The schema, version 1. exporter/postgres/schema.py runs it once, in one transaction, under an advisory lock.
-- Edit this file only before the first release. After that, add a file to exporter/postgres/migrations/.

CREATE TABLE access_log_schema (
  version     integer     PRIMARY KEY,
  applied_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE access_log_schema IS 'Versions of the artifactapi schema applied to this database; the highest one is current';


-- Tables

CREATE TABLE access_log (
  started_at      timestamptz NOT NULL,
  flow_id         uuid        NOT NULL,
  logged_at       timestamptz NOT NULL DEFAULT now(),
  node            text,
  client_ip       inet,
  client_port     integer,
  proxy_user      text,
  user_agent      text,
  method          text,
  scheme          text,
  host            text,
  port            integer,
  path            text,
  query           text,
  http_version    text,
  status_code     smallint,
  error_type      text,
  error           text,
  content_type    text,
  request_bytes   bigint,
  response_bytes  bigint,
  duration_ms     real,
  ttfb_ms         real,
  connect_ms      real,
  server_ip       inet,
  tls_version     text,
  response_source text,
  cache_status    text,
  cache_source    text,
  cache_age_s     integer,
  remote          text,
  artifact_kind   text,
  ecosystem       text,
  package         text,
  version         text,
  filename        text,
  purl            text,
  artifact_complete boolean,
  sha256          bytea,
  -- The key makes every batch idempotent. The time comes first so that it also serves time ranges.
  PRIMARY KEY (started_at, flow_id)
) PARTITION BY RANGE (started_at);

-- To follow the log: rows arrive in this order, however long each request took.
CREATE INDEX access_log_logged_at_idx ON access_log (logged_at);
CREATE INDEX access_log_package_idx ON access_log (package, version, started_at) WHERE package IS NOT NULL;
CREATE INDEX access_log_proxy_user_idx ON access_log (proxy_user, started_at) WHERE proxy_user IS NOT NULL;

COMMENT ON TABLE access_log IS 'One row for each HTTP exchange that passed through a mitmproxy';
COMMENT ON COLUMN access_log.started_at IS 'When the request head reached the proxy (the start of the exchange, not its end)';
COMMENT ON COLUMN access_log.flow_id IS 'mitmproxy''s flow.id; joins to mitmweb and to saved flow files';
COMMENT ON COLUMN access_log.logged_at IS 'When the row reached PostgreSQL; use this column to follow the log';
COMMENT ON COLUMN access_log.node IS 'Proxy that wrote the row (default: its host name)';
COMMENT ON COLUMN access_log.client_ip IS 'Client address; IPv4-mapped addresses are unmapped, zone ids removed; NULL = unknown (import, Unix socket)';
COMMENT ON COLUMN access_log.client_port IS 'Client port; NULL = unknown';
COMMENT ON COLUMN access_log.proxy_user IS 'Proxy login name, the natural place for a build id; never the password; NULL = no login';
COMMENT ON COLUMN access_log.user_agent IS 'User-Agent as sent, bounded; NULL = not sent';
COMMENT ON COLUMN access_log.method IS 'Request method as sent; NULL = no request was made (a client that rejected our certificate)';
COMMENT ON COLUMN access_log.scheme IS 'http or https; NULL = unknown';
COMMENT ON COLUMN access_log.host IS 'Requested host, lower case; the TLS server name if no request was made';
COMMENT ON COLUMN access_log.port IS 'Requested port; NULL = unknown';
COMMENT ON COLUMN access_log.path IS 'Path without the query, bounded; recognized secrets are REDACTED; NULL = no request was made';
COMMENT ON COLUMN access_log.query IS 'Query without the question mark; by default names are kept and values REDACTED; NULL = none';
COMMENT ON COLUMN access_log.http_version IS 'HTTP version between client and proxy';
COMMENT ON COLUMN access_log.status_code IS 'Status the client received; NULL = no response, or unknown';
COMMENT ON COLUMN access_log.error_type IS 'NULL = no error; else dns, connect, connect_timeout, tls_upstream, tls_client, upstream_closed, upstream_timeout, client_disconnected, protocol, too_large, killed, proxy_auth, shutdown or _OTHER';
COMMENT ON COLUMN access_log.error IS 'Error message, redacted and bounded; NULL = no error';
COMMENT ON COLUMN access_log.content_type IS 'Content-Type of the response; NULL = none';
COMMENT ON COLUMN access_log.request_bytes IS 'Request body as transferred (compressed, without headers), bytes; NULL = unknown';
COMMENT ON COLUMN access_log.response_bytes IS 'Response body as transferred (compressed, without headers), bytes, also if cut off; NULL = unknown';
COMMENT ON COLUMN access_log.duration_ms IS 'From the start to the last byte from upstream or to the error, ms; NULL = unknown';
COMMENT ON COLUMN access_log.ttfb_ms IS 'From the start to the response head, ms; NULL = no response head';
COMMENT ON COLUMN access_log.connect_ms IS 'TCP and TLS setup to upstream, ms; NULL = connection reused, or none made';
COMMENT ON COLUMN access_log.server_ip IS 'Upstream address; NULL = no connection, or only an upstream proxy knows it';
COMMENT ON COLUMN access_log.tls_version IS 'TLS version between proxy and upstream; NULL = no TLS';
COMMENT ON COLUMN access_log.response_source IS 'upstream; addon = answered by mitmproxy or an addon without asking upstream; replay = from a recording; NULL = no response';
COMMENT ON COLUMN access_log.cache_status IS 'HIT, MISS, BYPASS, EXPIRED, STALE, UPDATING or REVALIDATED; NULL = no evidence';
COMMENT ON COLUMN access_log.cache_source IS 'Evidence for cache_status, such as cache-status, x-cache, age, 304';
COMMENT ON COLUMN access_log.cache_age_s IS 'Age of the cached response, s; NULL = no Age header';
COMMENT ON COLUMN access_log.remote IS 'Name from the remotes table; NULL = the host is not a known remote';
COMMENT ON COLUMN access_log.artifact_kind IS 'artifact, index, sidecar, blob or api; NULL = not recognized';
COMMENT ON COLUMN access_log.ecosystem IS 'Package URL type, such as pypi, npm, deb; NULL = not recognized';
COMMENT ON COLUMN access_log.package IS 'Package name with its namespace, normalized; NULL = not recognized';
COMMENT ON COLUMN access_log.version IS 'Package version as in the file name; NULL = not recognized';
COMMENT ON COLUMN access_log.filename IS 'File name of the artifact; NULL = not recognized';
COMMENT ON COLUMN access_log.purl IS 'Package URL; NULL = not recognized';
COMMENT ON COLUMN access_log.artifact_complete IS 'Whether the client has the whole artifact after this request: true = a 200, a 304, or the last missing part of a file fetched in parts; false = only part of it; NULL = no download of an artifact';
COMMENT ON COLUMN access_log.sha256 IS 'SHA-256 of a complete 200 body, if enabled; NULL = not computed';

CREATE TABLE access_log_gap (
  gap_id     uuid        PRIMARY KEY,
  node       text        NOT NULL,
  from_at    timestamptz NOT NULL,
  to_at      timestamptz NOT NULL,
  reason     text        NOT NULL,
  entries    bigint      NOT NULL CHECK (entries > 0),
  logged_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE access_log_gap IS 'Gaps in access_log: one row for each span in which entries were lost. Rows + gaps = requests';
COMMENT ON COLUMN access_log_gap.gap_id IS 'Makes it safe to write a gap twice';
COMMENT ON COLUMN access_log_gap.node IS 'Proxy that lost the entries';
COMMENT ON COLUMN access_log_gap.from_at IS 'started_at of the first lost entry';
COMMENT ON COLUMN access_log_gap.to_at IS 'started_at of the last lost entry';
COMMENT ON COLUMN access_log_gap.reason IS 'buffer_full (memory and spool were full), rejected (by PostgreSQL), unreadable (no row could be built), shutdown (out of time and space), spool_damaged';
COMMENT ON COLUMN access_log_gap.entries IS 'Number of lost entries';
COMMENT ON COLUMN access_log_gap.logged_at IS 'When the row reached PostgreSQL';

CREATE TABLE artifact (
  purl        text        PRIMARY KEY,
  remote      text,
  first_seen  timestamptz NOT NULL,
  last_seen   timestamptz NOT NULL,
  first_user  text,
  fetches     bigint      NOT NULL,
  bytes       bigint      NOT NULL
);
COMMENT ON TABLE artifact IS 'Every artifact that was ever fetched. Tells what is new, and outlives the partitions of access_log';
COMMENT ON COLUMN artifact.purl IS 'Package URL';
COMMENT ON COLUMN artifact.remote IS 'Remote of the first fetch';
COMMENT ON COLUMN artifact.first_seen IS 'started_at of the first fetch';
COMMENT ON COLUMN artifact.last_seen IS 'started_at of the latest fetch';
COMMENT ON COLUMN artifact.first_user IS 'proxy_user of the first fetch';
COMMENT ON COLUMN artifact.fetches IS 'Number of fetches, as access_log_fetches defines them';
COMMENT ON COLUMN artifact.bytes IS 'Bytes transferred by all fetches together';


-- What a proxy calls. Both functions run with their owner's rights, so a proxy role needs only INSERT.

-- CREATE LIKE plus ATTACH, because CREATE ... PARTITION OF waits for every open writer and fails when
-- several proxies create the same day at once.
CREATE FUNCTION access_log_ensure_partition(day date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET timezone = 'UTC' AS $$
DECLARE
  plain_name text := 'access_log_' || to_char(day, 'YYYYMMDD');
  partition_name text := plain_name;
  taken integer := 1;
BEGIN
  IF EXISTS (SELECT FROM pg_inherits WHERE inhparent = 'access_log'::regclass
             AND inhrelid = to_regclass(quote_ident(plain_name))) THEN
    RETURN;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtext('artifactapi'), hashtext(current_schema()));
  -- Query pg_class: the cache behind to_regclass still holds what was true before the wait.
  WHILE EXISTS (SELECT FROM pg_class WHERE relname = partition_name
                AND relnamespace = current_schema()::regnamespace) LOOP
    IF EXISTS (SELECT FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
               WHERE inhparent = 'access_log'::regclass AND relname = partition_name) THEN
      RETURN;
    END IF;
    -- Someone detached this day and kept the table. Late rows for that day still need a partition.
    taken := taken + 1;
    partition_name := plain_name || '_' || taken;
  END LOOP;
  EXECUTE format('CREATE TABLE %I (LIKE access_log INCLUDING ALL)', partition_name);
  EXECUTE format('ALTER TABLE access_log ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                 partition_name, day::timestamptz, (day + 1)::timestamptz);
END $$;
COMMENT ON FUNCTION access_log_ensure_partition(date) IS 'Creates the partition of access_log for one day (UTC) if it does not exist';
REVOKE EXECUTE ON FUNCTION access_log_ensure_partition(date) FROM PUBLIC;

-- One upsert per batch, in the batch's transaction. Sorted, so that two proxies cannot deadlock.
CREATE FUNCTION artifact_record(
  purls text[], remotes text[], users text[], firsts timestamptz[], lasts timestamptz[], counts bigint[], sizes bigint[]
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
COMMENT ON FUNCTION artifact_record(text[], text[], text[], timestamptz[], timestamptz[], bigint[], bigint[])
  IS 'Adds fetches to the table artifact, one array element per artifact';
REVOKE EXECUTE ON FUNCTION artifact_record(text[], text[], text[], timestamptz[], timestamptz[], bigint[], bigint[]) FROM PUBLIC;

-- A fixed search_path, so that a caller cannot substitute another table.
DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION access_log_ensure_partition(date) SET search_path = %I, pg_temp', current_schema());
  EXECUTE format('ALTER FUNCTION artifact_record(text[], text[], text[], timestamptz[], timestamptz[], bigint[], bigint[])'
                 ' SET search_path = %I, pg_temp', current_schema());
END $$;


-- The words that every count in this project uses, each defined once. PostgreSQL inlines these functions.
-- OR REPLACE: they depend on no table, so they survive a DROP TABLE ... CASCADE of everything else.

CREATE OR REPLACE FUNCTION access_log_failed(status_code smallint) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
  RETURN status_code IS NULL OR status_code >= 500;
COMMENT ON FUNCTION access_log_failed(smallint) IS 'Whether a request failed: no response, or status 500 and above';

CREATE OR REPLACE FUNCTION access_log_refused(status_code smallint) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
  RETURN status_code BETWEEN 400 AND 499;
COMMENT ON FUNCTION access_log_refused(smallint) IS 'Whether a request was refused: status 400 to 499';

CREATE OR REPLACE FUNCTION access_log_from_cache(cache_status text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
  RETURN cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED');
COMMENT ON FUNCTION access_log_from_cache(text) IS 'Whether a cache supplied the response. REVALIDATED counts: the origin only confirmed it. NULL = no evidence';

CREATE OR REPLACE FUNCTION access_log_caller(proxy_user text, client_ip inet) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
  RETURN coalesce(proxy_user, host(client_ip));
COMMENT ON FUNCTION access_log_caller(text, inet) IS 'Who made a request: the proxy user, else the client address';

-- exporter/rows/downloads.py decides what is complete.
CREATE VIEW access_log_fetches AS SELECT * FROM access_log WHERE artifact_complete;
COMMENT ON VIEW access_log_fetches IS 'The rows of access_log after which a client had a whole artifact. A file that was fetched in parts counts once';
DO $$  -- Its columns mean what they mean in access_log.
DECLARE
  name text;
  meaning text;
BEGIN
  FOR name, meaning IN SELECT attname, col_description(attrelid, attnum) FROM pg_attribute
                       WHERE attrelid = 'access_log'::regclass AND attnum > 0 LOOP
    EXECUTE format('COMMENT ON COLUMN access_log_fetches.%I IS %L', name, meaning);
  END LOOP;
END $$;


-- Counts over a time span. Each has a function that counts one span, and a view that calls it for every
-- hour or day. A WHERE on the view's hour or day therefore reads only those partitions.
--
-- The functions run with their caller's rights. JIT is off in them: on a partitioned table, compiling
-- takes seconds and saves less. With BEGIN ATOMIC they mean these tables whatever the search_path is.

CREATE FUNCTION access_log_remotes(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, requests bigint, bytes numeric, failures bigint,
               p50_ms double precision, p95_ms double precision, p99_ms double precision)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT coalesce(remote, host), count(*), sum(response_bytes),
         count(*) FILTER (WHERE access_log_failed(status_code)),
         percentile_cont(0.5) WITHIN GROUP (ORDER BY duration_ms),
         percentile_cont(0.95) WITHIN GROUP (ORDER BY duration_ms),
         percentile_cont(0.99) WITHIN GROUP (ORDER BY duration_ms)
  FROM access_log WHERE started_at >= since AND started_at < until
  GROUP BY 1;
END;
COMMENT ON FUNCTION access_log_remotes(timestamptz, timestamptz) IS 'The view of this name for one time span: one row per remote';

CREATE FUNCTION access_log_cache(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, cache_source text, requests bigint, hits bigint, bytes numeric, hit_bytes numeric)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT remote, cache_source, count(*),
         count(*) FILTER (WHERE access_log_from_cache(cache_status)),
         sum(response_bytes),
         coalesce(sum(response_bytes) FILTER (WHERE access_log_from_cache(cache_status)), 0)
  FROM access_log WHERE started_at >= since AND started_at < until AND cache_status IS NOT NULL
  GROUP BY 1, 2;
END;
COMMENT ON FUNCTION access_log_cache(timestamptz, timestamptz) IS 'The view of this name for one time span: one row per remote and evidence';

CREATE FUNCTION access_log_unknown_hosts(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (host text, port integer, scheme text, requests bigint, callers bigint, sent_bytes numeric,
               first_at timestamptz, last_at timestamptz)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT host, port, scheme, count(*), count(DISTINCT access_log_caller(proxy_user, client_ip)),
         sum(request_bytes), min(started_at), max(started_at)
  FROM access_log WHERE started_at >= since AND started_at < until AND remote IS NULL
  GROUP BY 1, 2, 3;
END;
COMMENT ON FUNCTION access_log_unknown_hosts(timestamptz, timestamptz) IS 'The view of this name for one time span: one row per host, port and scheme';

CREATE FUNCTION access_log_not_found(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (remote text, package text, requests bigint, callers bigint,
               first_at timestamptz, last_at timestamptz)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT remote, package, count(*), count(DISTINCT access_log_caller(proxy_user, client_ip)),
         min(started_at), max(started_at)
  FROM access_log
  WHERE started_at >= since AND started_at < until AND status_code IN (404, 410) AND package IS NOT NULL
  GROUP BY 1, 2;
END;
COMMENT ON FUNCTION access_log_not_found(timestamptz, timestamptz) IS 'The view of this name for one time span: one row per remote and package';

-- Whatever the span, only an artifact's first fetch ever could not have come from a cache.
CREATE FUNCTION access_log_redundant(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (purl text, remote text, fetches bigint, clients bigint, avoidable_bytes numeric)
LANGUAGE sql STABLE SET jit = off BEGIN ATOMIC
  SELECT purl, min(access_log_fetches.remote), count(*), count(DISTINCT client_ip),
         sum(response_bytes) FILTER (WHERE started_at > first_seen)
  FROM access_log_fetches JOIN artifact USING (purl)
  WHERE started_at >= since AND started_at < until AND status_code = 200
  GROUP BY 1 HAVING bool_or(started_at > first_seen);
END;
COMMENT ON FUNCTION access_log_redundant(timestamptz, timestamptz) IS 'The view of this name for one time span: one row per artifact';

CREATE VIEW access_log_remotes AS
  SELECT hour, counted.*
  FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
  CROSS JOIN generate_series(date_trunc('hour', oldest), newest, interval '1 hour') AS hour
  CROSS JOIN access_log_remotes(hour, hour + interval '1 hour') AS counted;
COMMENT ON VIEW access_log_remotes IS 'Requests, bytes, failures and durations by hour and remote. Filter with WHERE hour >= ...; unfiltered, it scans the whole log';
COMMENT ON COLUMN access_log_remotes.hour IS 'Start of the hour';
COMMENT ON COLUMN access_log_remotes.remote IS 'Name from the remotes table; the host if it is not a known remote';
COMMENT ON COLUMN access_log_remotes.requests IS 'Number of requests';
COMMENT ON COLUMN access_log_remotes.bytes IS 'Bytes of response bodies; NULL = none of them known';
COMMENT ON COLUMN access_log_remotes.failures IS 'Requests without a response, or with status 500 and above';
COMMENT ON COLUMN access_log_remotes.p50_ms IS 'Median of duration_ms';
COMMENT ON COLUMN access_log_remotes.p95_ms IS '95th percentile of duration_ms';
COMMENT ON COLUMN access_log_remotes.p99_ms IS '99th percentile of duration_ms';

CREATE VIEW access_log_days AS
  SELECT day
  FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
  CROSS JOIN generate_series(date_trunc('day', oldest), newest, interval '1 day') AS day;
COMMENT ON VIEW access_log_days IS 'The days that access_log spans, including those without requests';
COMMENT ON COLUMN access_log_days.day IS 'Start of the day in the session''s time zone';

CREATE VIEW access_log_cache AS
  SELECT day, counted.*
  FROM access_log_days CROSS JOIN access_log_cache(day, day + interval '1 day') AS counted;
COMMENT ON VIEW access_log_cache IS 'Responses from a cache by day, remote and evidence, because a hit in a CDN is not a hit in your own cache. Filter with WHERE day >= ...; unfiltered, it scans the whole log';
COMMENT ON COLUMN access_log_cache.day IS 'Start of the day in the session''s time zone';
COMMENT ON COLUMN access_log_cache.remote IS 'Name from the remotes table; NULL = all hosts that are not a known remote';
COMMENT ON COLUMN access_log_cache.cache_source IS 'Evidence, such as cache-status, x-cache, age, 304';
COMMENT ON COLUMN access_log_cache.requests IS 'Requests with evidence for or against a cache';
COMMENT ON COLUMN access_log_cache.hits IS 'Of these, requests that a cache answered';
COMMENT ON COLUMN access_log_cache.bytes IS 'Bytes of these requests; NULL = none of them known';
COMMENT ON COLUMN access_log_cache.hit_bytes IS 'Bytes of the hits';

CREATE VIEW access_log_unknown_hosts AS
  SELECT counted.*, day
  FROM access_log_days CROSS JOIN access_log_unknown_hosts(day, day + interval '1 day') AS counted;
COMMENT ON VIEW access_log_unknown_hosts IS 'Hosts that are not a known remote, by day: where else builds connect to. Filter with WHERE day >= ...; unfiltered, it scans the whole log';
COMMENT ON COLUMN access_log_unknown_hosts.host IS 'Requested host';
COMMENT ON COLUMN access_log_unknown_hosts.port IS 'Requested port';
COMMENT ON COLUMN access_log_unknown_hosts.scheme IS 'http or https';
COMMENT ON COLUMN access_log_unknown_hosts.requests IS 'Number of requests';
COMMENT ON COLUMN access_log_unknown_hosts.callers IS 'Number of proxy users on that day; clients without a login count by address';
COMMENT ON COLUMN access_log_unknown_hosts.sent_bytes IS 'Bytes of request bodies; NULL = none of them known';
COMMENT ON COLUMN access_log_unknown_hosts.first_at IS 'started_at of the first request of the day';
COMMENT ON COLUMN access_log_unknown_hosts.last_at IS 'started_at of the last request of the day';
COMMENT ON COLUMN access_log_unknown_hosts.day IS 'Start of the day in the session''s time zone';

CREATE VIEW access_log_not_found AS
  SELECT counted.*, day
  FROM access_log_days CROSS JOIN access_log_not_found(day, day + interval '1 day') AS counted;
COMMENT ON VIEW access_log_not_found IS 'Packages that a remote did not have (404, 410), by day: candidates for dependency confusion. Filter with WHERE day >= ...; unfiltered, it scans the whole log';
COMMENT ON COLUMN access_log_not_found.remote IS 'Name from the remotes table';
COMMENT ON COLUMN access_log_not_found.package IS 'Package name with its namespace, normalized';
COMMENT ON COLUMN access_log_not_found.requests IS 'Number of requests';
COMMENT ON COLUMN access_log_not_found.callers IS 'Number of proxy users on that day; clients without a login count by address';
COMMENT ON COLUMN access_log_not_found.first_at IS 'started_at of the first request of the day';
COMMENT ON COLUMN access_log_not_found.last_at IS 'started_at of the last request of the day';
COMMENT ON COLUMN access_log_not_found.day IS 'Start of the day in the session''s time zone';

CREATE VIEW access_log_redundant AS
  SELECT counted.*, day
  FROM access_log_days CROSS JOIN access_log_redundant(day, day + interval '1 day') AS counted;
COMMENT ON VIEW access_log_redundant IS 'Bytes that a cache would have saved, by day and artifact: every 200 response except the artifact''s first fetch ever. Filter with WHERE day >= ...; unfiltered, it scans the whole log';
COMMENT ON COLUMN access_log_redundant.purl IS 'Package URL';
COMMENT ON COLUMN access_log_redundant.remote IS 'Remote; the alphabetically first if there were several';
COMMENT ON COLUMN access_log_redundant.fetches IS 'Number of 200 responses on that day, including the first fetch ever';
COMMENT ON COLUMN access_log_redundant.clients IS 'Number of client addresses on that day';
COMMENT ON COLUMN access_log_redundant.avoidable_bytes IS 'Bytes of the fetches after the first ever; NULL = none of them known';
COMMENT ON COLUMN access_log_redundant.day IS 'Start of the day in the session''s time zone';

CREATE VIEW access_log_artifacts AS
  SELECT proxy_user, purl, min(filename) AS filename, min(remote) AS remote, count(*) AS fetches,
         sum(response_bytes) AS bytes, min(started_at) AS first_at, max(started_at) AS last_at,
         bool_or(access_log_from_cache(cache_status)) AS from_cache
  FROM access_log_fetches
  GROUP BY proxy_user, purl;
COMMENT ON VIEW access_log_artifacts IS 'What each proxy user (build) downloaded. Filter with WHERE proxy_user = ...; unfiltered, it scans the whole log';
COMMENT ON COLUMN access_log_artifacts.proxy_user IS 'Proxy login name; NULL = all clients without a login together';
COMMENT ON COLUMN access_log_artifacts.purl IS 'Package URL';
COMMENT ON COLUMN access_log_artifacts.filename IS 'File name; the alphabetically first if the package has several files';
COMMENT ON COLUMN access_log_artifacts.remote IS 'Remote; the alphabetically first if there were several';
COMMENT ON COLUMN access_log_artifacts.fetches IS 'Number of fetches, as access_log_fetches defines them';
COMMENT ON COLUMN access_log_artifacts.bytes IS 'Bytes transferred by all fetches together; NULL = none of them known';
COMMENT ON COLUMN access_log_artifacts.first_at IS 'started_at of the first fetch';
COMMENT ON COLUMN access_log_artifacts.last_at IS 'started_at of the latest fetch';
COMMENT ON COLUMN access_log_artifacts.from_cache IS 'Whether a cache answered any of the fetches; NULL = no evidence';

CREATE VIEW access_log_partial_reads AS
  SELECT proxy_user, purl, min(filename) AS filename, min(remote) AS remote, count(*) AS reads,
         sum(response_bytes) AS bytes, min(started_at) AS first_at, max(started_at) AS last_at
  FROM access_log WHERE NOT artifact_complete
  GROUP BY proxy_user, purl;
COMMENT ON VIEW access_log_partial_reads IS 'Requests that delivered only part of an artifact to a proxy user (build): metadata at the end of a wheel, broken-off downloads. Filter with WHERE proxy_user = ...; unfiltered, it scans the whole log';
COMMENT ON COLUMN access_log_partial_reads.proxy_user IS 'Proxy login name; NULL = all clients without a login together';
COMMENT ON COLUMN access_log_partial_reads.purl IS 'Package URL';
COMMENT ON COLUMN access_log_partial_reads.filename IS 'File name; the alphabetically first if the package has several files';
COMMENT ON COLUMN access_log_partial_reads.remote IS 'Remote; the alphabetically first if there were several';
COMMENT ON COLUMN access_log_partial_reads.reads IS 'Number of such requests';
COMMENT ON COLUMN access_log_partial_reads.bytes IS 'Bytes transferred by them; NULL = none of them known';
COMMENT ON COLUMN access_log_partial_reads.first_at IS 'started_at of the first of them';
COMMENT ON COLUMN access_log_partial_reads.last_at IS 'started_at of the latest of them';

CREATE VIEW access_log_first_seen AS
  SELECT first_seen, purl, remote, first_user, fetches, bytes, last_seen FROM artifact;
COMMENT ON VIEW access_log_first_seen IS 'When each artifact was fetched for the first time, and by whom. Filter with WHERE first_seen >= .... Reads the table artifact, which outlives the log';
COMMENT ON COLUMN access_log_first_seen.first_seen IS 'started_at of the first fetch ever';
COMMENT ON COLUMN access_log_first_seen.purl IS 'Package URL';
COMMENT ON COLUMN access_log_first_seen.remote IS 'Remote of the first fetch';
COMMENT ON COLUMN access_log_first_seen.first_user IS 'proxy_user of the first fetch; NULL = no login';
COMMENT ON COLUMN access_log_first_seen.fetches IS 'Number of fetches since then';
COMMENT ON COLUMN access_log_first_seen.bytes IS 'Bytes transferred by all fetches together';
COMMENT ON COLUMN access_log_first_seen.last_seen IS 'started_at of the latest fetch';
