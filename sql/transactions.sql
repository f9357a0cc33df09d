-- Bank transactions: a backup of the topic, features per user for training (Delta) and serving (Redis).
-- Keyed by user: all rows of a user are in one partition, in order, so a user's features never wait for others.

CREATE SOURCE transactions (
    user_id                      BIGINT NOT NULL,
    transaction_timestamp_millis BIGINT NOT NULL,
    amount                       DOUBLE,
    currency                     VARCHAR,
    counterpart_id               BIGINT,
    event_time TIMESTAMP AS (to_timestamp_millis(transaction_timestamp_millis)),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (
    connector         = 'kafka',
    bootstrap_servers = '${KAFKA_BROKERS:-localhost:9092}',
    topic             = 'transactions',
    format            = 'json',
    history           = 'transactions_backup'
);

CREATE SINK transactions_backup FROM transactions
WITH (connector = 'delta', location = '${LAKE:-./lake}/transactions_backup', partition_by = 'day(event_time)');

CREATE VIEW user_transaction_features AS
SELECT user_id, event_time,
       count(*)    OVER all_time AS total_transactions_count,
       sum(amount) OVER week     AS amount_7d,
       hour_of_day(event_time)   AS hour_of_day,
       day_of_week(event_time)   AS day_of_week
FROM transactions
WINDOW all_time AS (PARTITION BY user_id ORDER BY event_time),
       week     AS (PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL '7 days' PRECEDING AND CURRENT ROW);

CREATE SINK user_features_training FROM user_transaction_features
WITH (connector = 'delta', location = '${LAKE:-./lake}/user_features', partition_by = 'day(event_time)');

CREATE SINK user_features_serving FROM user_transaction_features
WITH (connector = 'redis', url = '${REDIS_URL:-redis://localhost:6379}', key = 'user_id', prefix = 'user:', ttl = '30 days');
