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
COMMENT ON COLUMN access_log.server_ip IS 'Upstream address; NULL = no connection made';
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
-- Fixed, so that no caller's search_path can put another table in the way.
DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION access_log_ensure_partition(date) SET search_path = %I, pg_temp', current_schema());
END $$;
