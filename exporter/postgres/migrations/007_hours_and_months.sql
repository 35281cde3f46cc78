-- Proxies of earlier versions can still write.
--
-- Rollups of single hours and quarters of an hour, until the rollup of their day or hour replaces them. A day can have many rollups, and each of
-- them may have the same fetches. Merged rollups of a month, because those of a year have millions of rows.

COMMENT ON TABLE access_log_rollup IS 'Totals of a day (UTC), or of an hour or a quarter of an hour of a day that is not over. Those of the same day add up: rows may arrive after their day was pruned';

-- Constants in the query, so that it locks only the partitions of the span.
CREATE OR REPLACE FUNCTION access_log_has_grown(span_from timestamptz, span_until timestamptz, since timestamptz)
RETURNS boolean LANGUAGE plpgsql STABLE AS $$
DECLARE
  found boolean;
BEGIN
  -- No batch takes longer than 10 minutes from its logged_at to its commit (database.call_seconds).
  EXECUTE format('SELECT EXISTS (SELECT 1 FROM access_log WHERE started_at >= %L AND started_at < %L AND logged_at > %L)',
                 span_from, span_until, since - interval '10 minutes') INTO found;
  RETURN found;
END $$;
DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION access_log_has_grown(timestamptz, timestamptz, timestamptz) SET search_path = %I, pg_temp',
                 current_schema());
END $$;

CREATE OR REPLACE VIEW access_log_daily_fetches AS
  SELECT (from_at AT TIME ZONE 'UTC')::date AS day, users[number] AS proxy_user, purl, min(artifact.remote) AS remote
  FROM access_log_rollup JOIN access_log_rollup_artifact AS artifact USING (rollup_id)
  CROSS JOIN unnest(user_numbers) AS number
  GROUP BY 1, 2, 3;

COMMENT ON VIEW access_log_daily IS 'Requests by day (UTC), also of days whose rows were pruned. Requests appear within an hour';
COMMENT ON VIEW access_log_daily_fetches IS 'Which proxy user (build) fetched which artifact on which day (UTC), also of days whose rows were pruned. Requests appear within an hour';

CREATE TABLE access_log_rollup_month (
  month_id    bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
  from_at     timestamptz NOT NULL UNIQUE,
  rollup_ids  bigint[]    NOT NULL
);
COMMENT ON TABLE access_log_rollup_month IS 'Months (UTC) whose rollups are merged. If a rollup is replaced, its month no longer stands for it';
COMMENT ON COLUMN access_log_rollup_month.month_id IS 'Refers to the rows of this month in the other tables';
COMMENT ON COLUMN access_log_rollup_month.from_at IS 'Start of the month';
COMMENT ON COLUMN access_log_rollup_month.rollup_ids IS 'The rollups that are merged';

CREATE TABLE access_log_rollup_month_artifact (
  month_id      bigint NOT NULL REFERENCES access_log_rollup_month ON DELETE CASCADE,
  purl          text,
  remote        text,
  fetches       bigint NOT NULL,
  bytes         bigint NOT NULL,
  whole_bytes   bigint NOT NULL,
  largest_bytes bigint NOT NULL
);
CREATE INDEX access_log_rollup_month_artifact_idx ON access_log_rollup_month_artifact (month_id);
COMMENT ON TABLE access_log_rollup_month_artifact IS 'The rows of access_log_rollup_artifact of a month, one for each artifact';
COMMENT ON COLUMN access_log_rollup_month_artifact.month_id IS 'The month';
COMMENT ON COLUMN access_log_rollup_month_artifact.purl IS 'Package URL';
COMMENT ON COLUMN access_log_rollup_month_artifact.remote IS 'Remote; the alphabetically first if there were several';
COMMENT ON COLUMN access_log_rollup_month_artifact.fetches IS 'Number of fetches';
COMMENT ON COLUMN access_log_rollup_month_artifact.bytes IS 'Bytes transferred by all fetches together';
COMMENT ON COLUMN access_log_rollup_month_artifact.whole_bytes IS 'Bytes of the responses with status 200';
COMMENT ON COLUMN access_log_rollup_month_artifact.largest_bytes IS 'Bytes of the largest response with status 200';

CREATE TABLE access_log_rollup_month_total (
  month_id        bigint   NOT NULL REFERENCES access_log_rollup_month ON DELETE CASCADE,
  name            text,
  status_code     smallint,
  error_type      text,
  cache_status    text,
  cache_source    text,
  requests        bigint   NOT NULL,
  response_bytes  bigint   NOT NULL,
  partial_reads   bigint   NOT NULL
);
CREATE INDEX access_log_rollup_month_total_idx ON access_log_rollup_month_total (month_id);
COMMENT ON TABLE access_log_rollup_month_total IS 'The rows of access_log_rollup_total of a month, without node';
COMMENT ON COLUMN access_log_rollup_month_total.month_id IS 'The month';
COMMENT ON COLUMN access_log_rollup_month_total.name IS 'Remote; the host if it is not a known remote';
COMMENT ON COLUMN access_log_rollup_month_total.status_code IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_month_total.error_type IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_month_total.cache_status IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_month_total.cache_source IS 'As in access_log';
COMMENT ON COLUMN access_log_rollup_month_total.requests IS 'Number of requests';
COMMENT ON COLUMN access_log_rollup_month_total.response_bytes IS 'Bytes of response bodies';
COMMENT ON COLUMN access_log_rollup_month_total.partial_reads IS 'Requests that delivered only part of an artifact';

CREATE TABLE access_log_rollup_month_duration (
  month_id  bigint     NOT NULL REFERENCES access_log_rollup_month ON DELETE CASCADE,
  name      text,
  buckets   smallint[] NOT NULL,
  requests  bigint[]   NOT NULL
);
CREATE INDEX access_log_rollup_month_duration_idx ON access_log_rollup_month_duration (month_id);
COMMENT ON TABLE access_log_rollup_month_duration IS 'The rows of access_log_rollup_duration of a month';
COMMENT ON COLUMN access_log_rollup_month_duration.month_id IS 'The month';
COMMENT ON COLUMN access_log_rollup_month_duration.name IS 'Remote; the host if it is not a known remote';
COMMENT ON COLUMN access_log_rollup_month_duration.buckets IS 'As in access_log_rollup_duration';
COMMENT ON COLUMN access_log_rollup_month_duration.requests IS 'Number of requests in each bucket';
