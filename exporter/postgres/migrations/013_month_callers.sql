-- Proxies of earlier versions can still write.
--
-- Merged callers of a month: most of the time of a report of a year went into counting those of each day.

-- In blocks, because Citus sends its nodes the text that contains the statement, and takes only one.
DO $$ BEGIN
  ALTER TABLE access_log_rollup_month ADD users text[], ADD clients inet[];
END $$;
COMMENT ON COLUMN access_log_rollup_month.users IS 'Each proxy_user once; NULL = an earlier version merged this month, and left out its callers';
COMMENT ON COLUMN access_log_rollup_month.clients IS 'Each client_ip once; NULL = an earlier version merged this month';

CREATE TABLE access_log_rollup_month_host (
  month_id    bigint      NOT NULL REFERENCES access_log_rollup_month ON DELETE CASCADE,
  host        text        NOT NULL,
  requests    bigint      NOT NULL,
  sent_bytes  bigint      NOT NULL,
  first_at    timestamptz NOT NULL,
  callers     text[]      NOT NULL
);
DO $$ BEGIN
  CREATE INDEX access_log_rollup_month_host_idx ON access_log_rollup_month_host (month_id);
END $$;
COMMENT ON TABLE access_log_rollup_month_host IS 'The rows of access_log_rollup_host of a month that name a host';
COMMENT ON COLUMN access_log_rollup_month_host.month_id IS 'The month';
COMMENT ON COLUMN access_log_rollup_month_host.host IS 'Requested host';
COMMENT ON COLUMN access_log_rollup_month_host.requests IS 'Number of requests';
COMMENT ON COLUMN access_log_rollup_month_host.sent_bytes IS 'Bytes of request bodies';
COMMENT ON COLUMN access_log_rollup_month_host.first_at IS 'started_at of the first request';
COMMENT ON COLUMN access_log_rollup_month_host.callers IS 'Who made the requests, each once; see access_log_caller';

-- Who may read the months may read their hosts.
DO $$
DECLARE
  reader text;
BEGIN
  FOR reader IN
    SELECT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END FROM pg_class, aclexplode(relacl)
    WHERE oid = 'access_log_rollup_month'::regclass AND privilege_type = 'SELECT' AND grantee <> relowner
  LOOP
    EXECUTE format('GRANT SELECT ON access_log_rollup_month_host TO %s', reader);
  END LOOP;
END $$;
