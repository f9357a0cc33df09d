-- App events → each event once, its name split and checked, times as timestamps: NDJSON staging and a Delta table.

CREATE SOURCE events (
    event_uuid      VARCHAR NOT NULL,
    created_at      DOUBLE NOT NULL,
    event_name      VARCHAR NOT NULL,
    event_specifics STRUCT<language_id VARCHAR, screen VARCHAR, duration_ms BIGINT>,
    event_time      TIMESTAMP AS (to_timestamp_micros(CAST(round(created_at * 1000000) AS BIGINT))),
    -- What is not declared here is a dead letter, with this text.
    event_type      VARCHAR AS (ensure(split_part(event_name, ':', 1),
                        event_name IN ('app:open', 'app:close', 'lesson:start', 'lesson:finish', 'lesson:abort', 'shop:view', 'shop:buy'),
                        'unknown event ' || event_name)),
    event_subtype   VARCHAR AS (split_part(event_name, ':', 2)),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (
    connector         = 'kafka',
    bootstrap_servers = '${KAFKA_BROKERS:-localhost:9092}',
    topic             = 'app_events',
    format            = 'json'
);

-- The first of the events with one UUID within an hour of the clock: phones send again what was not acknowledged.
CREATE VIEW numbered_events AS
SELECT event_uuid, event_time, event_type, event_subtype, event_specifics,
       row_number() OVER (PARTITION BY event_uuid, window_start ORDER BY event_time) AS copy
FROM TUMBLE(events, event_time, INTERVAL '1 hour');

CREATE VIEW distinct_events AS
SELECT event_uuid, event_time, event_type, event_subtype,
       to_char(event_time, '%Y-%m-%dT%H:%M:%S%.3fZ')          AS created_at_iso,
       coalesce(event_specifics['language_id'], 'unknown')    AS language_id,
       event_specifics['screen']                              AS screen,
       event_specifics['duration_ms']                         AS duration_ms
FROM numbered_events
WHERE copy = 1;

CREATE SINK events_staging FROM distinct_events
WITH (connector = 'ndjson', location = '${LAKE:-./lake}/events_staging',
      partition_by = 'year(event_time), month(event_time), day(event_time), hour(event_time), minute(event_time)');

CREATE SINK events_table FROM distinct_events
WITH (connector = 'delta', location = '${LAKE:-./lake}/events',
      partition_by = 'year(event_time), month(event_time), day(event_time), language_id');
