CREATE SOURCE s (user_id BIGINT NOT NULL, t TIMESTAMP, WATERMARK FOR t AS t)
WITH (connector = 'kafak', topic = 's');
