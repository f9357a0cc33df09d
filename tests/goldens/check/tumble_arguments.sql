CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE SINK o AS SELECT window_start, count(*) AS n FROM TUMBLE(s, event_time, 'a minute') GROUP BY window_start WITH (connector = 'blackhole');
