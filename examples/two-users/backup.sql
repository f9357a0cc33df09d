-- The backup job: reads the topic as transactions-backup-job-user, who may do nothing else, and keeps every record.

CREATE SOURCE transactions (
    user_id                      BIGINT NOT NULL,
    transaction_timestamp_millis BIGINT NOT NULL,
    amount                       DOUBLE,
    currency                     VARCHAR,
    counterpart_id               BIGINT,
    event_time TIMESTAMP AS (to_timestamp_millis(transaction_timestamp_millis)),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (
    connector               = 'kafka',
    bootstrap_servers       = '${KAFKA_BROKERS:-localhost:19095}',
    topic                   = '${TOPIC:-transactions}',
    format                  = 'json',
    group_id                = 'transactions-backup',
    kafka.security.protocol = '${KAFKA_PROTOCOL:-SASL_SSL}',
    kafka.ssl.ca.location   = '${KAFKA_CA:-probe}',
    kafka.sasl.mechanism    = 'SCRAM-SHA-512',
    kafka.sasl.username     = '${KAFKA_USER:-transactions-backup-job-user}',
    kafka.sasl.password     = secret('env:KAFKA_BACKUP_PASSWORD')
);

CREATE SINK transactions_backup FROM transactions
WITH (connector = 'delta', location = '${LAKE:-./lake}/transactions_backup', partition_by = 'day(event_time)');
