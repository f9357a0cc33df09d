CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    amount  DOUBLE,
    event_time TIMESTAMP
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');

CREATE SINK o AS SELECT count(*) OVER (PARTITION BY user_id ORDER BY event_time) AS n FROM s WITH (connector = 'blackhole');
