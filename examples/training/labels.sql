-- Labels: moments at which a model is asked, and what came of them. Here: does the user pay again within ten seconds?
-- Every user at every tenth second in which the backup is complete; a hash leaves a tenth of them.
WITH span AS (
    SELECT date_bin(INTERVAL '10 seconds', min(event_time)) + INTERVAL '10 seconds' AS first,
           date_bin(INTERVAL '10 seconds', max(event_time)) - INTERVAL '10 seconds' AS last
    FROM transactions
), moments AS (
    SELECT unnest(generate_series(first, last, INTERVAL '10 seconds')) AS ts FROM span
), asked AS (
    SELECT user_id, ts FROM (SELECT DISTINCT user_id FROM transactions) CROSS JOIN moments
    WHERE left(md5(concat(user_id, ':', ts)), 1) = '0'
)
SELECT a.user_id, a.ts, CAST(count(t.user_id) > 0 AS INT) AS label
FROM asked AS a
LEFT JOIN transactions AS t
  ON t.user_id = a.user_id AND date_bin(INTERVAL '10 seconds', t.event_time) = a.ts AND t.event_time > a.ts
GROUP BY a.user_id, a.ts
