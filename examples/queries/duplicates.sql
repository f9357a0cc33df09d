-- Is a record in the backup twice? No rows: every record of the topic is there once.
SELECT _topic, _partition, _offset, count(*) AS copies
FROM transactions_backup
GROUP BY _topic, _partition, _offset
HAVING count(*) > 1
ORDER BY _topic, _partition, _offset;
