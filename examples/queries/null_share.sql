-- The share of rows in which a column is NULL.
SELECT count(*) AS n,
       avg(CASE WHEN amount IS NULL THEN 1.0 ELSE 0.0 END)         AS amount_null,
       avg(CASE WHEN currency IS NULL THEN 1.0 ELSE 0.0 END)       AS currency_null,
       avg(CASE WHEN counterpart_id IS NULL THEN 1.0 ELSE 0.0 END) AS counterpart_id_null
FROM transactions_backup;
