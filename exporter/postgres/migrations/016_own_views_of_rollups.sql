-- Proxies of earlier versions can still write.
--
-- Views that somebody made of the table access_log_rollup_artifact followed it when it got another name, and no longer
-- found the artifacts of new rollups. They are to read the view of that name.

DO $$
DECLARE
  statement text;
BEGIN
  FOR statement IN
    SELECT format('CREATE OR REPLACE VIEW %s%s AS %s', oid::regclass,
                  ' WITH (' || array_to_string(reloptions, ', ') || ')',
                  regexp_replace(pg_get_viewdef(oid), '\maccess_log_rollup_unpacked\M', 'access_log_rollup_artifact', 'g'))
    FROM pg_class
    WHERE relkind = 'v' AND pg_has_role(relowner, 'USAGE') AND oid IN (
      SELECT ev_class FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid
      WHERE classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass
        AND refobjid = 'access_log_rollup_unpacked'::regclass)
      AND oid NOT IN ('access_log_rollup_artifact'::regclass, 'access_log_daily_fetches'::regclass)
  LOOP
    EXECUTE statement;
  END LOOP;
END $$;
