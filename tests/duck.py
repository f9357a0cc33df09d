"""Differences between two queries over Delta tables, found by DuckDB: duck.py LAKE NAME=FOLDER[,NAME=FOLDER…] SQL SQL

Prints the number of rows of the first query and how many rows are in only one of the two answers, as multisets.
"""
import sys

import duckdb
from deltalake import DeltaTable, QueryBuilder

lake, tables, first, second = sys.argv[1:]
options = {"AWS_ALLOW_HTTP": "true"} if lake.startswith("s3://") else None
db = duckdb.connect()
db.execute("SET TimeZone = 'UTC'")
for pair in tables.split(","):
    name, folder = pair.split("=")
    # Partition columns stand in the log only, so the table is read by its own library.
    delta = DeltaTable(f"{lake}/{folder}", storage_options=options)
    rows = QueryBuilder().register("t", delta).execute("SELECT * FROM t").read_all()
    db.register(f"{name}_arrow", rows)
    db.execute(f"CREATE TABLE {name} AS SELECT * FROM {name}_arrow")
rows = db.execute(f"SELECT count(*) FROM ({first})").fetchone()[0]
odd = db.execute(f"(SELECT 'only in the first', * FROM (({first}) EXCEPT ALL ({second}))) UNION ALL "
                 f"(SELECT 'only in the second', * FROM (({second}) EXCEPT ALL ({first})))").fetchall()
print(f"{rows} rows, {len(odd)} differ")
for row in odd[:5]:
    print(*row)
