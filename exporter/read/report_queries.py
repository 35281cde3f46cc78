"""The queries of a report. Each adds up the rows of access_log and rollups of whole days. Runs nothing.

They bind `edges`, `since`, `until`, `top`, `rollups` (ids of the rollups to use, perhaps none), `months` (of which
rollups are merged), `single_rollups` (the others), and the values of the condition `where` on access_log.
"""

from __future__ import annotations

from psycopg import sql

# The queries reduce hundreds of thousands of rows to a few groups. They should do that in memory, with
# one extra process: more of them wait for the one that merges the groups. The rows of a time span
# lie next to each other, so an index scan of half a day beats reading the whole day.
PLANNER_SETTINGS = """
    SELECT set_config('work_mem', '64MB', true), set_config('random_page_cost', '1.1', true),
           set_config('max_parallel_workers_per_gather', '1', true),
           set_config('parallel_tuple_cost', '0.001', true), set_config('parallel_setup_cost', '100', true)
"""

# Rollups have no bars here.
TRAFFIC = sql.SQL("""
    SELECT width_bucket(started_at, %(edges)s::timestamptz[]) AS bar, cache_source,
           access_log_from_cache(cache_status) AS from_cache, error_type, status_code,
           count(*) AS requests, coalesce(sum(response_bytes), 0)::bigint AS bytes,
           count(*) FILTER (WHERE NOT artifact_complete) AS partial_reads
    FROM access_log WHERE {where} GROUP BY 1, 2, 3, 4, 5
    UNION ALL
    SELECT NULL, cache_source, access_log_from_cache(cache_status), error_type, status_code,
           sum(requests)::bigint, sum(response_bytes)::bigint, sum(partial_reads)::bigint
    FROM (SELECT cache_source, cache_status, error_type, status_code, requests, response_bytes, partial_reads
          FROM access_log_rollup_total WHERE rollup_id = ANY (%(single_rollups)s)
          UNION ALL
          SELECT cache_source, cache_status, error_type, status_code, requests, response_bytes, partial_reads
          FROM access_log_rollup_month_total WHERE month_id = ANY (%(months)s)) AS total
    GROUP BY 2, 3, 4, 5
""")
ROLLED_UP_BARS = sql.SQL("""
    SELECT width_bucket(from_at + (quarter - 1) * interval '15 minutes', %(edges)s::timestamptz[]) AS bar,
           sum(q.requests)::bigint, sum(failures)::bigint, sum(refusals)::bigint, sum(bytes)::bigint
    FROM access_log_rollup
    CROSS JOIN unnest(quarter_requests, quarter_failures, quarter_refusals, quarter_bytes)
      WITH ORDINALITY AS q (requests, failures, refusals, bytes, quarter)
    WHERE rollup_id = ANY (%(rollups)s) GROUP BY 1
""")
# Sorting all durations would take longer than everything else, so this counts them in buckets that
# are 2 % wide. COLLATE "C" compares names byte by byte, also because it is faster.
REMOTES = sql.SQL("""
    WITH counted AS (
      SELECT coalesce(remote, host) COLLATE "C" AS name, access_log_duration_bucket(duration_ms) AS bucket,
             count(*) AS requests, coalesce(sum(response_bytes), 0)::bigint AS bytes,
             count(*) FILTER (WHERE access_log_failed(status_code)) AS failures
      FROM access_log WHERE {where} GROUP BY 1, 2
      UNION ALL
      SELECT name, pair.bucket, pair.requests, 0, 0
      FROM (SELECT name, buckets, requests FROM access_log_rollup_duration WHERE rollup_id = ANY (%(single_rollups)s)
            UNION ALL
            SELECT name, buckets, requests FROM access_log_rollup_month_duration WHERE month_id = ANY (%(months)s))
           AS duration
      CROSS JOIN unnest(buckets, duration.requests) AS pair (bucket, requests)
      UNION ALL
      SELECT name, NULL, 0, response_bytes, CASE WHEN access_log_failed(status_code) THEN requests ELSE 0 END
      FROM (SELECT coalesce(remote, host) AS name, response_bytes, status_code, requests
            FROM access_log_rollup_total WHERE rollup_id = ANY (%(single_rollups)s)
            UNION ALL
            SELECT name, response_bytes, status_code, requests
            FROM access_log_rollup_month_total WHERE month_id = ANY (%(months)s)) AS total
    ), buckets AS MATERIALIZED (
      SELECT name, bucket, sum(requests)::bigint AS requests, sum(bytes)::bigint AS bytes,
             sum(failures)::bigint AS failures
      FROM counted GROUP BY 1, 2
    ), busiest AS (
      SELECT name FROM buckets GROUP BY 1 ORDER BY sum(requests) DESC, 1 LIMIT %(top)s
    )
    SELECT buckets.*
    FROM buckets JOIN busiest ON buckets.name IS NOT DISTINCT FROM busiest.name
    ORDER BY bucket
""")
CALLERS = sql.SQL("""
    WITH callers AS MATERIALIZED (
      SELECT CASE WHEN remote IS NULL THEN host END COLLATE "C" AS unknown_host, client_ip,
             proxy_user COLLATE "C" AS proxy_user, count(*) AS requests,
             sum(request_bytes)::bigint AS sent_bytes, min(started_at) AS first_at
      FROM access_log WHERE {where} GROUP BY 1, 2, 3
    ), rolled_up AS MATERIALIZED (
      SELECT users, clients FROM access_log_rollup WHERE rollup_id = ANY (%(single_rollups)s)
      UNION ALL
      SELECT users, clients FROM access_log_rollup_month WHERE month_id = ANY (%(months)s)
    ), rolled_up_hosts AS MATERIALIZED (
      SELECT host, requests, sent_bytes, first_at, callers
      FROM access_log_rollup_host WHERE rollup_id = ANY (%(single_rollups)s) AND host IS NOT NULL
      UNION ALL
      SELECT host, requests, sent_bytes, first_at, callers
      FROM access_log_rollup_month_host WHERE month_id = ANY (%(months)s)
    ), hosts AS MATERIALIZED (
      SELECT name, sum(requests)::bigint AS requests, coalesce(sum(sent_bytes), 0)::bigint AS sent_bytes,
             min(first_at) AS first_at
      FROM (SELECT unknown_host, requests, sent_bytes, first_at FROM callers WHERE unknown_host IS NOT NULL
            UNION ALL
            SELECT host, requests, sent_bytes, first_at FROM rolled_up_hosts)
           AS each (name, requests, sent_bytes, first_at)
      GROUP BY 1
    ), busiest AS MATERIALIZED (
      SELECT * FROM hosts ORDER BY requests DESC, name LIMIT %(top)s
    ), host_callers AS (
      SELECT name, count(caller) AS callers
      FROM (SELECT unknown_host, access_log_caller(proxy_user, client_ip) FROM callers
            WHERE unknown_host IN (SELECT name FROM busiest)
            UNION
            SELECT host, unnest(callers) FROM rolled_up_hosts
            WHERE host IN (SELECT name FROM busiest)) AS each (name, caller)
      GROUP BY 1
    )
    SELECT json_build_object(
      'clients', (SELECT count(client_ip) FROM
        (SELECT client_ip FROM callers UNION SELECT unnest(clients) FROM rolled_up) AS each),
      'users', (SELECT count(proxy_user) FROM
        (SELECT proxy_user FROM callers UNION SELECT unnest(users) FROM rolled_up) AS each),
      'unknown_hosts', (SELECT count(*) FROM hosts),
      'busiest_unknown_hosts', (SELECT coalesce(json_agg(host), '[]') FROM
        (SELECT name, requests, coalesce(callers, 0) AS callers, sent_bytes, first_at
         FROM busiest LEFT JOIN host_callers USING (name)  -- rollups of nobody's requests have no callers
         ORDER BY requests DESC, name) AS host))::text
""")
# Avoidable: whole responses (200) of one artifact, except the largest, which would have filled the
# cache. The view access_log_redundant excludes the first fetch ever instead. The collation "default" is
# that of the key of artifact_by_node.
ARTIFACTS = sql.SQL("""
    WITH counted AS (
      SELECT purl COLLATE "C" AS purl, min(remote COLLATE "C") AS remote, count(*) AS fetches,
             coalesce(sum(response_bytes), 0)::bigint AS bytes,
             coalesce(sum(response_bytes) FILTER (WHERE status_code = 200), 0)::bigint AS whole_bytes,
             coalesce(max(response_bytes) FILTER (WHERE status_code = 200), 0)::bigint AS largest_bytes
      FROM access_log_fetches WHERE {where} GROUP BY 1
      UNION ALL
      SELECT purl, remote, fetches, bytes, whole_bytes, largest_bytes
      FROM access_log_rollup_artifact WHERE rollup_id = ANY (%(single_rollups)s)
      UNION ALL
      SELECT purl, remote, fetches, bytes, whole_bytes, largest_bytes
      FROM access_log_rollup_month_artifact WHERE month_id = ANY (%(months)s)
    ), fetched AS MATERIALIZED (
      SELECT purl, min(remote) AS remote, sum(fetches)::bigint AS fetches, sum(bytes)::bigint AS bytes,
             (sum(whole_bytes) - max(largest_bytes))::bigint AS avoidable_bytes
      FROM counted GROUP BY 1
    ), new AS MATERIALIZED (
      SELECT fetched.purl, min(first_seen) AS first_seen
      FROM fetched JOIN artifact_by_node AS known ON known.purl = fetched.purl COLLATE "default"
      GROUP BY 1 HAVING min(first_seen) >= %(since)s AND min(first_seen) < %(until)s
    ), newest AS MATERIALIZED (
      SELECT purl COLLATE "default" AS purl FROM new ORDER BY first_seen DESC, new.purl LIMIT %(top)s
    )
    SELECT json_build_object(
      'artifacts', (SELECT count(*) FROM fetched),
      'avoidable_bytes', (SELECT coalesce(sum(avoidable_bytes), 0) FROM fetched),
      'new_artifacts', (SELECT count(*) FROM new),
      'biggest', (SELECT coalesce(json_agg(top), '[]') FROM
        (SELECT * FROM fetched ORDER BY bytes DESC, purl LIMIT %(top)s) AS top),
      'avoidable', (SELECT coalesce(json_agg(top), '[]') FROM
        (SELECT * FROM fetched WHERE avoidable_bytes > 0
         ORDER BY avoidable_bytes DESC, purl LIMIT %(top)s) AS top),
      'first_seen', (SELECT coalesce(json_agg(top), '[]') FROM
        (SELECT purl, artifact.remote, first_user, first_seen FROM newest JOIN artifact USING (purl)
         ORDER BY first_seen DESC, purl COLLATE "C") AS top))::text
""")
