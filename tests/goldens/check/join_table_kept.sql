CREATE SOURCE s (
    user_id BIGINT NOT NULL,
    currency VARCHAR,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');
CREATE TABLE rates (currency VARCHAR, rate DOUBLE) WITH (connector = 'csv', location = './rates.csv');

CREATE SINK o AS SELECT user_id, rate FROM s RIGHT JOIN rates r ON s.currency = r.currency WITH (connector = 'blackhole');
