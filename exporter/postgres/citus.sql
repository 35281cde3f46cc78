-- Distributes the log over the nodes of a Citus cluster, by the proxy that wrote each row (the column node): what a batch
-- writes is in one shard. exporter/postgres/citus.py runs this once, in one transaction on the coordinator.

-- One connection to each worker, as for the changes of tables that they have to see.
SET LOCAL citus.multi_shard_modify_mode TO 'sequential';

-- Proxies of earlier versions call functions that do not say which node they are about. They refuse this version.
INSERT INTO access_log_schema (version) VALUES (10) ON CONFLICT DO NOTHING;


-- Each key has the distribution column.
UPDATE access_log SET node = '' WHERE node IS NULL;
ALTER TABLE access_log ALTER node SET NOT NULL;
ALTER TABLE access_log DROP CONSTRAINT access_log_pkey, ADD PRIMARY KEY (started_at, flow_id, node);
ALTER TABLE access_log_gap DROP CONSTRAINT access_log_gap_pkey, ADD PRIMARY KEY (gap_id, node);
ALTER TABLE access_log_run DROP CONSTRAINT access_log_run_pkey, ADD PRIMARY KEY (run_id, node);

-- Each node counts the artifacts that it fetched.
ALTER TABLE artifact RENAME TO artifact_by_node;
ALTER TABLE artifact_by_node ADD node text NOT NULL DEFAULT '';
ALTER TABLE artifact_by_node ALTER node DROP DEFAULT;
ALTER TABLE artifact_by_node DROP CONSTRAINT artifact_pkey, ADD PRIMARY KEY (purl, node);
COMMENT ON TABLE artifact_by_node IS 'Every artifact that each node ever fetched; the view artifact sums them up';
COMMENT ON COLUMN artifact_by_node.node IS 'Proxy that fetched it; empty = not known, fetched before the log was distributed';

CREATE OR REPLACE FUNCTION artifact_add(
  node_name text, purls text[], remotes text[], users text[], firsts timestamptz[], lasts timestamptz[], counts bigint[],
  sizes bigint[]
) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  INSERT INTO artifact_by_node AS artifact (node, purl, remote, first_user, first_seen, last_seen, fetches, bytes)
  SELECT node_name, * FROM unnest(purls, remotes, users, firsts, lasts, counts, sizes) AS seen ORDER BY 2
  ON CONFLICT (purl, node) DO UPDATE SET
    remote = CASE WHEN excluded.first_seen < artifact.first_seen THEN excluded.remote ELSE artifact.remote END,
    first_user = CASE WHEN excluded.first_seen < artifact.first_seen THEN excluded.first_user ELSE artifact.first_user END,
    first_seen = least(artifact.first_seen, excluded.first_seen),
    last_seen = greatest(artifact.last_seen, excluded.last_seen),
    fetches = artifact.fetches + excluded.fetches,
    bytes = artifact.bytes + excluded.bytes;
END $$;
DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION artifact_add SET search_path = %I, pg_temp', current_schema());
END $$;


-- What a coordinator holds of a distributed table is empty.
CREATE OR REPLACE FUNCTION access_log_size(relation regclass) RETURNS bigint LANGUAGE sql AS $$
  SELECT CASE WHEN EXISTS (SELECT 1 FROM pg_catalog.pg_dist_partition WHERE logicalrelid = relation)
              THEN citus_total_relation_size(relation) ELSE pg_total_relation_size(relation) END
$$;


-- What a batch writes.
SELECT create_distributed_table('access_log', 'node', colocate_with => 'none');
SELECT create_distributed_table(name, 'node', colocate_with => 'access_log')
FROM unnest('{access_log_gap,access_log_run,access_log_run_day,artifact_by_node}'::text[]) AS name;
SELECT create_distributed_function(oid::regprocedure, 'node_name', colocate_with => 'access_log', force_delegation => true)
FROM pg_proc
WHERE pronamespace = current_schema()::regnamespace AND proname IN ('artifact_add', 'access_log_run_record');


-- The first fetch of all: of texts that begin with times in the same number of digits, the smallest has the earliest.
-- The workers compute minima of texts, but not of rows or arrays.
CREATE VIEW artifact AS
  SELECT purl, substr(min(first_fetch), 21)::json->>0 AS remote, min(first_seen) AS first_seen,
         max(last_seen) AS last_seen, substr(min(first_fetch), 21)::json->>1 AS first_user,
         sum(fetches)::bigint AS fetches, sum(bytes)::bigint AS bytes
  FROM (
    SELECT *, lpad((extract(epoch FROM first_seen) + 1000000000000)::text, 20, '0')
              || json_build_array(remote, first_user)::text AS first_fetch
    FROM artifact_by_node
  ) AS counted
  GROUP BY purl;
COMMENT ON VIEW artifact IS 'Every artifact that was ever fetched. Tells what is new, and outlives the partitions of access_log';
CREATE OR REPLACE VIEW access_log_first_seen AS
  SELECT first_seen, purl, remote, first_user, fetches, bytes, last_seen FROM artifact;
DO $$  -- Its columns mean what they mean in the table, and who may read that may read it.
DECLARE
  name text;
  meaning text;
BEGIN
  FOR name IN SELECT granted.grantee::regrole::text FROM pg_class, aclexplode(relacl) AS granted
              WHERE pg_class.oid = 'artifact_by_node'::regclass AND privilege_type = 'SELECT'
                AND grantee <> relowner AND grantee <> 0 LOOP
    EXECUTE format('GRANT SELECT ON artifact TO %s', name);
  END LOOP;
  FOR name, meaning IN SELECT attname, col_description(attrelid, attnum) FROM pg_attribute
                       WHERE attrelid = 'artifact_by_node'::regclass AND attnum > 0 AND attname <> 'node' LOOP
    EXECUTE format('COMMENT ON COLUMN artifact.%I IS %L', name, meaning);
  END LOOP;
END $$;
