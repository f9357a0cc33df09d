-- Of every kind of state a bit: rows and keys of OVER, groups, open windows, newest rows, a table.
CREATE SOURCE payments (
    account BIGINT NOT NULL,
    at_millis BIGINT NOT NULL,
    amount BIGINT,
    event_time TIMESTAMP AS (to_timestamp_millis(at_millis)),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'files', path = './input/*.ndjson', format = 'json');

CREATE SINK payments_backup FROM payments WITH (connector = 'delta', location = './lake/payments', metadata = 'none');

CREATE VIEW features AS
SELECT account, event_time, count(*) OVER ever AS n, sum(amount) OVER ever AS total, sum(amount) OVER minute AS amount_1m
FROM payments
WINDOW ever AS (PARTITION BY account ORDER BY event_time),
       minute AS (PARTITION BY account ORDER BY event_time RANGE BETWEEN INTERVAL '1 minute' PRECEDING AND CURRENT ROW);

CREATE SINK features_final FROM features WITH (connector = 'ndjson', location = './out/features');
CREATE SINK features_newest FROM features WITH (connector = 'memory', key = 'account', ttl = '1 day');

CREATE VIEW totals AS SELECT account, count(*) AS n, sum(amount) AS total FROM payments WHERE amount > -900 GROUP BY account;
CREATE SINK totals_newest FROM totals WITH (connector = 'memory', key = 'account');

CREATE VIEW minutes AS
SELECT account, window_start, count(*) AS n, sum(amount) AS total
FROM TUMBLE(payments, event_time, INTERVAL '1 minute') GROUP BY account, window_start;
CREATE SINK minutes_final FROM minutes WITH (connector = 'ndjson', location = './out/minutes');
