-- All that is known of one user: --set USER_ID=7
SELECT event_time, amount, currency, counterpart_id, _partition, _offset
FROM transactions_backup
WHERE user_id = ${USER_ID:-7}
ORDER BY event_time, _partition, _offset;
