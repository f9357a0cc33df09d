CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    amount  DOUBLE,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE VIEW totals AS
SELECT user_id, count(*) AS n FROM s GROUP BY user_id;
CREATE SINK o AS SELECT n, stddev(user_id) AS spread FROM totals GROUP BY n WITH (connector = 'blackhole');
