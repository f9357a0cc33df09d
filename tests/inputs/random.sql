-- Every operator that runs as a stream, for random rows: `millstream test tests/inputs/random.sql --random 1000`.
CREATE SOURCE r (
    k BIGINT NOT NULL, at TIMESTAMP NOT NULL, word VARCHAR, n INT, big BIGINT, x DOUBLE, cents DECIMAL(12, 2), ok BOOLEAN,
    day DATE, tags VARCHAR[],
    WATERMARK FOR at AS at - INTERVAL '10 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'x:1', topic = 'r', format = 'json');

-- Rows as they are: filter, functions, failing expressions, UNION ALL, UNNEST.
CREATE VIEW plain AS SELECT k, at, upper(word) AS word, n * 2 AS n, coalesce(x, -1) AS x, date_part('hour', at) AS hour FROM r WHERE ok IS NOT FALSE;
CREATE VIEW ratio AS SELECT k, at, 10 / n AS ratio FROM r;
CREATE VIEW ratio_sum AS SELECT k, sum(ratio) AS ratio, count(*) AS n FROM ratio GROUP BY k;
CREATE VIEW both AS SELECT k, at, n FROM r WHERE ok UNION ALL SELECT k, at, -n FROM r WHERE n > 1 UNION ALL SELECT n AS k, at, n + 0 AS n FROM r;
CREATE VIEW one_tag AS SELECT k, at, word, unnest(tags) AS tag FROM r;
CREATE SINK plain_newest FROM plain WITH (connector = 'memory', key = 'k');
CREATE SINK both_newest FROM both WITH (connector = 'memory', key = 'k');
CREATE SINK tag_newest FROM one_tag WITH (connector = 'memory', key = 'tag');

-- OVER: each frame, each function, NULL keys, several keys and none.
CREATE VIEW over_all AS SELECT k, at, n,
    count(*) OVER w AS rows, count(n) OVER w AS ns, sum(n) OVER w AS sum_n, sum(x) OVER w AS sum_x, avg(n) OVER w AS avg_n, min(x) OVER w AS min_x, sum(cents) OVER w AS cents
FROM r WINDOW w AS (PARTITION BY k ORDER BY at);
CREATE VIEW over_range AS SELECT word, n, at,
    count(*) OVER short AS rows, sum(big) OVER short AS sum_big, avg(x) OVER short AS avg_x, min(n) OVER short AS min_n, max(n) OVER short AS max_n, min(day) OVER short AS day,
    count(n) OVER long AS long_ns, max(cents) OVER long AS long_cents
FROM r WINDOW short AS (PARTITION BY word, n ORDER BY at RANGE BETWEEN INTERVAL '10 seconds' PRECEDING AND CURRENT ROW),
              long AS (PARTITION BY word, n ORDER BY at RANGE BETWEEN INTERVAL '90 minutes' PRECEDING AND CURRENT ROW);
CREATE VIEW over_mixed AS SELECT k, at, x, sum(n) OVER (PARTITION BY k ORDER BY at) AS n_all, max(n) OVER (PARTITION BY k ORDER BY at RANGE BETWEEN INTERVAL '1 minute' PRECEDING AND CURRENT ROW) AS n_minute FROM r WHERE n IS NOT NULL;
CREATE VIEW over_tags AS SELECT tag, at, count(*) OVER (PARTITION BY tag ORDER BY at RANGE BETWEEN INTERVAL '1 minute' PRECEDING AND CURRENT ROW) AS n FROM one_tag;
CREATE VIEW over_both AS SELECT k, at, sum(n) OVER (PARTITION BY k ORDER BY at RANGE BETWEEN INTERVAL '1 hour' PRECEDING AND CURRENT ROW) AS n FROM both;
CREATE SINK over_all_newest FROM over_all WITH (connector = 'memory', key = 'k');
CREATE SINK over_range_newest FROM over_range WITH (connector = 'memory', key = 'word, n');
CREATE SINK over_tags_newest FROM over_tags WITH (connector = 'memory', key = 'tag');

-- The first of several rows.
CREATE VIEW numbered AS SELECT k, at, word, n, row_number() OVER (PARTITION BY word, window_start ORDER BY at) AS copy FROM TUMBLE(r, at, INTERVAL '1 minute');
CREATE VIEW firsts AS SELECT k, at, word, n FROM numbered WHERE copy = 1;
CREATE VIEW row_numbers AS SELECT k, at, n, word, row_number() OVER (PARTITION BY k ORDER BY at) AS number FROM r;

-- GROUP BY that never closes, over rows and over groups.
CREATE VIEW totals AS SELECT k, count(*) AS rows, count(DISTINCT n) AS ns, sum(n) AS sum_n, avg(cents) AS avg_cents, min(word) AS min_word, max(at) AS max_at, sum(x) FILTER (WHERE ok) AS ok_x FROM r GROUP BY k;
CREATE VIEW heavy AS SELECT word, n, count(*) AS rows, sum(big) AS big FROM r GROUP BY word, n HAVING count(*) > 1 AND sum(big) > 3;
CREATE VIEW everything AS SELECT count(*) AS rows, sum(n) AS n, max(x) AS x FROM r;
CREATE VIEW words AS SELECT DISTINCT word FROM r;
CREATE VIEW pairs AS SELECT DISTINCT k, ok FROM r WHERE n IS NOT NULL;
CREATE VIEW tag_counts AS SELECT tag, count(*) AS n FROM one_tag GROUP BY tag;
CREATE VIEW both_sums AS SELECT k, sum(n) AS n FROM both GROUP BY k;
CREATE VIEW by_rows AS SELECT rows, count(*) AS ks, sum(sum_n) AS n, avg(sum_n) AS mean, sum(ok_x) AS x, avg(ok_x) FILTER (WHERE k > 1) AS mean_x, min(ok_x) AS least_x FROM totals GROUP BY rows;
CREATE VIEW by_ks AS SELECT ks, count(*) AS n FROM by_rows GROUP BY ks;
CREATE VIEW row_counts AS SELECT DISTINCT rows FROM totals;
CREATE SINK totals_newest FROM totals WITH (connector = 'memory', key = 'k');
CREATE SINK totals_changes FROM totals WITH (connector = 'console');
CREATE SINK heavy_newest FROM heavy WITH (connector = 'memory', key = 'word, n');
CREATE SINK by_rows_newest FROM by_rows WITH (connector = 'memory', key = 'rows');
CREATE SINK totals_table FROM totals WITH (connector = 'delta', location = './x', mode = 'upsert', key = 'k');
CREATE SINK by_rows_table FROM by_rows WITH (connector = 'delta', location = './y', mode = 'upsert', key = 'rows');

-- Windows that close: each emission, HAVING, hops that do not divide, calendar hours, windows of windows.
CREATE VIEW minutes AS SELECT k, window_start, window_end, count(*) AS rows, sum(n) AS n, avg(x) AS x, min(word) AS word FROM TUMBLE(r, at, INTERVAL '1 minute') GROUP BY k, window_start, window_end;
CREATE VIEW hops AS SELECT k, window_start, window_end, count(*) AS rows, sum(n) FILTER (WHERE ok) AS n, max(x) AS x FROM HOP(r, at, INTERVAL '15 seconds', INTERVAL '40 seconds') GROUP BY k, window_start, window_end;
CREATE VIEW gaps AS SELECT window_start, count(*) AS rows FROM HOP(r, at, INTERVAL '1 minute', INTERVAL '20 seconds') GROUP BY window_start;
CREATE VIEW hours AS SELECT date_trunc('hour', at) AS hour, word, count(*) AS rows, max(n) AS n FROM r GROUP BY date_trunc('hour', at), word;
CREATE VIEW busy AS SELECT k, window_start, count(*) AS rows FROM TUMBLE(r, at, INTERVAL '10 seconds') GROUP BY k, window_start HAVING count(*) > 1;
CREATE VIEW window_words AS SELECT DISTINCT window_start, word FROM TUMBLE(r, at, INTERVAL '30 seconds');
CREATE VIEW small AS SELECT k, window_start AS minute, rows AS minutes_rows FROM minutes;
CREATE VIEW of_minutes AS SELECT k, window_start, window_end, sum(minutes_rows) AS rows, count(*) AS minutes FROM TUMBLE(small, minute, INTERVAL '10 minutes') GROUP BY k, window_start, window_end;
CREATE VIEW over_minutes AS SELECT k, window_start, rows, sum(rows) OVER (PARTITION BY k ORDER BY window_start RANGE BETWEEN INTERVAL '10 minutes' PRECEDING AND CURRENT ROW) AS recent FROM minutes;
CREATE SINK minutes_newest FROM minutes WITH (connector = 'memory', key = 'k');
CREATE SINK minutes_each FROM minutes WITH (connector = 'memory', key = 'k, window_start, window_end');
CREATE SINK minutes_changes FROM minutes WITH (connector = 'console');
CREATE SINK minutes_table FROM minutes WITH (connector = 'delta', location = './z', mode = 'upsert', key = 'k, window_start, window_end');
CREATE SINK hops_changes FROM hops WITH (connector = 'delta', location = './c', mode = 'changelog');
CREATE SINK hops_newest FROM hops WITH (connector = 'memory', key = 'k');
CREATE SINK hours_newest FROM hours WITH (connector = 'memory', key = 'word');
CREATE SINK busy_changes FROM busy WITH (connector = 'console');
CREATE SINK busy_each FROM busy WITH (connector = 'memory', key = 'k, window_start');

-- Look-ups that hit once, several times and not at all.
CREATE TABLE rates (code VARCHAR, rate BIGINT) WITH (connector = 'csv', location = 'tests/inputs/rates.csv');
CREATE VIEW rated AS SELECT r.k, r.at, r.word, t.rate, r.n * t.rate AS worth FROM r LEFT JOIN rates t ON r.word = t.code AND r.n < t.rate;
CREATE VIEW known AS SELECT r.k, r.at, t.rate FROM (VALUES ('USD', 1), ('EUR', 2), ('EUR', 3), (NULL, 4)) AS t (code, rate) JOIN r ON upper(r.word) = t.code;
CREATE VIEW rate_totals AS SELECT rate, count(*) AS rows, sum(worth) AS worth FROM rated GROUP BY rate;
CREATE VIEW rated_minutes AS SELECT rate, window_start, count(*) AS rows FROM TUMBLE(rated, at, INTERVAL '1 minute') GROUP BY rate, window_start;
CREATE VIEW over_rated AS SELECT k, at, rate, count(rate) OVER (PARTITION BY k ORDER BY at) AS hits FROM rated;
CREATE SINK rated_newest FROM rated WITH (connector = 'memory', key = 'k');
