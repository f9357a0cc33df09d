"""The queries of examples/queries/: queries.py make LAKE | queries.py compare LAKE SQL_FILE ANSWER.ndjson

`make` writes a Delta table transactions_backup of three versions that has what the queries look for: records twice,
transactions sent again, gaps of offsets, late records, NULLs. `compare` asks DuckDB and prints `N rows, 0 differ`, or the
first difference.
"""
import datetime
import json
import math
import random
import re
import sys

import duckdb
from deltalake import DeltaTable, QueryBuilder, write_deltalake

UTC = datetime.timezone.utc
TYPES = ["BIGINT", "BIGINT", "DOUBLE", "VARCHAR", "BIGINT", "TIMESTAMPTZ", "VARCHAR", "INTEGER", "BIGINT", "TIMESTAMPTZ",
         "BLOB", "DATE"]


def make(lake):
    dice = random.Random(5)
    offsets = [0, 0, 0, 0]
    start = datetime.datetime(2026, 3, 1, 20, tzinfo=UTC)
    for version in range(3):
        rows = []
        for n in range(400):
            partition = dice.randrange(4)
            offsets[partition] += 1 if dice.random() < 0.97 else 3
            time = start + datetime.timedelta(seconds=(version * 400 + n) * 30, milliseconds=dice.randrange(1000))
            late = dice.choice([0, 1, 2, 40])
            rows.append({
                "user_id": min(int(dice.expovariate(0.1)), 60),
                "transaction_timestamp_millis": round(time.timestamp() * 1000),
                "amount": None if dice.random() < 0.1 else dice.randrange(100_000) / 4,
                "currency": dice.choice(["EUR", "USD", None]),
                "counterpart_id": None if dice.random() < 0.3 else dice.randrange(9),
                "event_time": time,
                "_topic": "transactions", "_partition": partition, "_offset": offsets[partition],
                "_timestamp": time + datetime.timedelta(seconds=late),
                "_key": None, "event_time_day": time.date(),
            })
            if dice.random() < 0.01:
                rows.append(dict(rows[-1]))
            if dice.random() < 0.02:
                offsets[partition] += 1
                rows.append(rows[-1] | {"_offset": offsets[partition]})
        # Some Pythons here have no pyarrow: DuckDB makes Arrow of rows.
        db = duckdb.connect()
        db.execute("SET TimeZone = 'UTC'")
        db.execute(f"CREATE TABLE made ({', '.join(map(' '.join, zip(rows[0], TYPES)))})")
        db.executemany(f"INSERT INTO made VALUES ({', '.join('?' * len(TYPES))})", [list(row.values()) for row in rows])
        write_deltalake(f"{lake}/transactions_backup", db.table("made"), mode="append", partition_by=["event_time_day"])


def plain(value):
    """As JSON has it, times as times."""
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value):
        return plain(datetime.datetime.fromisoformat(value))
    return value


def same(a, b):
    if isinstance(a, float) or isinstance(b, float):
        return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6)
    return a == b


def compare(lake, sql_file, answer):
    sql = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", open(sql_file).read()).strip().rstrip(";")
    table = DeltaTable(f"{lake}/transactions_backup")
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'")
    rows = QueryBuilder().register("t", table).execute("SELECT * FROM t").read_all()
    db.register("transactions_backup", rows)
    found = db.sql(sql)
    names = found.columns
    # A zoned time is handed out in UTC: without pytz there are no others.
    shown = [f'"{name}"' + ("::TIMESTAMP" if "TIME ZONE" in str(kind) else "") for name, kind in zip(names, found.types)]
    found = found.project(", ".join(shown))
    theirs = [[plain(value) for value in row] for row in found.fetchall()]
    ours = [[plain(row.get(name)) for name in names] for row in map(json.loads, open(answer))]
    odd = [(a, b) for a, b in zip(ours, theirs) if not all(map(same, a, b))]
    print(f"{len(theirs)} rows, {len(odd) + abs(len(ours) - len(theirs))} differ")
    for pair in odd[:3]:
        print(*pair, sep="\n")


make(sys.argv[2]) if sys.argv[1] == "make" else compare(*sys.argv[2:])
