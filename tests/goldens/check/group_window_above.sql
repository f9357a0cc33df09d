CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    amount  DOUBLE,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE VIEW m AS SELECT user_id, max(event_time) AS event_time, count(*) AS n FROM s GROUP BY user_id;
CREATE SINK o AS SELECT sum(n) OVER (PARTITION BY user_id ORDER BY event_time) AS a FROM m WITH (connector = 'blackhole');
