CREATE SOURCE t (id BIGINT NOT NULL, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)
    WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');
CREATE SINK a FROM t WITH (connector = 'delta', location = './lake/rows');
CREATE SINK b FROM t WITH (connector = 'ndjson', location = 'lake/../lake/rows/');
