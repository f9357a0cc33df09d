CREATE SOURCE s (id BIGINT NOT NULL, t TIMESTAMP, WATERMARK FOR t AS t - INTERVAL '1 second')
WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 's');
CREATE SINK backup FROM s WITH (connector = 'delta', location = './lake/s');
CREATE SINK bad AS SELECT d.error, s.id FROM dead_letters AS d
JOIN s ON s._offset = d."offset" WITH (connector = 'console');
