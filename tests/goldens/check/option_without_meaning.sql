CREATE SOURCE s (seq BIGINT NOT NULL, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)
WITH (connector = 'generator');

CREATE SINK o AS SELECT seq AS user_id, event_time FROM s WITH (connector = 'delta', location = './lake/o', key = 'user_id');
