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


-- What a coordinator holds of a distributed table is empty.
CREATE OR REPLACE FUNCTION access_log_size(relation regclass) RETURNS bigint LANGUAGE sql AS $$
  SELECT CASE WHEN EXISTS (SELECT 1 FROM pg_catalog.pg_dist_partition WHERE logicalrelid = relation)
              THEN citus_total_relation_size(relation) ELSE pg_total_relation_size(relation) END
$$;


-- Citus has no subqueries that refer to other nodes. The first fetch of all: of texts that begin with times in the same
-- number of digits, the smallest has the earliest. The workers compute minima of texts, but not of rows or arrays.
CREATE OR REPLACE VIEW artifact AS
  SELECT purl, substr(min(first_fetch), 21)::json->>0 AS remote, min(first_seen) AS first_seen,
         max(last_seen) AS last_seen, substr(min(first_fetch), 21)::json->>1 AS first_user,
         sum(fetches)::bigint AS fetches, sum(bytes)::bigint AS bytes
  FROM (
    SELECT *, lpad((extract(epoch FROM first_seen) + 1000000000000)::text, 20, '0')
              || json_build_array(remote, first_user)::text AS first_fetch
    FROM artifact_by_node
  ) AS counted
  GROUP BY purl;


-- What a batch writes.
SELECT create_distributed_table('access_log', 'node', colocate_with => 'none');
SELECT create_distributed_table(name, 'node', colocate_with => 'access_log')
FROM unnest('{access_log_gap,access_log_run,access_log_run_day,artifact_by_node}'::text[]) AS name;
SELECT create_distributed_function(oid::regprocedure, 'node_name', colocate_with => 'access_log', force_delegation => true)
FROM pg_proc
WHERE pronamespace = current_schema()::regnamespace AND proname IN ('artifact_add', 'access_log_run_record');
