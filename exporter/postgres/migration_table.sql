-- Which changes of the schema a database has. exporter/postgres/schema.py runs this file with each of them.
--
-- access_log_schema has only the versions that earlier proxies cannot write to, because they refuse versions
-- that they do not know. This table also has the changes that they can ignore.

CREATE TABLE IF NOT EXISTS access_log_migration (
  number      integer     PRIMARY KEY,
  applied_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE access_log_migration IS
  'Changes of the schema that were applied to this database, including those that earlier proxies can ignore';
COMMENT ON COLUMN access_log_migration.number IS
  'Number of the file in exporter/postgres/migrations; 1 = schema.sql';
COMMENT ON COLUMN access_log_migration.applied_at IS 'When it was applied';
-- Roles of proxies that exist can read it without a new grant.
GRANT SELECT ON access_log_migration TO PUBLIC;
