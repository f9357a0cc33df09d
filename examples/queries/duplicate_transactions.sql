-- The same transaction in several records: the producer sent it again. Grouped by what makes it the same.
SELECT user_id, transaction_timestamp_millis, amount, counterpart_id,
       count(*) AS copies, min(_offset) AS first_offset, max(_offset) AS last_offset
FROM transactions_backup
GROUP BY user_id, transaction_timestamp_millis, amount, counterpart_id
HAVING count(*) > 1
ORDER BY copies DESC, user_id, transaction_timestamp_millis, first_offset;
