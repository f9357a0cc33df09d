CREATE SOURCE s (id BIGINT) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 's');
CREATE SINK bad FROM dead_letters WITH (connector = 'ndjson', location = './bad');
