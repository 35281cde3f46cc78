-- Proxies of earlier versions can still write.
--
-- The artifacts of a rollup are kept in arrays, which PostgreSQL compresses to a quarter: as rows of their own, they took
-- most of the space of the rollups. Those of earlier versions stay as they are; the view has both.

-- In blocks, because Citus sends its nodes the text that contains the statement, and takes only one.
DO $$ BEGIN
  ALTER TABLE access_log_rollup_artifact RENAME TO access_log_rollup_unpacked;
  ALTER INDEX access_log_rollup_artifact_idx RENAME TO access_log_rollup_unpacked_idx;
END $$;
COMMENT ON TABLE access_log_rollup_unpacked IS 'Artifacts of the rollups that earlier versions made; see access_log_rollup_artifact';

DROP TYPE IF EXISTS access_log_rollup_fetches, access_log_rollup_users;  -- of a log whose tables were dropped
CREATE TYPE access_log_rollup_fetches AS (purl text, fetches bigint, bytes bigint, whole_bytes bigint, largest_bytes bigint);
COMMENT ON TYPE access_log_rollup_fetches IS 'The fetches of an artifact; see access_log_rollup_artifact';
CREATE TYPE access_log_rollup_users AS (numbers integer[]);
COMMENT ON TYPE access_log_rollup_users IS 'Who fetched an artifact; see user_numbers in access_log_rollup_artifact';
CREATE TABLE access_log_rollup_chunk (
  rollup_id  bigint                      NOT NULL REFERENCES access_log_rollup ON DELETE CASCADE,
  remote     text,
  artifacts  access_log_rollup_fetches[] NOT NULL,
  users      access_log_rollup_users[]   NOT NULL
);
DO $$ BEGIN
  CREATE INDEX access_log_rollup_chunk_idx ON access_log_rollup_chunk (rollup_id);
END $$;
COMMENT ON TABLE access_log_rollup_chunk IS 'Up to 1,000 artifacts of a rollup; the view access_log_rollup_artifact has each in a row';
COMMENT ON COLUMN access_log_rollup_chunk.rollup_id IS 'The rollup';
COMMENT ON COLUMN access_log_rollup_chunk.remote IS 'Remote of these artifacts';
COMMENT ON COLUMN access_log_rollup_chunk.artifacts IS 'The artifacts, in the order of their purl';
COMMENT ON COLUMN access_log_rollup_chunk.users IS 'Who fetched each of them, in the same order. In an array of its own, because reports do not need it';

-- Finding the users of all artifacts in this way takes long; see access_log_daily_fetches.
CREATE VIEW access_log_rollup_artifact AS
  SELECT rollup_id, purl, remote, fetches, bytes, whole_bytes, largest_bytes,
         (users[artifact.number::integer]).numbers AS user_numbers
  FROM access_log_rollup_chunk
  CROSS JOIN unnest(artifacts) WITH ORDINALITY AS artifact (purl, fetches, bytes, whole_bytes, largest_bytes, number)
  UNION ALL
  SELECT rollup_id, purl, remote, fetches, bytes, whole_bytes, largest_bytes, user_numbers FROM access_log_rollup_unpacked;
COMMENT ON VIEW access_log_rollup_artifact IS 'Artifacts of a rollup: the rows of access_log_fetches';

CREATE OR REPLACE VIEW access_log_daily_fetches AS
  SELECT (from_at AT TIME ZONE 'UTC')::date AS day, rollup.users[number] AS proxy_user, purl, min(artifact.remote) AS remote
  FROM access_log_rollup AS rollup
  JOIN (
    SELECT rollup_id, remote, purl, numbers
    FROM access_log_rollup_chunk
    CROSS JOIN unnest(artifacts, users) AS artifact (purl, fetches, bytes, whole_bytes, largest_bytes, numbers)
    UNION ALL
    SELECT rollup_id, remote, purl, user_numbers FROM access_log_rollup_unpacked
  ) AS artifact USING (rollup_id)
  CROSS JOIN unnest(numbers) AS number
  GROUP BY 1, 2, 3;

CREATE OR REPLACE FUNCTION access_log_roll_up(rows_of regclass, span_from timestamptz, span_until timestamptz) RETURNS bigint
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
    WITH artifacts AS (
      SELECT purl COLLATE "C" AS purl, min(remote) AS remote, count(*) AS fetches, coalesce(sum(response_bytes), 0)::bigint AS bytes,
             coalesce(sum(response_bytes) FILTER (WHERE status_code = 200), 0)::bigint AS whole_bytes,
             coalesce(max(response_bytes) FILTER (WHERE status_code = 200), 0)::bigint AS largest_bytes,
             array_agg(DISTINCT coalesce(number, 0)) AS user_numbers
      FROM (SELECT purl, remote, response_bytes, status_code, proxy_user %2$s AND artifact_complete) AS fetched
      LEFT JOIN (SELECT name, number::integer FROM access_log_rollup, unnest(users) WITH ORDINALITY AS numbered (name, number)
                 WHERE rollup_id = %1$s) AS numbered ON name = proxy_user
      GROUP BY 1
    )
    INSERT INTO access_log_rollup_chunk
    SELECT %1$s, remote,
           array_agg(ROW(purl, fetches, bytes, whole_bytes, largest_bytes)::access_log_rollup_fetches ORDER BY purl),
           array_agg(ROW(user_numbers)::access_log_rollup_users ORDER BY purl)
    FROM (SELECT *, (row_number() OVER (PARTITION BY remote ORDER BY purl) - 1) / 1000 AS chunk FROM artifacts) AS numbered
    GROUP BY remote, chunk
  $sql$, id, span);
  RETURN id;
END $$;

DO $$
DECLARE
  statement text;
BEGIN
  EXECUTE format('ALTER FUNCTION access_log_roll_up(regclass, timestamptz, timestamptz) SET search_path = %I, pg_temp',
                 current_schema());
  -- The columns mean what they mean in the table, and who may read the table may read what replaces it.
  FOR statement IN
    SELECT format('COMMENT ON COLUMN access_log_rollup_artifact.%I IS %L', attname, col_description(attrelid, attnum))
    FROM pg_attribute WHERE attrelid = 'access_log_rollup_unpacked'::regclass AND attnum > 0
    UNION ALL
    SELECT format('GRANT SELECT ON access_log_rollup_artifact, access_log_rollup_chunk TO %s',
                  CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END)
    FROM pg_class, aclexplode(relacl)
    WHERE oid = 'access_log_rollup_unpacked'::regclass AND privilege_type = 'SELECT' AND grantee <> relowner
  LOOP
    EXECUTE statement;
  END LOOP;
END $$;
