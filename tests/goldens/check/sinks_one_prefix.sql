CREATE SOURCE t (id BIGINT NOT NULL, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)
    WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 't', format = 'json');
CREATE SINK a FROM t WITH (connector = 'redis', url = 'redis://localhost', key = 'id', prefix = 'row:');
CREATE SINK c FROM t WITH (connector = 'redis', url = 'redis://localhost:6379/1', key = 'id', prefix = 'row:');
CREATE SINK d FROM t WITH (connector = 'redis', url = 'redis://localhost:6379/0', key = 'id',
    prefix = 'row:');
