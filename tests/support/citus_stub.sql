-- Stands in for the extension citus on one server: its functions distribute nothing, but they reject what Citus rejects.
-- Loaded into a database of its own, because its objects are in pg_catalog. The messages are those of Citus 12.1.

SET allow_system_table_mods = on;

CREATE TABLE pg_catalog.pg_dist_local_group (groupid integer NOT NULL);
INSERT INTO pg_catalog.pg_dist_local_group VALUES (0);  -- above 0: this is a worker
CREATE TABLE pg_catalog.pg_dist_node (groupid integer NOT NULL, nodename text NOT NULL, nodeport integer NOT NULL, isactive boolean NOT NULL);
INSERT INTO pg_catalog.pg_dist_node VALUES (0, 'coordinator', 5432, true), (1, 'worker', 5432, true);
CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass NOT NULL, partmethod "char" NOT NULL, repmodel "char" NOT NULL, partkey text);
CREATE TABLE pg_catalog.distributed_function (function regprocedure NOT NULL, argument text NOT NULL);
CREATE TABLE pg_catalog.command_on_coordinator (command text NOT NULL);

-- A view of the table whose function depends on the table: only a parsed body has dependencies.
CREATE FUNCTION pg_catalog.stub_has_cycle(relation regclass) RETURNS boolean LANGUAGE sql AS $$
  WITH RECURSIVE needs (class, id) AS (
    SELECT 'pg_class'::regclass::oid, ev_class FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid
    WHERE classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass AND refobjid = relation AND ev_class <> relation
    UNION
    SELECT refclassid, refobjid FROM needs
    JOIN pg_depend ON (classid, objid) = (class, id)
      OR (classid = 'pg_rewrite'::regclass AND class = 'pg_class'::regclass
          AND objid IN (SELECT oid FROM pg_rewrite WHERE ev_class = id))
    WHERE refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass) AND refobjid <> relation
  )
  SELECT EXISTS (SELECT 1 FROM needs JOIN pg_depend ON (classid, objid) = (class, id)
                 WHERE class = 'pg_proc'::regclass AND refclassid = 'pg_class'::regclass AND refobjid = relation)
$$;

CREATE FUNCTION pg_catalog.create_distributed_table(table_name regclass, distribution_column text, colocate_with text DEFAULT 'default')
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  index_name regclass;
BEGIN
  IF stub_has_cycle(table_name) THEN
    RAISE EXCEPTION 'Citus can not handle circular dependencies between distributed objects' USING ERRCODE = '0A000';
  END IF;
  IF EXISTS (SELECT 1 FROM pg_trigger WHERE NOT tgisinternal AND (
               tgrelid = table_name OR tgrelid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = table_name))) THEN
    RAISE EXCEPTION 'cannot distribute relation "%" because it has triggers', table_name USING ERRCODE = '0A000';
  END IF;
  FOR index_name IN
    SELECT indexrelid FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attname = distribution_column
    WHERE indrelid = table_name AND (indisunique OR indisexclusion) AND attnum <> ALL (indkey::smallint[]) LOOP
    RAISE EXCEPTION 'cannot create constraint on "%" that does not include the distribution column: %', table_name, index_name
    USING ERRCODE = '0A000';
  END LOOP;
  IF colocate_with NOT IN ('default', 'none') AND NOT EXISTS (
    SELECT 1 FROM pg_dist_partition WHERE logicalrelid = colocate_with::regclass AND partmethod = 'h') THEN
    RAISE EXCEPTION 'relation % is not distributed', colocate_with;
  END IF;
  INSERT INTO pg_dist_partition SELECT table_name, 'h', 's', distribution_column
  UNION ALL SELECT inhrelid, 'h', 's', distribution_column FROM pg_inherits WHERE inhparent = table_name;
END $$;

CREATE FUNCTION pg_catalog.create_reference_table(table_name regclass) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM pg_trigger WHERE NOT tgisinternal AND tgrelid = table_name) OR stub_has_cycle(table_name)
     OR EXISTS (SELECT 1 FROM pg_dist_partition WHERE logicalrelid = table_name) THEN
    RAISE EXCEPTION 'cannot distribute relation "%"', table_name USING ERRCODE = '0A000';
  END IF;
  INSERT INTO pg_dist_partition VALUES (table_name, 'n', 't', NULL);
END $$;

CREATE FUNCTION pg_catalog.create_distributed_function(
  function_name regprocedure, distribution_arg_name text, colocate_with text, force_delegation boolean
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM pg_proc WHERE oid = function_name AND distribution_arg_name = ANY (proargnames)) THEN
    RAISE EXCEPTION 'cannot distribute the function "%" because the distribution argument is not valid', function_name;
  END IF;
  -- Citus says so at the first call.
  IF EXISTS (SELECT 1 FROM pg_proc JOIN pg_language ON pg_language.oid = prolang WHERE pg_proc.oid = function_name AND lanname = 'sql') THEN
    RAISE EXCEPTION 'could not create distributed plan: SQL functions cannot use parameters';
  END IF;
  INSERT INTO distributed_function VALUES (function_name, distribution_arg_name);
END $$;

CREATE FUNCTION pg_catalog.truncate_local_data_after_distributing_table(function_name regclass) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION pg_catalog.citus_total_relation_size(logicalrelid regclass) RETURNS bigint LANGUAGE sql AS
  'SELECT pg_total_relation_size(logicalrelid)';

CREATE FUNCTION pg_catalog.run_command_on_coordinator(command text, OUT nodeid integer, OUT success boolean, OUT result text)
RETURNS SETOF record LANGUAGE plpgsql AS $$
DECLARE
  group_here integer := (SELECT groupid FROM pg_dist_local_group);
BEGIN
  IF NOT EXISTS (SELECT 1 FROM pg_dist_node WHERE groupid = 0) THEN
    RAISE EXCEPTION 'the coordinator is not added to the metadata';
  END IF;
  INSERT INTO command_on_coordinator VALUES (command);
  UPDATE pg_dist_local_group SET groupid = 0;
  BEGIN
    EXECUTE command;
    RETURN QUERY SELECT 1, true, ''::text;
  EXCEPTION WHEN OTHERS THEN
    RETURN QUERY SELECT 1, false, 'ERROR: ' || SQLERRM;
  END;
  UPDATE pg_dist_local_group SET groupid = group_here;
END $$;

CREATE FUNCTION pg_catalog.stub_check_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (SELECT groupid FROM pg_dist_local_group) > 0 AND tg_tag NOT IN ('COMMENT', 'CREATE SCHEMA', 'DROP SCHEMA') THEN
    RAISE EXCEPTION 'operation is not allowed on this node' USING ERRCODE = '0A000', HINT = 'Connect to the coordinator and run it again.';
  END IF;
  IF tg_tag = 'ALTER TABLE' AND current_query() ~* 'detach\s+partition.*(concurrently|finalize)' THEN
    RAISE EXCEPTION 'ALTER TABLE .. DETACH PARTITION .. CONCURRENTLY commands are currently unsupported.' USING ERRCODE = '0A000';
  END IF;
END $$;
CREATE EVENT TRIGGER stub_check_ddl ON ddl_command_start EXECUTE FUNCTION pg_catalog.stub_check_ddl();

-- New partitions of a distributed table are distributed, and dropped tables are forgotten.
CREATE FUNCTION pg_catalog.stub_follow_partitions() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO pg_dist_partition SELECT inhrelid, 'h', 's', partkey
  FROM pg_inherits JOIN pg_dist_partition ON logicalrelid = inhparent
  WHERE inhrelid <> ALL (SELECT logicalrelid FROM pg_dist_partition) AND partmethod = 'h'
    AND inhparent IN (SELECT oid FROM pg_class WHERE relkind = 'p');
  DELETE FROM pg_dist_partition WHERE logicalrelid::oid <> ALL (SELECT oid FROM pg_class);
END $$;
CREATE EVENT TRIGGER stub_follow_partitions ON ddl_command_end EXECUTE FUNCTION pg_catalog.stub_follow_partitions();
