-- Proxies of earlier versions can still write.
--
-- What the client asked for, where the proxy fetched another URL.

ALTER TABLE access_log ADD COLUMN requested_url text;
COMMENT ON COLUMN access_log.requested_url IS 'URL that the client asked for, redacted, if the proxy fetched another one (map_remote, reverse mode, an addon); NULL = it fetched what the client asked for, or that is unknown';

CREATE OR REPLACE VIEW access_log_fetches AS SELECT * FROM access_log WHERE artifact_complete;
COMMENT ON COLUMN access_log_fetches.requested_url IS 'URL that the client asked for, redacted, if the proxy fetched another one (map_remote, reverse mode, an addon); NULL = it fetched what the client asked for, or that is unknown';
