-- Sample input of clickstream.sql: sessions of a few clicks, some without a ZIP, keyed by session.

CREATE SOURCE ticks (
    seq        BIGINT NOT NULL,
    event_time TIMESTAMP NOT NULL,
    r1 DOUBLE NOT NULL,
    r2 DOUBLE NOT NULL,
    r3 DOUBLE NOT NULL,
    WATERMARK FOR event_time AS event_time
) WITH (
    connector       = 'generator',
    rows_per_second = '${RATE:-1000}',
    seed            = '11',
    lookback        = '1 minute'
);

CREATE SINK clicks_topic AS
SELECT 'weblogs-' || to_char(event_time, '%Y.%m') AS _index,
       named_struct(
           'createdDateTime', CAST(date_part('epoch', event_time) * 1000 AS BIGINT) - CAST(4000 * r2 AS BIGINT),
           'zip', CASE WHEN r3 < 0.1 THEN NULL ELSE lpad(CAST(CAST(floor(99999 * r3) AS BIGINT) AS VARCHAR), 5, '0') END,
           'session_id', 's' || CAST(seq / 400 * 50 + CAST(floor(50 * r1) AS BIGINT) AS VARCHAR)
       ) AS _source,
       's' || CAST(seq / 400 * 50 + CAST(floor(50 * r1) AS BIGINT) AS VARCHAR) AS session_id
FROM ticks
WITH (
    connector          = 'kafka',
    bootstrap_servers  = '${KAFKA_BROKERS:-localhost:9092}',
    topic              = 'clicks',
    format             = 'json',
    key                = 'session_id',
    'topic.partitions' = '4',
    'topic.retention'  = '1 day'
);
