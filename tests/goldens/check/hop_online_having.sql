CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE SINK o AS SELECT user_id, window_start, count(*) AS n FROM HOP(s, event_time, '1 minute', '5 minutes') GROUP BY user_id, window_start HAVING count(*) > 3 WITH (connector = 'redis', url = 'redis://localhost', key = 'user_id');
