-- Rows per day and partition: a day that is short, a partition that gets nothing.
SELECT CAST(event_time AS DATE) AS day, _partition, count(*) AS n, min(_offset) AS first_offset, max(_offset) AS last_offset
FROM transactions_backup
GROUP BY CAST(event_time AS DATE), _partition
ORDER BY day, _partition;
