CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    amount  DOUBLE,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE SINK o AS SELECT user_id, amount, count(*) AS n FROM s GROUP BY user_id, amount
WITH (connector = 'redis', url = 'redis://localhost', key = 'user_id');
