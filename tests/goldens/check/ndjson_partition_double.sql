CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    amount  DOUBLE,
    language VARCHAR,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE SINK o FROM s WITH (connector = 'ndjson', location = './t', partition_by = 'amount');
