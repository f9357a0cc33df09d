-- Sample input of transactions.sql: skewed users, several currencies, disorder below the lateness, keyed by user.
-- The generator gives seq, event_time and uniform numbers r1, r2, … in [0, 1); SQL makes the fields.

CREATE SOURCE ticks (
    seq        BIGINT NOT NULL,
    event_time TIMESTAMP NOT NULL,
    r1 DOUBLE NOT NULL,
    r2 DOUBLE NOT NULL,
    r3 DOUBLE NOT NULL,
    r4 DOUBLE NOT NULL,
    WATERMARK FOR event_time AS event_time
) WITH (
    connector       = 'generator',
    rows_per_second = '${RATE:-2000}',
    seed            = '7',
    lookback        = '1 minute'
);

CREATE SINK transactions_topic AS
SELECT CAST(floor(5000 * r1 * r1) AS BIGINT)                                             AS user_id,
       CAST(date_part('epoch', event_time) * 1000 AS BIGINT) - CAST(4000 * r2 AS BIGINT) AS transaction_timestamp_millis,
       round(2000 * r3 - 1000, 2)                                                        AS amount,
       CASE seq % 5 WHEN 0 THEN 'EUR' WHEN 1 THEN 'USD' WHEN 2 THEN 'GBP' WHEN 3 THEN 'CHF' ELSE 'JPY' END AS currency,
       CAST(1 + floor(500000 * r4) AS BIGINT)                                            AS counterpart_id
FROM ticks
WITH (
    connector          = 'kafka',
    bootstrap_servers  = '${KAFKA_BROKERS:-localhost:9092}',
    topic              = 'transactions',
    format             = 'json',
    key                = 'user_id',
    'topic.partitions' = '4',
    'topic.retention'  = '1 day'
);
