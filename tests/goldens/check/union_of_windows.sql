CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    amount  DOUBLE,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE VIEW v AS SELECT user_id, count(*) OVER (PARTITION BY user_id ORDER BY event_time) AS n FROM s;
CREATE SINK o AS SELECT user_id, n FROM v UNION ALL SELECT user_id, 0 FROM s WITH (connector = 'blackhole');
