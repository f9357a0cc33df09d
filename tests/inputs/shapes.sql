CREATE SOURCE t (
    user_id BIGINT NOT NULL, at TIMESTAMP NOT NULL, amount DOUBLE, ok BOOLEAN, tags VARCHAR[],
    WATERMARK FOR at AS at - INTERVAL '10 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'x:1', topic = 'topic_of_t', format = 'json');
CREATE VIEW minutes AS SELECT user_id, window_start, window_end, count(*) AS n, sum(amount) AS amount
FROM TUMBLE(t, at, INTERVAL '1 minute') GROUP BY user_id, window_start, window_end;
CREATE VIEW hops AS SELECT window_start, count(*) AS n FROM HOP(t, at, INTERVAL '30 seconds', INTERVAL '1 minute') GROUP BY window_start;
CREATE VIEW ratio AS SELECT user_id, at, 10 / CAST(amount AS BIGINT) AS r FROM t;
CREATE VIEW ratio_sum AS SELECT user_id, sum(r) AS r FROM ratio GROUP BY user_id;
CREATE VIEW spenders AS SELECT user_id, sum(amount) AS amount FROM t GROUP BY user_id HAVING sum(amount) > 0;
CREATE VIEW both AS SELECT user_id, amount FROM t WHERE ok UNION ALL SELECT user_id, -amount FROM t WHERE NOT ok;
CREATE VIEW one_tag AS SELECT user_id, unnest(tags) AS tag FROM t;
CREATE VIEW users AS SELECT DISTINCT user_id FROM t;
CREATE VIEW totals AS SELECT user_id, count(*) AS n, sum(amount) AS amount, max(at) AS last, min(CASE WHEN ok THEN 'y' ELSE 'n' END) AS ok FROM t GROUP BY user_id;
CREATE VIEW by_count AS SELECT n, min(amount) AS least, max(amount) AS most, max(last) AS last, min(ok) AS ok,
       count(DISTINCT ok) AS oks, count(*) AS users, max(user_id) FILTER (WHERE ok = 'y') AS fine, min(user_id) AS first
FROM totals GROUP BY n;
CREATE VIEW most_users AS SELECT max(users) AS users, min(least) AS least, count(DISTINCT n) AS counts FROM by_count GROUP BY users > 0;
CREATE SINK newest_minute FROM minutes WITH (connector='redis', url='redis://x:1', key='user_id', prefix='m:');
CREATE SINK newest_ratio FROM ratio WITH (connector='redis', url='redis://x:1', key='user_id', prefix='r:', ttl = '1 day');
CREATE SINK no_time AS SELECT user_id, amount FROM t WITH (connector='memory', key='user_id');
CREATE SINK changes FROM minutes WITH (connector='delta', location='./x', mode='changelog');
CREATE SINK log FROM spenders WITH (connector='console');
CREATE SINK raw AS SELECT user_id, _key, _timestamp, amount FROM t WITH (connector='console');
CREATE SINK count_served FROM by_count WITH (connector='redis', url='redis://x:1', key='n', prefix='n:');
