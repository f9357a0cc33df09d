"""Compares a finished run of sql/transactions.sql with DuckDB over its backup: oracle.py LAKE SERVING.ndjson PRODUCED|- [--ledger FOLDER].

Prints one line and exits 0 when all agree; otherwise prints what differs and exits 1. The training table must be, as a
multiset, the view's SQL over the backup (floats at 1e-9 relative); the backup must hold each produced record once,
with its partition and offset; every user's serving row must be that user's newest training row. With --ledger, late rows are those that came more
than 5 s behind their own partition; the folder's Parquet files must name exactly these, and the view goes without them.
"""
import json
import math
import sys

import duckdb
from deltalake import DeltaTable

lake, serving, produced = sys.argv[1:4]
ledger = sys.argv[5] if sys.argv[4:5] == ["--ledger"] else None
options = {"AWS_ALLOW_HTTP": "true"} if lake.startswith("s3://") else None
db = duckdb.connect()
db.execute("SET TimeZone = 'UTC'")


def load(name, table):
    delta = DeltaTable(f"{lake}/{table}", storage_options=options)
    if lake.startswith("s3://"):
        from deltalake import QueryBuilder
        rows = QueryBuilder().register("t", delta).execute("SELECT * FROM t").read_all()
        db.register(f"{name}_arrow", rows)
        db.execute(f"CREATE TABLE {name} AS SELECT * FROM {name}_arrow")
    else:
        files = delta.file_uris()
        db.execute(f"CREATE TABLE {name} AS SELECT * FROM read_parquet(?, hive_partitioning = false)", [files])


load("backup", "transactions_backup")
load("training", "user_features")
faults = []


def check(what, sql):
    rows = db.execute(sql).fetchall()
    if rows:
        faults.append(f"{what}: {len(rows)}, for example {rows[:3]}")


if produced != "-":
    db.execute("CREATE TABLE produced AS SELECT * FROM read_json(?, format = 'newline_delimited', columns = "
               "{p: 'INTEGER', o: 'BIGINT', user_id: 'BIGINT', t: 'BIGINT', amount: 'DOUBLE'})", [produced])
    check("records of the topic that the backup lacks or has otherwise",
          "SELECT * FROM (SELECT p, o, user_id, t, amount FROM produced EXCEPT ALL "
          "SELECT _partition, _offset, user_id, transaction_timestamp_millis, amount FROM backup)")
    check("rows of the backup that were not produced, or are there twice",
          "SELECT * FROM (SELECT _partition, _offset, user_id, transaction_timestamp_millis, amount FROM backup EXCEPT ALL "
          "SELECT p, o, user_id, t, amount FROM produced)")
db.execute("CREATE VIEW accepted AS SELECT * FROM backup")
if ledger:
    db.execute("CREATE TABLE ledger AS SELECT partition AS p, \"offset\" AS o FROM read_parquet(?)", [f"{ledger}/*.parquet"])
    db.execute("""CREATE TABLE late AS SELECT _partition AS p, _offset AS o FROM (SELECT *, max(event_time) OVER (
        PARTITION BY _partition ORDER BY _offset ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS seen FROM backup)
        WHERE event_time < seen - INTERVAL '5 seconds'""")
    check("late rows that the ledger lacks", "SELECT * FROM (FROM late EXCEPT ALL FROM ledger)")
    check("rows of the ledger that are not late, or are there twice", "SELECT * FROM (FROM ledger EXCEPT ALL FROM late)")
    db.execute("CREATE OR REPLACE VIEW accepted AS SELECT * FROM backup WHERE (_partition, _offset) NOT IN (FROM late)")
view = """
    SELECT user_id, epoch_us(event_time) AS t,
           count(*) OVER (PARTITION BY user_id ORDER BY event_time) AS n,
           sum(amount) OVER (PARTITION BY user_id ORDER BY event_time
               RANGE BETWEEN INTERVAL '7 days' PRECEDING AND CURRENT ROW) AS a,
           hour(event_time) AS h, isodow(event_time) AS d FROM accepted"""
expected = sorted(db.execute(view).fetchall())
found = sorted(db.execute("SELECT user_id, epoch_us(event_time), total_transactions_count, amount_7d, hour_of_day, "
                          "day_of_week FROM training").fetchall())
if len(expected) != len(found):
    faults.append(f"training has {len(found)} rows, the view over the backup {len(expected)}")
wrong = [(e, f) for e, f in zip(expected, found)
         if e[:3] + e[4:] != f[:3] + f[4:] or not math.isclose(e[3], f[3], rel_tol=1e-9, abs_tol=1e-9)]
if wrong:
    faults.append(f"{len(wrong)} training rows differ, for example {wrong[:3]}")
newest = {}
for row in expected:
    if row[0] not in newest or row[1] >= newest[row[0]][1]:
        newest[row[0]] = row
served = {}
for line in open(serving):
    row = json.loads(line)
    served[row["user_id"]] = row
if set(served) != set(newest):
    faults.append(f"{len(served)} users are served, {len(newest)} have rows")
for user, row in newest.items():
    s = served.get(user)
    if s and not (s["total_transactions_count"] == row[2] and math.isclose(s["amount_7d"], row[3], rel_tol=1e-9, abs_tol=1e-9)
                  and s["hour_of_day"] == row[4] and s["day_of_week"] == row[5]):
        faults.append(f"user {user} is served {s}, the newest training row is {row}")
        break
if faults:
    print("\n".join(faults))
    sys.exit(1)
print(f"{len(found)} training rows and {len(served)} served users agree with DuckDB")
