-- The newest transaction of every user.
SELECT user_id, event_time, amount, currency
FROM (
    SELECT user_id, event_time, amount, currency,
           row_number() OVER (PARTITION BY user_id ORDER BY event_time DESC, _partition DESC, _offset DESC) AS newest
    FROM transactions_backup
) AS numbered
WHERE newest = 1
ORDER BY user_id;
