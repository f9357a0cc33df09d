-- Sample input of events.sql: every tenth event comes twice, one in fifty has a name that nobody declared.

CREATE SOURCE ticks (
    seq        BIGINT NOT NULL,
    event_time TIMESTAMP NOT NULL,
    r1 DOUBLE NOT NULL,
    r2 DOUBLE NOT NULL,
    WATERMARK FOR event_time AS event_time
) WITH (
    connector       = 'generator',
    rows_per_second = '${RATE:-1000}',
    seed            = '13',
    lookback        = '1 minute'
);

CREATE SINK app_events_topic AS
SELECT 'e' || CAST(CASE WHEN seq % 10 = 1 THEN seq - 1 ELSE seq END AS VARCHAR)              AS event_uuid,
       date_part('epoch', event_time) - round(4 * r2, 3)                                     AS created_at,
       CASE WHEN seq % 50 = 7 THEN 'app:crash'
            ELSE array_element(['app:open', 'app:close', 'lesson:start', 'lesson:finish', 'lesson:abort', 'shop:view', 'shop:buy'],
                               CAST(1 + floor(7 * r1) AS BIGINT)) END                        AS event_name,
       named_struct('language_id', array_element(['de', 'en', 'es', 'fr'], 1 + seq % 4),
                    'screen', 'screen-' || CAST(seq % 12 AS VARCHAR),
                    'duration_ms', CAST(round(60000 * r2) AS BIGINT))                        AS event_specifics
FROM ticks
WITH (
    connector          = 'kafka',
    bootstrap_servers  = '${KAFKA_BROKERS:-localhost:9092}',
    topic              = 'app_events',
    format             = 'json',
    key                = 'event_uuid',
    'topic.partitions' = '4',
    'topic.retention'  = '1 day'
);
