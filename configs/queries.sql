-- Thirteen questions to the access log, for psql 11 or newer:
--
--   artifactapi psql -f configs/queries.sql
--   artifactapi psql -v since='2026-11-01' -v build=build-42 -f configs/queries.sql
--
-- since               start of the time span; default: a day ago
-- build               a proxy user; default: the one with the latest fetch of an artifact
-- package, version    default: the artifact requested last; a package without a version means all its versions
--
-- To run a query in another tool, replace :'since' and the other variables with values.

\if :{?since}
\else
  SELECT now() - interval '1 day' AS since \gset
\endif
\if :{?build}
\else
  SELECT coalesce((SELECT proxy_user FROM access_log_fetches
                   WHERE proxy_user IS NOT NULL
                   ORDER BY started_at DESC LIMIT 1), '') AS build \gset
\endif
\if :{?package}
\else
  SELECT coalesce(min(package), '') AS package, coalesce(min(version), '') AS version
  FROM (SELECT package, version FROM access_log
        WHERE artifact_kind = 'artifact' AND package IS NOT NULL AND version IS NOT NULL
        ORDER BY started_at DESC LIMIT 1) AS newest \gset
\endif
\if :{?version}
\else
  \set version ''
\endif

\echo '# 1. What did this build download?'
SELECT purl, filename, remote, fetches, bytes, first_at, from_cache
FROM access_log_artifacts WHERE proxy_user = :'build'
ORDER BY bytes DESC NULLS LAST, purl;

\echo '# 2. What were the biggest downloads?'
SELECT purl, filename, remote, count(*) FILTER (WHERE artifact_complete) AS fetches,
       max(response_bytes) AS largest, sum(response_bytes) AS bytes
FROM access_log WHERE started_at >= :'since' AND artifact_kind = 'artifact'
GROUP BY purl, filename, remote
ORDER BY bytes DESC NULLS LAST, purl LIMIT 20;

\echo '# 3. Which remotes with at least 20 requests are slow?'
SELECT coalesce(remote, host) AS remote, count(*) AS requests,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY ttfb_ms) AS ttfb_p50_ms,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY ttfb_ms) AS ttfb_p95_ms,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY ttfb_ms) AS ttfb_p99_ms,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY duration_ms) AS p95_ms
FROM access_log WHERE started_at >= :'since' AND method = 'GET'
GROUP BY 1 HAVING count(*) >= 20
ORDER BY p95_ms DESC NULLS LAST, 1;

\echo '# 4. What share of requests failed, by hour and remote, and what was the most common error?'
SELECT date_trunc('hour', started_at) AS hour, coalesce(remote, host) AS remote, count(*) AS requests,
       round(100.0 * count(*) FILTER (WHERE access_log_failed(status_code)) / count(*), 2) AS failed_percent,
       mode() WITHIN GROUP (ORDER BY error_type) AS commonest_error
FROM access_log WHERE started_at >= :'since'
GROUP BY 1, 2
ORDER BY failed_percent DESC, 1, 2 LIMIT 50;

-- By evidence, because a hit in a CDN is not a hit in your own cache.
\echo '# 5. How many responses, and how many bytes, came from a cache?'
SELECT remote, cache_source, count(*) AS requests,
       round(100.0 * count(*) FILTER (WHERE access_log_from_cache(cache_status))
             / count(*), 1) AS hit_percent,
       round(100.0 * coalesce(sum(response_bytes)
                              FILTER (WHERE access_log_from_cache(cache_status)), 0)
             / nullif(sum(response_bytes), 0), 1) AS hit_bytes_percent
FROM access_log WHERE started_at >= :'since' AND cache_status IS NOT NULL
GROUP BY 1, 2
ORDER BY requests DESC, 1, 2;

\echo '# 6. What was never fetched before?'
SELECT first_seen, purl, remote, first_user, fetches, bytes
FROM access_log_first_seen WHERE first_seen >= :'since'
ORDER BY first_seen DESC, purl LIMIT 100;

\echo '# 7. Who fetched this version of this package?'
SELECT started_at, proxy_user, client_ip, user_agent, remote, filename, status_code, response_bytes
FROM access_log WHERE package = :'package' AND version = coalesce(nullif(:'version', ''), version) AND artifact_kind = 'artifact'
ORDER BY started_at DESC, flow_id LIMIT 100;

\echo '# 8. How many bytes came from each remote, day by day?'
SELECT date_trunc('day', started_at) AS day, coalesce(remote, '(other) ' || host) AS remote,
       count(*) AS requests, sum(response_bytes) AS bytes
FROM access_log WHERE started_at >= :'since'
GROUP BY 1, 2
ORDER BY 1, bytes DESC NULLS LAST, 2;

-- By logged_at, the order in which rows arrive: a long download starts early and arrives late.
\echo '# 9. What was logged last?'
SELECT logged_at, started_at, proxy_user, client_ip, method, status_code, error_type, response_bytes,
       duration_ms, host, path, purl
FROM access_log ORDER BY logged_at DESC, started_at DESC, flow_id LIMIT 20;

\echo '# 10. Who downloads most?'
SELECT access_log_caller(proxy_user, client_ip) AS who, count(*) AS requests, sum(response_bytes) AS bytes,
       count(DISTINCT purl) FILTER (WHERE artifact_complete) AS artifacts
FROM access_log WHERE started_at >= :'since'
GROUP BY 1
ORDER BY bytes DESC NULLS LAST, 1 LIMIT 20;

\echo '# 11. Which hosts are not a known remote?'
SELECT host, port, scheme, requests, callers, sent_bytes, first_at
FROM access_log_unknown_hosts(:'since')
ORDER BY callers, requests, host, port;

\echo '# 12. What would a cache have saved?'
SELECT purl, remote, fetches, clients, avoidable_bytes
FROM access_log_redundant(:'since')
ORDER BY avoidable_bytes DESC NULLS LAST, purl LIMIT 20;

\echo '# 13. Which requested packages were not found (dependency confusion)?'
SELECT remote, package, requests, callers, first_at, last_at
FROM access_log_not_found(:'since')
ORDER BY requests DESC, 1, 2 LIMIT 50;
