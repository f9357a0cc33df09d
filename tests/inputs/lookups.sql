-- Look-up joins and groups of groups, for lookups.test.yaml.
CREATE SOURCE payments (
    user_id BIGINT NOT NULL,
    amount  BIGINT,
    currency VARCHAR,
    event_time TIMESTAMP,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'localhost:9092', topic = 'payments', format = 'json');

CREATE VIEW rated AS
SELECT p.user_id, p.event_time, p.amount, p.currency, r.rate, amount * rate AS worth
FROM payments p LEFT JOIN (VALUES ('EUR', 10), ('USD', 9), ('USD', 8)) AS r (code, rate) ON upper(p.currency) = r.code AND p.amount > r.rate;

CREATE VIEW known AS SELECT user_id, rate FROM (VALUES ('EUR', 10)) AS r (code, rate) JOIN payments ON currency = code;

CREATE VIEW per_user AS SELECT user_id, count(*) AS n, sum(amount) AS total FROM payments GROUP BY user_id;
CREATE VIEW users_by_count AS SELECT n, count(*) AS users, sum(total) AS total, avg(total) AS mean FROM per_user GROUP BY n;
CREATE VIEW counts AS SELECT DISTINCT n FROM per_user;

CREATE SINK by_count FROM users_by_count WITH (connector = 'memory', key = 'n');
