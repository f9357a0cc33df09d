-- Sessions: a user's transactions with less than 30 minutes between one and the next.
WITH marked AS (
    SELECT user_id, event_time, _partition, _offset,
           CASE WHEN event_time < lag(event_time) OVER (PARTITION BY user_id ORDER BY event_time, _partition, _offset)
                                  + INTERVAL '30 minutes' THEN 0 ELSE 1 END AS begins
    FROM transactions_backup
), numbered AS (
    SELECT user_id, event_time,
           sum(begins) OVER (PARTITION BY user_id ORDER BY event_time, _partition, _offset
                             ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS session
    FROM marked
)
SELECT user_id, session, min(event_time) AS began, max(event_time) AS ended, count(*) AS transactions
FROM numbered
GROUP BY user_id, session
ORDER BY user_id, session;
