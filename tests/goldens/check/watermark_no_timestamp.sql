CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    amount  DOUBLE,
    event_time TIMESTAMP,
    WATERMARK FOR user_id AS user_id - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE SINK o FROM s WITH (connector = 'blackhole');
