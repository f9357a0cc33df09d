-- The ten busiest users.
SELECT user_id, count(*) AS transactions, sum(amount) AS total, max(event_time) AS last_seen
FROM transactions_backup
GROUP BY user_id
ORDER BY transactions DESC, user_id
LIMIT 10;
