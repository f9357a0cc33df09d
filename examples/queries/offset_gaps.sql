-- Offsets that the backup lacks. Dead letters and control records of transactions leave gaps too: compare with
-- `millstream dead-letters ls`.
SELECT _topic, _partition, previous + 1 AS from_offset, _offset - 1 AS to_offset, _offset - previous - 1 AS missing
FROM (
    SELECT _topic, _partition, _offset,
           lag(_offset) OVER (PARTITION BY _topic, _partition ORDER BY _offset) AS previous
    FROM transactions_backup
) AS offsets
WHERE _offset > previous + 1
ORDER BY _topic, _partition, from_offset;
