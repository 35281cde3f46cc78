-- Proxies of earlier versions can still write.
--
-- Smaller indexes, and partitions that someone else created under other names.


-- Partitions are days, so a time in an index only makes it larger: without it, equal keys share one entry
-- (PostgreSQL docs, 67.1.4.3 "Deduplication"). 46 bytes of a row became 8, 37 became 9.
--
-- ON ONLY neither reads rows nor blocks their writers: new days get these indexes from the start. The days
-- that exist get them one at a time, without blocking; see exporter/postgres/indexes.py. Until then, the
-- old indexes stay.
CREATE INDEX access_log_package_version_idx ON ONLY access_log (package, version) WHERE package IS NOT NULL;
CREATE INDEX access_log_user_idx ON ONLY access_log (proxy_user) WHERE proxy_user IS NOT NULL;

DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_inherits WHERE inhparent = 'access_log'::regclass) THEN
    DROP INDEX access_log_package_idx, access_log_proxy_user_idx;
  END IF;
END $$;


-- The bounds of a partition tell what it holds, not its name: pg_partman and DBAs use other names.
CREATE VIEW access_log_partitions AS
  SELECT partition.oid AS partition_oid, partition.relname AS name,
         CASE WHEN bounds LIKE '%FROM (MINVALUE)%' THEN '-infinity'
              ELSE substring(bounds FROM $$FROM \('([^']*)'\)$$) END::timestamptz AS from_at,
         CASE WHEN bounds LIKE '%TO (MAXVALUE)' THEN 'infinity'
              ELSE substring(bounds FROM $$TO \('([^']*)'\)$$) END::timestamptz AS until_at
  FROM pg_inherits
  JOIN pg_class AS partition ON partition.oid = inhrelid
  CROSS JOIN pg_get_expr(relpartbound, partition.oid) AS bounds
  WHERE inhparent = 'access_log'::regclass AND NOT inhdetachpending;
COMMENT ON VIEW access_log_partitions IS 'The partitions of access_log, which are days (UTC) unless a DBA created others';
COMMENT ON COLUMN access_log_partitions.partition_oid IS 'OID of the partition; cast it to regclass for its qualified name';
COMMENT ON COLUMN access_log_partitions.name IS 'Name of the partition without its schema';
COMMENT ON COLUMN access_log_partitions.from_at IS 'First started_at that it can hold; NULL = a default partition';
COMMENT ON COLUMN access_log_partitions.until_at IS 'End of the span that it can hold (exclusive); NULL = a default partition';

CREATE OR REPLACE FUNCTION access_log_ensure_partition(day date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET timezone = 'UTC' AS $$
DECLARE
  plain_name text := 'access_log_' || to_char(day, 'YYYYMMDD');
  partition_name text := plain_name;
  taken integer := 1;
BEGIN
  -- If a partition holds part of the day, someone else divides the log into spans.
  IF EXISTS (SELECT FROM access_log_partitions WHERE from_at < day + 1 AND until_at > day) THEN
    RETURN;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtext('artifactapi'), hashtext(current_schema()));
  IF EXISTS (SELECT FROM access_log_partitions WHERE from_at < day + 1 AND until_at > day) THEN
    RETURN;
  END IF;
  -- Query pg_class: the cache behind to_regclass still holds what was true before the wait.
  WHILE EXISTS (SELECT FROM pg_class WHERE relname = partition_name
                AND relnamespace = current_schema()::regnamespace) LOOP
    -- Someone detached this day and kept the table. Late rows for that day still need a partition.
    taken := taken + 1;
    partition_name := plain_name || '_' || taken;
  END LOOP;
  EXECUTE format('CREATE TABLE %I (LIKE access_log INCLUDING ALL)', partition_name);
  EXECUTE format('ALTER TABLE access_log ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                 partition_name, day::timestamptz, (day + 1)::timestamptz);
END $$;
DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION access_log_ensure_partition(date) SET search_path = %I, pg_temp', current_schema());
END $$;
