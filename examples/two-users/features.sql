-- The feature job: reads the topic as transactions-ml-features-job-user, who may also write the topics that begin with
-- `features`; its Redis user may write the keys that begin with `features:`.

CREATE SOURCE transactions (
    user_id                      BIGINT NOT NULL,
    transaction_timestamp_millis BIGINT NOT NULL,
    amount                       DOUBLE,
    event_time TIMESTAMP AS (to_timestamp_millis(transaction_timestamp_millis)),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (
    connector               = 'kafka',
    bootstrap_servers       = '${KAFKA_BROKERS:-localhost:19095}',
    topic                   = '${TOPIC:-transactions}',
    format                  = 'json',
    group_id                = 'ml-features',
    kafka.security.protocol = '${KAFKA_PROTOCOL:-SASL_SSL}',
    kafka.ssl.ca.location   = '${KAFKA_CA:-probe}',
    kafka.sasl.mechanism    = 'SCRAM-SHA-512',
    kafka.sasl.username     = '${KAFKA_USER:-transactions-ml-features-job-user}',
    kafka.sasl.password     = secret('env:KAFKA_FEATURES_PASSWORD')
);

CREATE VIEW user_transaction_features AS
SELECT user_id, event_time,
       count(*)    OVER all_time AS total_transactions_count,
       sum(amount) OVER week     AS amount_7d
FROM transactions
WINDOW all_time AS (PARTITION BY user_id ORDER BY event_time),
       week     AS (PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL '7 days' PRECEDING AND CURRENT ROW);

-- The newest features of each user, for serving.
CREATE SINK user_features_serving FROM user_transaction_features
WITH (
    connector = 'redis',
    url       = '${REDIS_URL:-rediss://localhost:16380}',
    user      = 'features',
    password  = secret('env:REDIS_PASSWORD'),
    tls_ca    = '${REDIS_CA:-system}',
    key       = 'user_id',
    prefix    = '${PREFIX:-features:}',
    ttl       = '30 days'
);

-- Every final row, for whoever wants to follow them; the sink makes the topic if it is missing.
CREATE SINK user_features_topic FROM user_transaction_features
WITH (
    connector               = 'kafka',
    bootstrap_servers       = '${KAFKA_BROKERS:-localhost:19095}',
    topic                   = '${FEATURES_TOPIC:-features-transactions}',
    format                  = 'json',
    key                     = 'user_id',
    kafka.security.protocol = '${KAFKA_PROTOCOL:-SASL_SSL}',
    kafka.ssl.ca.location   = '${KAFKA_CA:-probe}',
    kafka.sasl.mechanism    = 'SCRAM-SHA-512',
    kafka.sasl.username     = '${KAFKA_USER:-transactions-ml-features-job-user}',
    kafka.sasl.password     = secret('env:KAFKA_FEATURES_PASSWORD')
);
