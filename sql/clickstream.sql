-- Web logs as an Elasticsearch export holds them → features per click: time, place, session, recent clicks.
-- From a topic here; the same views over exported files: examples/clickstream/export.sql.

CREATE SOURCE clicks (
    _index     VARCHAR,
    _source    STRUCT<"createdDateTime" BIGINT, zip VARCHAR, session_id VARCHAR> NOT NULL,
    event_time TIMESTAMP AS (to_timestamp_millis(_source['createdDateTime'])),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (
    connector         = 'kafka',
    bootstrap_servers = '${KAFKA_BROKERS:-localhost:9092}',
    topic             = 'clicks',
    format            = 'json'
);

-- A click without a session cannot be counted; its ZIP may be missing.
CREATE VIEW clicks_flat AS
SELECT event_time,
       _source['session_id'] AS session_id,
       _source['zip']        AS zip
FROM clicks
WHERE _source['session_id'] IS NOT NULL;

CREATE VIEW click_features AS
SELECT session_id, event_time, zip,
       hour_of_day(event_time)                   AS hour_of_day,
       day_of_week(event_time)                   AS day_of_week,
       day_of_year(event_time)                   AS day_of_year,
       zip_lookup(zip, 'region')                 AS region,
       zip_lookup(zip, 'median_household_income') AS median_household_income,
       count(*) OVER five_minutes                AS clicks_5m,
       count(*) OVER sixty_minutes               AS clicks_60m,
       (CAST(event_time AS BIGINT) - CAST(min(event_time) OVER visit AS BIGINT)) / 1000000.0 AS session_seconds
FROM clicks_flat
WINDOW five_minutes  AS (PARTITION BY session_id ORDER BY event_time RANGE BETWEEN INTERVAL '5 minutes' PRECEDING AND CURRENT ROW),
       sixty_minutes AS (PARTITION BY session_id ORDER BY event_time RANGE BETWEEN INTERVAL '60 minutes' PRECEDING AND CURRENT ROW),
       visit         AS (PARTITION BY session_id ORDER BY event_time RANGE BETWEEN INTERVAL '1 day' PRECEDING AND CURRENT ROW);

CREATE SINK clicks_backup FROM clicks
WITH (connector = 'delta', location = '${LAKE:-./lake}/clicks_backup', partition_by = 'day(event_time)');

CREATE SINK click_features_training FROM click_features
WITH (connector = 'delta', location = '${LAKE:-./lake}/click_features', partition_by = 'day(event_time)');

CREATE SINK click_features_serving FROM click_features
WITH (connector = 'redis', url = '${REDIS_URL:-redis://localhost:6379}', key = 'session_id', prefix = 'session:', ttl = '1 day');
