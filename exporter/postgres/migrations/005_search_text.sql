-- Proxies of earlier versions can still write.
--
-- What the filter `text` searches, as one expression, so that one index can serve it.

CREATE OR REPLACE FUNCTION access_log_search_text(host text, path text, package text, purl text, proxy_user text)
RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
  RETURN coalesce(host, '') || E'\n' || coalesce(path, '') || E'\n' || coalesce(package, '') || E'\n'
         || coalesce(purl, '') || E'\n' || coalesce(proxy_user, '');
COMMENT ON FUNCTION access_log_search_text(text, text, text, text, text) IS 'What the filter text searches, one column per line. Compare with ILIKE: days that are over may have an index for it';
