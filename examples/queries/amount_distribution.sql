-- How amounts are distributed, in steps of 100 per currency.
SELECT currency, CAST(floor(amount / 100) AS BIGINT) * 100 AS from_amount, count(*) AS n
FROM transactions_backup
WHERE amount IS NOT NULL
GROUP BY currency, CAST(floor(amount / 100) AS BIGINT) * 100
ORDER BY currency NULLS LAST, from_amount;
