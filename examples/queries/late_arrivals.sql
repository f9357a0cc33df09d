-- How long after their event records came, per partition: the lateness that a WATERMARK has to allow for.
SELECT _partition, count(*) AS n,
       sum(CASE WHEN _timestamp > event_time + INTERVAL '5 seconds' THEN 1 ELSE 0 END) AS later_than_5s,
       max(date_part('epoch', _timestamp) - date_part('epoch', event_time)) AS worst_seconds
FROM transactions_backup
GROUP BY _partition
ORDER BY _partition;
