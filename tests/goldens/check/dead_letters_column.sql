CREATE SOURCE s (id BIGINT NOT NULL, t TIMESTAMP, WATERMARK FOR t AS t - INTERVAL '1 second')
WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 's');
CREATE SINK backup FROM s WITH (connector = 'delta', location = './lake/s');
CREATE SINK bad AS SELECT payloads FROM dead_letters WITH (connector = 'console');
