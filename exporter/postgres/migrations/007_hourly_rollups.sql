-- Proxies of earlier versions can still write.
--
-- Rollups of single hours, until the rollup of their day replaces them. A day can have many rollups, and each of
-- them may have the same fetches.

COMMENT ON TABLE access_log_rollup IS 'Totals of a day (UTC), or of an hour of a day that is not over. Those of the same day add up: rows may arrive after their day was pruned';

CREATE OR REPLACE VIEW access_log_daily_fetches AS
  SELECT (from_at AT TIME ZONE 'UTC')::date AS day, users[number] AS proxy_user, purl, min(artifact.remote) AS remote
  FROM access_log_rollup JOIN access_log_rollup_artifact AS artifact USING (rollup_id)
  CROSS JOIN unnest(user_numbers) AS number
  GROUP BY 1, 2, 3;

COMMENT ON VIEW access_log_daily IS 'Requests by day (UTC), also of days whose rows were pruned. Hours appear about an hour after they are over';
COMMENT ON VIEW access_log_daily_fetches IS 'Which proxy user (build) fetched which artifact on which day (UTC), also of days whose rows were pruned. Hours appear about an hour after they are over';
