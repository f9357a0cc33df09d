-- What runs by the clock, beside `millstream run sql/transactions.sql`:
-- millstream schedule sql/transactions.sql sql/schedules.sql

-- At two at night yesterday's training rows are computed anew, late transactions included.
CREATE SCHEDULE nightly CRON '0 2 * * *' AS BACKFILL user_features_training FOR LAST INTERVAL '1 day';
