-- The schema, version 1. Run once, in one transaction, under an advisory lock (exporter/schema.py).
-- A change of it is a new file in exporter/migrations/, never an edit of this one after a release.

CREATE TABLE access_log_schema (
  version     integer     PRIMARY KEY,
  applied_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE access_log_schema IS 'Which versions of the artifactapi schema were applied here; the highest is in force';

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
  sha256          bytea,
  -- The time comes first so that the key serves ranges of time; with it every batch is idempotent.
  PRIMARY KEY (started_at, flow_id)
) PARTITION BY RANGE (started_at);

-- For following the log: rows arrive in this order, however long they took.
CREATE INDEX access_log_logged_at_idx ON access_log (logged_at);
CREATE INDEX access_log_package_idx ON access_log (package, version, started_at) WHERE package IS NOT NULL;
CREATE INDEX access_log_proxy_user_idx ON access_log (proxy_user, started_at) WHERE proxy_user IS NOT NULL;

COMMENT ON TABLE access_log IS 'One row for each HTTP exchange that passed through a mitmproxy';
COMMENT ON COLUMN access_log.started_at IS 'The request''s head reached the proxy (start of the exchange, not its end)';
COMMENT ON COLUMN access_log.flow_id IS 'mitmproxy''s flow.id: joins to mitmweb and to saved flow files';
COMMENT ON COLUMN access_log.logged_at IS 'The row reached Postgres; follow the log by this column';
COMMENT ON COLUMN access_log.node IS 'Which proxy wrote the row (default: its host name)';
COMMENT ON COLUMN access_log.client_ip IS 'Client address, IPv4-mapped ones unmapped, zone ids cut; NULL = none known (import, Unix socket)';
COMMENT ON COLUMN access_log.client_port IS 'Client port; NULL = none known';
COMMENT ON COLUMN access_log.proxy_user IS 'Proxy login name, the natural place for a build id; never the password; NULL = none';
COMMENT ON COLUMN access_log.user_agent IS 'User-Agent as sent, bounded; NULL = not sent';
COMMENT ON COLUMN access_log.method IS 'Request method as sent; NULL = no request was made (a client that refused our certificate)';
COMMENT ON COLUMN access_log.scheme IS 'http or https; NULL = not known';
COMMENT ON COLUMN access_log.host IS 'Host that was asked, lower case; from the TLS server name where no request was made';
COMMENT ON COLUMN access_log.port IS 'Port that was asked; NULL = not known';
COMMENT ON COLUMN access_log.path IS 'Path without the query, bounded, secrets of known shapes REDACTED; NULL = no request was made';
COMMENT ON COLUMN access_log.query IS 'Query without the question mark; by default names kept and values REDACTED; NULL = none';
COMMENT ON COLUMN access_log.http_version IS 'HTTP version between client and proxy';
COMMENT ON COLUMN access_log.status_code IS 'Status the client got; NULL = it got no response, or that is not known';
COMMENT ON COLUMN access_log.error_type IS 'NULL = fine; else dns, connect, connect_timeout, tls_upstream, tls_client, upstream_closed, upstream_timeout, client_disconnected, protocol, too_large, killed, proxy_auth, shutdown or _OTHER';
COMMENT ON COLUMN access_log.error IS 'What went wrong, redacted and bounded; NULL = nothing';
COMMENT ON COLUMN access_log.content_type IS 'Content-Type of the response; NULL = none';
COMMENT ON COLUMN access_log.request_bytes IS 'Request body as transferred (compressed, without headers), bytes; NULL = not known';
COMMENT ON COLUMN access_log.response_bytes IS 'Response body as transferred (compressed, without headers), bytes, also when cut off; NULL = not known';
COMMENT ON COLUMN access_log.duration_ms IS 'Start to the last byte from upstream or to the error, ms; NULL = not known';
COMMENT ON COLUMN access_log.ttfb_ms IS 'Start to the response head, ms; NULL = none came';
COMMENT ON COLUMN access_log.connect_ms IS 'TCP and TLS set-up to upstream, ms; NULL = connection re-used, or none made';
COMMENT ON COLUMN access_log.server_ip IS 'Upstream address; NULL = no connection made, or it is known to an upstream proxy alone';
COMMENT ON COLUMN access_log.tls_version IS 'TLS version between proxy and upstream; NULL = no TLS';
COMMENT ON COLUMN access_log.response_source IS 'upstream; addon = answered by mitmproxy or an addon, no upstream was asked; replay = from a recording; NULL = no response';
COMMENT ON COLUMN access_log.cache_status IS 'HIT, MISS, BYPASS, EXPIRED, STALE, UPDATING or REVALIDATED; NULL = no evidence';
COMMENT ON COLUMN access_log.cache_source IS 'Which evidence said cache_status, such as cache-status, x-cache, age, 304';
COMMENT ON COLUMN access_log.cache_age_s IS 'Age of the cached response, s; NULL = no Age header';
COMMENT ON COLUMN access_log.remote IS 'Name in the table of remotes; NULL = host is no known remote';
COMMENT ON COLUMN access_log.artifact_kind IS 'artifact, index, sidecar, blob or api; NULL = not recognised';
COMMENT ON COLUMN access_log.ecosystem IS 'Package URL type, such as pypi, npm, deb; NULL = not recognised';
COMMENT ON COLUMN access_log.package IS 'Package name with its namespace, normalised; NULL = not recognised';
COMMENT ON COLUMN access_log.version IS 'Package version as in the file name; NULL = not recognised';
COMMENT ON COLUMN access_log.filename IS 'File name of the artifact; NULL = not recognised';
COMMENT ON COLUMN access_log.purl IS 'Package URL; NULL = not recognised';
COMMENT ON COLUMN access_log.sha256 IS 'SHA-256 of a whole 200 body, where switched on; NULL = not taken';

CREATE TABLE access_log_gap (
  gap_id     uuid        PRIMARY KEY,
  node       text        NOT NULL,
  from_at    timestamptz NOT NULL,
  to_at      timestamptz NOT NULL,
  reason     text        NOT NULL,
  entries    bigint      NOT NULL CHECK (entries > 0),
  logged_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE access_log_gap IS 'Holes of access_log: a row for each span in which entries were dropped or rejected. Rows + gaps = requests';
COMMENT ON COLUMN access_log_gap.gap_id IS 'Makes writing a gap twice harmless';
COMMENT ON COLUMN access_log_gap.node IS 'Which proxy lost the entries';
COMMENT ON COLUMN access_log_gap.from_at IS 'started_at of the first entry lost';
COMMENT ON COLUMN access_log_gap.to_at IS 'started_at of the last entry lost';
COMMENT ON COLUMN access_log_gap.reason IS 'Why: buffer_full (memory and spool), rejected (by Postgres), unreadable (no row could be made), shutdown (no time and no room), spool_damaged';
COMMENT ON COLUMN access_log_gap.entries IS 'How many entries were lost';
COMMENT ON COLUMN access_log_gap.logged_at IS 'The row reached Postgres';

CREATE TABLE artifact (
  purl        text        PRIMARY KEY,
  remote      text,
  first_seen  timestamptz NOT NULL,
  last_seen   timestamptz NOT NULL,
  first_user  text,
  fetches     bigint      NOT NULL,
  bytes       bigint      NOT NULL
);
COMMENT ON TABLE artifact IS 'Each artifact ever fetched: says what was never seen before, and survives the dropping of old days';
COMMENT ON COLUMN artifact.purl IS 'Package URL';
COMMENT ON COLUMN artifact.remote IS 'Where it was first fetched from';
COMMENT ON COLUMN artifact.first_seen IS 'started_at of the first fetch';
COMMENT ON COLUMN artifact.last_seen IS 'started_at of the latest fetch';
COMMENT ON COLUMN artifact.first_user IS 'proxy_user of the first fetch';
COMMENT ON COLUMN artifact.fetches IS 'How often it was fetched';
COMMENT ON COLUMN artifact.bytes IS 'Bytes transferred for it, all fetches together';

-- A proxy that may only INSERT still needs partitions: this function makes them with its owner's rights.
-- CREATE LIKE and ATTACH because CREATE ... PARTITION OF waits for every open writer and fails when
-- several make the same day at once.
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
  -- Not to_regclass again: its cache still says what was true before the wait.
  WHILE EXISTS (SELECT FROM pg_class WHERE relname = partition_name
                AND relnamespace = current_schema()::regnamespace) LOOP
    IF EXISTS (SELECT FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
               WHERE inhparent = 'access_log'::regclass AND relname = partition_name) THEN
      RETURN;
    END IF;
    -- A day that was detached and kept under its name must not hold up the rows that still come for it.
    taken := taken + 1;
    partition_name := plain_name || '_' || taken;
  END LOOP;
  EXECUTE format('CREATE TABLE %I (LIKE access_log INCLUDING ALL)', partition_name);
  EXECUTE format('ALTER TABLE access_log ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                 partition_name, day::timestamptz, (day + 1)::timestamptz);
END $$;
COMMENT ON FUNCTION access_log_ensure_partition(date) IS 'Makes the partition of access_log for one day (UTC) unless it is there';
REVOKE EXECUTE ON FUNCTION access_log_ensure_partition(date) FROM PUBLIC;

-- One upsert for each batch, in its transaction. With its owner's rights, so that a proxy needs none
-- to read or change the table. Sorted, so that two proxies never wait for each other in a circle.
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
  IS 'Counts fetches of artifacts, one array element each';
REVOKE EXECUTE ON FUNCTION artifact_record(text[], text[], text[], timestamptz[], timestamptz[], bigint[], bigint[]) FROM PUBLIC;

-- Fixed, so that no caller's search_path can put another table in the way.
DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION access_log_ensure_partition(date) SET search_path = %I, pg_temp', current_schema());
  EXECUTE format('ALTER FUNCTION artifact_record(text[], text[], text[], timestamptz[], timestamptz[], bigint[], bigint[])'
                 ' SET search_path = %I, pg_temp', current_schema());
END $$;

CREATE VIEW access_log_artifacts AS
  SELECT proxy_user, purl, min(filename) AS filename, min(remote) AS remote, count(*) AS fetches,
         sum(response_bytes) AS bytes, min(started_at) AS first_at, max(started_at) AS last_at,
         bool_or(cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED')) AS from_cache
  FROM access_log
  WHERE artifact_kind = 'artifact' AND purl IS NOT NULL AND status_code IN (200, 206, 304)
  GROUP BY proxy_user, purl;
COMMENT ON VIEW access_log_artifacts IS 'What each proxy user (build) downloaded';

CREATE VIEW access_log_first_seen AS
  SELECT first_seen, purl, remote, first_user, fetches, bytes, last_seen FROM artifact;
COMMENT ON VIEW access_log_first_seen IS 'When each artifact was fetched for the first time, and by whom';

CREATE VIEW access_log_cache AS
  SELECT date_trunc('day', started_at) AS day, remote, cache_source, count(*) AS requests,
         count(*) FILTER (WHERE cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED')) AS hits,
         sum(response_bytes) AS bytes,
         coalesce(sum(response_bytes) FILTER (WHERE cache_status IN ('HIT', 'STALE', 'UPDATING', 'REVALIDATED')), 0) AS hit_bytes
  FROM access_log WHERE cache_status IS NOT NULL
  GROUP BY 1, 2, 3;
COMMENT ON VIEW access_log_cache IS 'Answers from a cache (HIT, STALE, UPDATING, and REVALIDATED, where only the origin was asked whether it still holds) by day, remote and evidence: a CDN''s HIT is not one''s own';

CREATE VIEW access_log_remotes AS
  SELECT date_trunc('hour', started_at) AS hour, coalesce(remote, host) AS remote, count(*) AS requests,
         sum(response_bytes) AS bytes,
         count(*) FILTER (WHERE status_code IS NULL OR status_code >= 500) AS failures,
         percentile_cont(0.5) WITHIN GROUP (ORDER BY duration_ms) AS p50_ms,
         percentile_cont(0.95) WITHIN GROUP (ORDER BY duration_ms) AS p95_ms,
         percentile_cont(0.99) WITHIN GROUP (ORDER BY duration_ms) AS p99_ms
  FROM access_log
  GROUP BY 1, 2;
COMMENT ON VIEW access_log_remotes IS 'Requests, bytes, failures and durations by hour and remote (the host, where it is no known remote)';

CREATE VIEW access_log_unknown_hosts AS
  SELECT host, port, scheme, count(*) AS requests, count(DISTINCT coalesce(proxy_user, host(client_ip))) AS callers,
         sum(request_bytes) AS sent_bytes, min(started_at) AS first_at, max(started_at) AS last_at
  FROM access_log WHERE remote IS NULL
  GROUP BY host, port, scheme;
COMMENT ON VIEW access_log_unknown_hosts IS 'Hosts that are no known remote: where else builds talk to';

CREATE VIEW access_log_not_found AS
  SELECT remote, package, count(*) AS requests, count(DISTINCT coalesce(proxy_user, host(client_ip))) AS callers,
         min(started_at) AS first_at, max(started_at) AS last_at
  FROM access_log WHERE status_code IN (404, 410) AND package IS NOT NULL
  GROUP BY remote, package;
COMMENT ON VIEW access_log_not_found IS 'Packages asked of a remote and not found there: candidates for dependency confusion';

CREATE VIEW access_log_redundant AS
  SELECT purl, min(remote) AS remote, count(*) AS fetches, count(DISTINCT client_ip) AS clients,
         sum(response_bytes) - max(response_bytes) AS avoidable_bytes
  FROM access_log
  WHERE artifact_kind = 'artifact' AND status_code = 200 AND purl IS NOT NULL
  GROUP BY purl HAVING count(*) > 1;
COMMENT ON VIEW access_log_redundant IS 'Bytes that a cache would have saved';
