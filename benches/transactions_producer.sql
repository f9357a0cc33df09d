-- Input of benches/transactions.py: as sql/transactions_producer.sql, but as fast as the broker takes it (RATE=0), or
-- paced with event times that are true to the moment and in order, for freshness.
CREATE SOURCE ticks (
    seq BIGINT NOT NULL, event_time TIMESTAMP NOT NULL,
    r1 DOUBLE NOT NULL, r2 DOUBLE NOT NULL, r3 DOUBLE NOT NULL, r4 DOUBLE NOT NULL,
    WATERMARK FOR event_time AS event_time
) WITH (connector = 'generator', rows_per_second = '${RATE}', total = '${ROWS}', seed = '7',
        lookback = '${LOOKBACK}');

CREATE SINK topic AS
SELECT CAST(floor(${USERS} * r1 * r1) AS BIGINT)                                              AS user_id,
       CAST(date_part('epoch', event_time) * 1000 AS BIGINT) - CAST(${DISORDER} * r2 AS BIGINT) AS transaction_timestamp_millis,
       round(2000 * r3 - 1000, 2)                                                             AS amount,
       CASE seq % 5 WHEN 0 THEN 'EUR' WHEN 1 THEN 'USD' WHEN 2 THEN 'GBP' WHEN 3 THEN 'CHF' ELSE 'JPY' END AS currency,
       CAST(1 + floor(500000 * r4) AS BIGINT)                                                 AS counterpart_id
FROM ticks
WITH (
    connector = 'kafka', bootstrap_servers = '${KAFKA_BROKERS}', topic = '${TOPIC}', format = 'json', key = 'user_id',
    'topic.partitions' = '4', 'topic.retention' = '1 day'
);
