-- The clicks of sql/clickstream.sql from exported files instead of the topic: lines or arrays of hits.
--   millstream run sql/clickstream.sql examples/clickstream/export.sql --until-end --close
CREATE OR REPLACE SOURCE clicks (
    _index     VARCHAR,
    _source    STRUCT<"createdDateTime" BIGINT, zip VARCHAR, session_id VARCHAR> NOT NULL,
    event_time TIMESTAMP AS (to_timestamp_millis(_source['createdDateTime'])),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (
    connector = 'files',
    path      = '${EXPORT:-./examples/clickstream/export/*.json}',
    format    = 'json'
);
