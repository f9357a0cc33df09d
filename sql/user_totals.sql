-- Totals per user, kept up to date: to a Delta table with one row per user, and to Redis.
-- Reads the source of transactions.sql: millstream run sql/transactions.sql sql/user_totals.sql

CREATE VIEW user_totals AS
SELECT user_id,
       count(*)        AS total_transactions_count,
       sum(amount)     AS total_amount,
       max(event_time) AS last_transaction_at
FROM transactions
GROUP BY user_id;

CREATE SINK user_totals_table FROM user_totals
WITH (connector = 'delta', location = '${LAKE:-./lake}/user_totals', mode = 'upsert', key = 'user_id');

CREATE SINK user_totals_serving FROM user_totals
WITH (connector = 'redis', url = '${REDIS_URL:-redis://localhost:6379}', key = 'user_id', prefix = 'total:');
