-- The training set: each label with the features of its user as they were at its moment. `labels` is a file here, as it
-- mostly comes from elsewhere; a user who had no feature yet stays, with NULL.
SELECT l.user_id, l.ts, l.label, f.event_time, f.total_transactions_count, f.amount_7d, f.hour_of_day
FROM '${LABELS}' AS l
LEFT JOIN ${FEATURES:-user_features_training} FOR SYSTEM_TIME AS OF l.ts AS f ON l.user_id = f.user_id
ORDER BY l.ts, l.user_id
