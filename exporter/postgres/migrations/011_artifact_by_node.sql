-- Proxies of earlier versions can still write.
--
-- Each proxy counts the artifacts that it fetched in rows of its own, so that proxies that fetch the same packages do
-- not wait for each other. The view artifact sums them up.

DO $migration$
DECLARE
  views text[];
  statement text;
BEGIN
  -- An earlier version has done this, when it distributed the log over a Citus cluster.
  IF EXISTS (SELECT FROM pg_class WHERE relname = 'artifact_by_node' AND relnamespace = current_schema()::regnamespace) THEN
    RETURN;
  END IF;
  LOCK TABLE artifact IN ACCESS EXCLUSIVE MODE;

  -- Views follow their table when it gets another name. These are to read the view artifact.
  SELECT coalesce(array_agg(format('CREATE OR REPLACE VIEW %s%s AS %s', oid::regclass,
                                   ' WITH (' || array_to_string(reloptions, ', ') || ')', pg_get_viewdef(oid))), '{}')
  INTO views FROM pg_class
  WHERE relkind = 'v' AND pg_has_role(relowner, 'USAGE') AND oid IN (
    SELECT ev_class FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid
    WHERE classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass AND refobjid = 'artifact'::regclass);

  ALTER TABLE artifact RENAME TO artifact_by_node;
  ALTER TABLE artifact_by_node RENAME CONSTRAINT artifact_pkey TO artifact_by_node_pkey;
  ALTER TABLE artifact_by_node ADD node text NOT NULL DEFAULT '';
  ALTER TABLE artifact_by_node ALTER node DROP DEFAULT;
  -- A key of a large table takes time; exporter/postgres/indexes.py makes it while others write. Until then, the row of
  -- an artifact has the fetches of all proxies.
  IF NOT EXISTS (SELECT FROM artifact_by_node) THEN
    ALTER TABLE artifact_by_node DROP CONSTRAINT artifact_by_node_pkey,
      ADD CONSTRAINT artifact_by_node_pkey PRIMARY KEY (purl, node);
  END IF;
  COMMENT ON TABLE artifact_by_node IS 'Every artifact that each node ever fetched; the view artifact sums them up';
  COMMENT ON COLUMN artifact_by_node.node IS 'Proxy that fetched it; empty = not known; the first one, if the row is from before each proxy had rows of its own';

  -- PostgreSQL can use the indexes for any condition on purl or first_seen: the view groups nothing. Only what a query
  -- reads is summed up.
  CREATE VIEW artifact AS
    SELECT earliest.purl, earliest.remote, earliest.first_seen,
           (SELECT max(last_seen) FROM artifact_by_node AS every WHERE every.purl = earliest.purl) AS last_seen,
           earliest.first_user,
           (SELECT sum(fetches) FROM artifact_by_node AS every WHERE every.purl = earliest.purl)::bigint AS fetches,
           (SELECT sum(bytes) FROM artifact_by_node AS every WHERE every.purl = earliest.purl)::bigint AS bytes
    FROM artifact_by_node AS earliest
    LEFT JOIN artifact_by_node AS earlier ON earlier.purl = earliest.purl
      AND (earlier.first_seen, earlier.node) < (earliest.first_seen, earliest.node)
    WHERE earlier.purl IS NULL;
  COMMENT ON VIEW artifact IS 'Every artifact that was ever fetched. Tells what is new, and outlives the partitions of access_log';

  -- The columns mean what they mean in the table, and who may read the table may read the view.
  FOR statement IN
    SELECT format('COMMENT ON COLUMN artifact.%I IS %L', attname, col_description(attrelid, attnum))
    FROM pg_attribute WHERE attrelid = 'artifact_by_node'::regclass AND attnum > 0 AND attname <> 'node'
    UNION ALL
    SELECT format('GRANT SELECT%s ON artifact TO %s%s', ' (' || quote_ident(attname) || ')',
                  CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END,
                  CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
    FROM (SELECT relowner, NULL AS attname, relacl AS acl FROM pg_class WHERE oid = 'artifact_by_node'::regclass
          UNION ALL
          SELECT relowner, attname, attacl FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
          WHERE attrelid = 'artifact_by_node'::regclass) AS granted, aclexplode(acl)
    WHERE privilege_type = 'SELECT' AND grantee <> relowner
  LOOP
    EXECUTE statement;
  END LOOP;
  FOREACH statement IN ARRAY views LOOP
    EXECUTE statement;
  END LOOP;

  -- With the name of the key, it works before and after the key has the node. Sorted, so that two proxies of one name
  -- cannot deadlock. PL/pgSQL, for Citus: exporter/postgres/citus.sql.
  CREATE OR REPLACE FUNCTION artifact_add(
    node_name text, purls text[], remotes text[], users text[], firsts timestamptz[], lasts timestamptz[], counts bigint[],
    sizes bigint[]
  ) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
  BEGIN
    INSERT INTO artifact_by_node AS known (node, purl, remote, first_user, first_seen, last_seen, fetches, bytes)
    SELECT node_name, * FROM unnest(purls, remotes, users, firsts, lasts, counts, sizes) AS seen ORDER BY 2
    ON CONFLICT ON CONSTRAINT artifact_by_node_pkey DO UPDATE SET
      remote = CASE WHEN excluded.first_seen < known.first_seen THEN excluded.remote ELSE known.remote END,
      first_user = CASE WHEN excluded.first_seen < known.first_seen THEN excluded.first_user ELSE known.first_user END,
      first_seen = least(known.first_seen, excluded.first_seen),
      last_seen = greatest(known.last_seen, excluded.last_seen),
      fetches = known.fetches + excluded.fetches,
      bytes = known.bytes + excluded.bytes;
  END $$;
  COMMENT ON FUNCTION artifact_add(text, text[], text[], text[], timestamptz[], timestamptz[], bigint[], bigint[])
    IS 'Adds fetches of one node to the table artifact_by_node, one array element per artifact';
  EXECUTE format('ALTER FUNCTION artifact_add SET search_path = %I, pg_temp', current_schema());
END $migration$;

COMMENT ON VIEW access_log_first_seen IS 'When each artifact was fetched for the first time, and by whom. Filter with WHERE first_seen >= .... Reads the view artifact, which outlives the log';
COMMENT ON COLUMN advisory_match.purl IS 'Package URL, as in the view artifact';
COMMENT ON COLUMN advisory_state.compared IS 'Number of artifacts that were compared; later ones were not';
