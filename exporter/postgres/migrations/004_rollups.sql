-- Proxies of earlier versions can still write.
--
-- Rollups: totals of a span, which stay when the rows of its day are pruned. exporter/retention/ makes them.


CREATE TABLE access_log_rollup (
  rollup_id         bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
  from_at           timestamptz NOT NULL,
  until_at          timestamptz NOT NULL,
  requests          bigint      NOT NULL,
  rolled_up_at      timestamptz NOT NULL DEFAULT now(),
  pruned_at         timestamptz,
  quarter_requests  bigint[]    NOT NULL,
  quarter_failures  bigint[]    NOT NULL,
  quarter_refusals  bigint[]    NOT NULL,
  quarter_bytes     bigint[]    NOT NULL,
  users             text[]      NOT NULL,
  clients           inet[]      NOT NULL
);
CREATE UNIQUE INDEX access_log_rollup_span_idx ON access_log_rollup (from_at, until_at) WHERE pruned_at IS NULL;
CREATE INDEX access_log_rollup_from_at_idx ON access_log_rollup (from_at);
COMMENT ON TABLE access_log_rollup IS 'Totals of a day (UTC). A day has several if rows arrived after it was pruned; then they add up';
COMMENT ON COLUMN access_log_rollup.rollup_id IS 'Refers to the rows of this rollup in the other tables';
COMMENT ON COLUMN access_log_rollup.from_at IS 'Start of the span';
COMMENT ON COLUMN access_log_rollup.until_at IS 'End of the span (exclusive)';
COMMENT ON COLUMN access_log_rollup.requests IS 'Number of rows';
COMMENT ON COLUMN access_log_rollup.rolled_up_at IS 'When the rows were read';
COMMENT ON COLUMN access_log_rollup.pruned_at IS 'When these rows left access_log; NULL = they are still there';
COMMENT ON COLUMN access_log_rollup.quarter_requests IS 'Requests in each quarter of an hour since from_at';
COMMENT ON COLUMN access_log_rollup.quarter_failures IS 'Of these, failed requests; see access_log_failed';
COMMENT ON COLUMN access_log_rollup.quarter_refusals IS 'Of these, refused requests; see access_log_refused';
COMMENT ON COLUMN access_log_rollup.quarter_bytes IS 'Bytes of response bodies in each quarter of an hour';
COMMENT ON COLUMN access_log_rollup.users IS 'Each proxy_user once';
COMMENT ON COLUMN access_log_rollup.clients IS 'Each client_ip once';

CREATE TABLE access_log_rollup_total (
  rollup_id       bigint   NOT NULL REFERENCES access_log_rollup ON DELETE CASCADE,
  node            text,
  remote          text,
  host            text,
  status_code     smallint,
  error_type      text,
  cache_status    text,
  cache_source    text,
  requests        bigint   NOT NULL,
  response_bytes  bigint   NOT NULL,
  partial_reads   bigint   NOT NULL
);
CREATE INDEX access_log_rollup_total_idx ON access_log_rollup_total (rollup_id);
COMMENT ON TABLE access_log_rollup_total IS 'Requests of a rollup, by what they have in common';
COMMENT ON COLUMN access_log_rollup_total.rollup_id IS 'The rollup';
COMMENT ON COLUMN access_log_rollup_total.node IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_total.remote IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_total.host IS 'As in access_log; NULL if there is a remote';
COMMENT ON COLUMN access_log_rollup_total.status_code IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_total.error_type IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_total.cache_status IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_total.cache_source IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_total.requests IS 'Number of requests';
COMMENT ON COLUMN access_log_rollup_total.response_bytes IS 'Bytes of response bodies';
COMMENT ON COLUMN access_log_rollup_total.partial_reads IS 'Requests that delivered only part of an artifact';

CREATE TABLE access_log_rollup_duration (
  rollup_id  bigint     NOT NULL REFERENCES access_log_rollup ON DELETE CASCADE,
  name       text,
  buckets    smallint[] NOT NULL,
  requests   bigint[]   NOT NULL
);
CREATE INDEX access_log_rollup_duration_idx ON access_log_rollup_duration (rollup_id);
COMMENT ON TABLE access_log_rollup_duration IS 'Durations of a rollup in buckets, which add up over several rollups';
COMMENT ON COLUMN access_log_rollup_duration.rollup_id IS 'The rollup';
COMMENT ON COLUMN access_log_rollup_duration.name IS 'Remote; the host if it is not a known remote';
COMMENT ON COLUMN access_log_rollup_duration.buckets IS '50 times the natural logarithm of duration_ms, rounded; NULL = unknown durations';
COMMENT ON COLUMN access_log_rollup_duration.requests IS 'Number of requests in each bucket';

CREATE TABLE access_log_rollup_host (
  rollup_id   bigint      NOT NULL REFERENCES access_log_rollup ON DELETE CASCADE,
  host        text,
  requests    bigint      NOT NULL,
  sent_bytes  bigint      NOT NULL,
  first_at    timestamptz NOT NULL,
  callers     text[]      NOT NULL
);
CREATE INDEX access_log_rollup_host_idx ON access_log_rollup_host (rollup_id);
COMMENT ON TABLE access_log_rollup_host IS 'Hosts of a rollup that are not a known remote';
COMMENT ON COLUMN access_log_rollup_host.rollup_id IS 'The rollup';
COMMENT ON COLUMN access_log_rollup_host.host IS 'Requested host';
COMMENT ON COLUMN access_log_rollup_host.requests IS 'Number of requests';
COMMENT ON COLUMN access_log_rollup_host.sent_bytes IS 'Bytes of request bodies';
COMMENT ON COLUMN access_log_rollup_host.first_at IS 'started_at of the first request';
COMMENT ON COLUMN access_log_rollup_host.callers IS 'Who made the requests, each once; see access_log_caller';

CREATE TABLE access_log_rollup_artifact (
  rollup_id     bigint    NOT NULL REFERENCES access_log_rollup ON DELETE CASCADE,
  purl          text,
  remote        text,
  fetches       bigint    NOT NULL,
  bytes         bigint    NOT NULL,
  whole_bytes   bigint    NOT NULL,
  largest_bytes bigint    NOT NULL,
  user_numbers  integer[] NOT NULL
);
CREATE INDEX access_log_rollup_artifact_idx ON access_log_rollup_artifact (rollup_id);
COMMENT ON TABLE access_log_rollup_artifact IS 'Artifacts of a rollup: the rows of access_log_fetches';
COMMENT ON COLUMN access_log_rollup_artifact.rollup_id IS 'The rollup';
COMMENT ON COLUMN access_log_rollup_artifact.purl IS 'Package URL';
COMMENT ON COLUMN access_log_rollup_artifact.remote IS 'Remote; the alphabetically first if there were several';
COMMENT ON COLUMN access_log_rollup_artifact.fetches IS 'Number of fetches';
COMMENT ON COLUMN access_log_rollup_artifact.bytes IS 'Bytes transferred by all fetches together';
COMMENT ON COLUMN access_log_rollup_artifact.whole_bytes IS 'Bytes of the responses with status 200';
COMMENT ON COLUMN access_log_rollup_artifact.largest_bytes IS 'Bytes of the largest response with status 200';
COMMENT ON COLUMN access_log_rollup_artifact.user_numbers IS 'Who fetched it: positions in access_log_rollup.users; 0 = a client without a login';

-- Constants in the query, so that it locks only the partitions of the span.
CREATE FUNCTION access_log_has_grown(span_from timestamptz, span_until timestamptz, since timestamptz) RETURNS boolean
LANGUAGE plpgsql STABLE AS $$
DECLARE
  found boolean;
BEGIN
  -- No batch takes longer than an hour from its logged_at to its commit (database.call_seconds).
  EXECUTE format('SELECT EXISTS (SELECT 1 FROM access_log WHERE started_at >= %L AND started_at < %L AND logged_at > %L)',
                 span_from, span_until, since - interval '1 hour') INTO found;
  RETURN found;
END $$;
COMMENT ON FUNCTION access_log_has_grown(timestamptz, timestamptz, timestamptz) IS 'Whether a span of access_log may have got rows since a time';

CREATE VIEW access_log_rollup_state AS
  SELECT rollup_id, from_at, until_at, pruned_at,
         pruned_at IS NOT NULL OR NOT access_log_has_grown(from_at, until_at, rolled_up_at) AS is_complete
  FROM access_log_rollup;
COMMENT ON VIEW access_log_rollup_state IS 'Whether each rollup still counts its rows';
COMMENT ON COLUMN access_log_rollup_state.rollup_id IS 'The rollup';
COMMENT ON COLUMN access_log_rollup_state.from_at IS 'Start of the span';
COMMENT ON COLUMN access_log_rollup_state.until_at IS 'End of the span (exclusive)';
COMMENT ON COLUMN access_log_rollup_state.pruned_at IS 'When its rows left access_log; NULL = they are still there';
COMMENT ON COLUMN access_log_rollup_state.is_complete IS 'False if rows may have arrived since; then count the rows instead';

CREATE VIEW access_log_daily AS
  SELECT (from_at AT TIME ZONE 'UTC')::date AS day, node, coalesce(remote, host) AS remote,
         status_code / 100 AS status_class, cache_status, sum(total.requests)::bigint AS requests,
         sum(response_bytes)::bigint AS response_bytes,
         coalesce(sum(total.requests) FILTER (WHERE access_log_failed(status_code)), 0)::bigint AS failures
  FROM access_log_rollup JOIN access_log_rollup_total AS total USING (rollup_id)
  GROUP BY 1, 2, 3, 4, 5;
COMMENT ON VIEW access_log_daily IS 'Requests by day (UTC), also of days whose rows were pruned. Days appear once they are over and rolled up';
COMMENT ON COLUMN access_log_daily.day IS 'The day in UTC';
COMMENT ON COLUMN access_log_daily.node IS 'Proxy that wrote the rows';
COMMENT ON COLUMN access_log_daily.remote IS 'Name from the remotes table; the host if it is not a known remote';
COMMENT ON COLUMN access_log_daily.status_class IS '2 for 200 to 299, and so on; NULL = no response';
COMMENT ON COLUMN access_log_daily.cache_status IS 'As in access_log';
COMMENT ON COLUMN access_log_daily.requests IS 'Number of requests';
COMMENT ON COLUMN access_log_daily.response_bytes IS 'Bytes of response bodies';
COMMENT ON COLUMN access_log_daily.failures IS 'Requests without a response, or with status 500 and above';

CREATE VIEW access_log_daily_fetches AS
  SELECT (from_at AT TIME ZONE 'UTC')::date AS day, users[number] AS proxy_user, purl, artifact.remote
  FROM access_log_rollup JOIN access_log_rollup_artifact AS artifact USING (rollup_id)
  CROSS JOIN unnest(user_numbers) AS number;
COMMENT ON VIEW access_log_daily_fetches IS 'Which proxy user (build) fetched which artifact on which day (UTC), also of days whose rows were pruned';
COMMENT ON COLUMN access_log_daily_fetches.day IS 'The day in UTC';
COMMENT ON COLUMN access_log_daily_fetches.proxy_user IS 'Proxy login name; NULL = clients without a login';
COMMENT ON COLUMN access_log_daily_fetches.purl IS 'Package URL';
COMMENT ON COLUMN access_log_daily_fetches.remote IS 'Remote of the artifact on that day; the alphabetically first if there were several';

CREATE VIEW access_log_pruned AS
  SELECT (from_at AT TIME ZONE 'UTC')::date AS day, node, sum(total.requests)::bigint AS requests, max(pruned_at) AS pruned_at
  FROM access_log_rollup JOIN access_log_rollup_total AS total USING (rollup_id)
  WHERE pruned_at IS NOT NULL
  GROUP BY 1, 2;
COMMENT ON VIEW access_log_pruned IS 'Rows that left access_log because their day was pruned';
COMMENT ON COLUMN access_log_pruned.day IS 'The day in UTC';
COMMENT ON COLUMN access_log_pruned.node IS 'Proxy that wrote the rows';
COMMENT ON COLUMN access_log_pruned.requests IS 'Number of rows';
COMMENT ON COLUMN access_log_pruned.pruned_at IS 'When they left the table; the latest time if they left at several';


-- Reads a partition or a table that was one. The caller sees to it that all of it is one snapshot.
CREATE FUNCTION access_log_roll_up(rows_of regclass, span_from timestamptz, span_until timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
  id bigint;
  span text := format('FROM %s WHERE started_at >= %L AND started_at < %L', rows_of, span_from, span_until);
BEGIN
  DELETE FROM access_log_rollup WHERE from_at >= span_from AND until_at <= span_until AND pruned_at IS NULL;
  EXECUTE format($sql$
    WITH quarters AS (
      SELECT floor(extract(epoch FROM started_at - %1$L::timestamptz) / 900)::integer AS quarter, count(*) AS requests,
             count(*) FILTER (WHERE access_log_failed(status_code)) AS failures,
             count(*) FILTER (WHERE access_log_refused(status_code)) AS refusals,
             coalesce(sum(response_bytes), 0)::bigint AS bytes
      %3$s GROUP BY 1
    )
    INSERT INTO access_log_rollup (from_at, until_at, requests, quarter_requests, quarter_failures, quarter_refusals,
                                   quarter_bytes, users, clients)
    SELECT %1$L, %2$L, coalesce(sum(requests), 0), array_agg(coalesce(requests, 0) ORDER BY n),
           array_agg(coalesce(failures, 0) ORDER BY n), array_agg(coalesce(refusals, 0) ORDER BY n),
           array_agg(coalesce(bytes, 0) ORDER BY n),
           ARRAY(SELECT DISTINCT proxy_user %3$s AND proxy_user IS NOT NULL ORDER BY 1),
           ARRAY(SELECT DISTINCT client_ip %3$s AND client_ip IS NOT NULL ORDER BY 1)
    FROM generate_series(0, ceil(extract(epoch FROM %2$L::timestamptz - %1$L::timestamptz) / 900)::integer - 1) AS n
    LEFT JOIN quarters ON quarter = n
    RETURNING rollup_id
  $sql$, span_from, span_until, span) INTO id;
  EXECUTE format($sql$
    INSERT INTO access_log_rollup_total
    SELECT %1$s, node, remote, CASE WHEN remote IS NULL THEN host END, status_code, error_type, cache_status, cache_source,
           count(*), coalesce(sum(response_bytes), 0), count(*) FILTER (WHERE NOT artifact_complete)
    %2$s GROUP BY 1, 2, 3, 4, 5, 6, 7, 8
  $sql$, id, span);
  EXECUTE format($sql$
    INSERT INTO access_log_rollup_duration
    SELECT %1$s, name, array_agg(bucket ORDER BY bucket), array_agg(requests ORDER BY bucket)
    FROM (SELECT coalesce(remote, host) AS name, access_log_duration_bucket(duration_ms) AS bucket, count(*) AS requests
          %2$s GROUP BY 1, 2) AS counted
    GROUP BY 2
  $sql$, id, span);
  EXECUTE format($sql$
    INSERT INTO access_log_rollup_host
    SELECT %1$s, host, count(*), coalesce(sum(request_bytes), 0), min(started_at),
           coalesce(array_agg(DISTINCT access_log_caller(proxy_user, client_ip))
                    FILTER (WHERE access_log_caller(proxy_user, client_ip) IS NOT NULL), '{}')
    %2$s AND remote IS NULL GROUP BY 2
  $sql$, id, span);
  EXECUTE format($sql$
    INSERT INTO access_log_rollup_artifact
    SELECT %1$s, purl, min(remote), count(*), coalesce(sum(response_bytes), 0),
           coalesce(sum(response_bytes) FILTER (WHERE status_code = 200), 0),
           coalesce(max(response_bytes) FILTER (WHERE status_code = 200), 0),
           array_agg(DISTINCT coalesce(number, 0))
    FROM (SELECT purl, remote, response_bytes, status_code, proxy_user %2$s AND artifact_complete) AS fetched
    LEFT JOIN (SELECT name, number::integer FROM access_log_rollup, unnest(users) WITH ORDINALITY AS numbered (name, number)
               WHERE rollup_id = %1$s) AS numbered ON name = proxy_user
    GROUP BY 2
  $sql$, id, span);
  RETURN id;
END $$;
COMMENT ON FUNCTION access_log_roll_up(regclass, timestamptz, timestamptz) IS 'Replaces the rollups of a span with one of these rows, except rollups of pruned rows. Returns its rollup_id';
REVOKE EXECUTE ON FUNCTION access_log_roll_up(regclass, timestamptz, timestamptz) FROM PUBLIC;

CREATE OR REPLACE FUNCTION access_log_duration_bucket(duration_ms real) RETURNS smallint LANGUAGE sql IMMUTABLE PARALLEL SAFE
  RETURN CASE WHEN duration_ms IS NOT NULL  -- greatest() ignores NULL
              THEN round(ln(greatest(duration_ms, 0.001)) * 50)::smallint END;
COMMENT ON FUNCTION access_log_duration_bucket(real) IS 'Number of the bucket of a duration; each is 2 % wide';

DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION access_log_roll_up(regclass, timestamptz, timestamptz) SET search_path = %I, pg_temp',
                 current_schema());
  EXECUTE format('ALTER FUNCTION access_log_has_grown(timestamptz, timestamptz, timestamptz) SET search_path = %I, pg_temp',
                 current_schema());
END $$;
