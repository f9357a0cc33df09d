#!/usr/bin/env python3
"""Backfill of a 1-hour RANGE view against DuckDB, same SQL, same Parquet files: benches/backfill.py [--rows 4000000] [--runs 3]

    cargo build --release
    $MILLSTREAM_TEST_PYTHON benches/backfill.py        # a Python with duckdb and deltalake

The backup is Parquet, a file per day, declared with CREATE TABLE. Both engines write Parquet: Millstream backfills a Delta
table, --step at a time; DuckDB COPYs the answer over all files at once. DuckDB's answer is compared with the table first, then
the runs alternate; times are of whole processes (DuckDB: of the statement). A Parquet backup has no versions, so no interval
counts as finished: each run does all the work.
"""
import argparse
import os
import pathlib
import resource
import shutil
import subprocess
import tempfile
import time
from statistics import median

import duckdb
from deltalake import DeltaTable, QueryBuilder

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
SQL = """
CREATE SOURCE transactions (user_id BIGINT NOT NULL, event_time TIMESTAMP NOT NULL, amount DOUBLE,
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds')
WITH (connector = 'files', path = 'FOLDER/none/*.json', format = 'json', history = 'backup');
CREATE TABLE backup WITH (connector = 'parquet', location = 'FOLDER/backup/');
CREATE SINK features AS SELECT user_id, event_time, count(*) OVER w AS n, sum(amount) OVER w AS s FROM transactions
    WINDOW w AS (PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL '1 hour' PRECEDING AND CURRENT ROW)
WITH (connector = 'delta', location = 'FOLDER/features', partition_by = 'day(event_time)');
"""
ANSWER = """SELECT user_id, event_time, count(*) OVER w AS n, sum(amount) OVER w AS s FROM read_parquet('FOLDER/backup/*.parquet')
    WINDOW w AS (PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL 1 HOUR PRECEDING AND CURRENT ROW)"""


def prepare(folder, rows, days, users):
    db = duckdb.connect()
    (folder / "backup").mkdir()
    (folder / "none").mkdir()
    (folder / "p.sql").write_text(SQL.replace("FOLDER", str(folder)))
    each = rows // days
    for day in range(days):
        # A step of time per row; Knuth's hash deals the users out.
        db.execute(f"""COPY (SELECT (i * 2654435761 % {users})::BIGINT AS user_id,
            TIMESTAMPTZ '2026-01-01 00:00:00Z' + to_microseconds(((i + {day * each}) * {86_400_000_000 * days // rows})::BIGINT) AS event_time,
            ((i * 7919 % 100000) / 100.0)::DOUBLE AS amount FROM range({each}) r(i))
            TO '{folder}/backup/{day:03}.parquet' (FORMAT parquet)""")


def backfill(folder, days, step, parallel):
    shutil.rmtree(folder / "features", ignore_errors=True)
    command = [TARGET / "release/millstream", "backfill", "features", folder / "p.sql", "--from", "2026-01-01",
               "--to", f"2026-01-{days + 1:02}", "--step", step, "--parallel", str(parallel), "--force"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - begun


def duck(folder):
    db = duckdb.connect()
    begun = time.monotonic()
    db.execute(f"COPY ({ANSWER.replace('FOLDER', str(folder))}) TO '{folder}/duck.parquet' (FORMAT parquet)")
    return time.monotonic() - begun


def compare(folder, rows):
    db = duckdb.connect()
    table = QueryBuilder().register("t", DeltaTable(folder / "features")).execute(
        "SELECT user_id, event_time, n, s FROM t").read_all()
    db.register("found", table)
    odd = db.execute(f"""SELECT count(*) FROM (SELECT user_id, event_time, n, round(s, 4) FROM found
        EXCEPT ALL SELECT user_id, event_time, n, round(s, 4) FROM ({ANSWER.replace('FOLDER', str(folder))}))""").fetchone()[0]
    count = db.execute("SELECT count(*) FROM found").fetchone()[0]
    assert (count, odd) == (rows, 0), f"{count} rows, {odd} are not DuckDB's"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 4_000_000), ("days", 10), ("users", 100_000), ("runs", 3), ("parallel", 2)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--step", default="1d")
    given = arguments.parse_args()
    rows = given.rows // given.days * given.days
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(folder, rows, given.days, given.users)
        backfill(folder, given.days, given.step, given.parallel)
        compare(folder, rows)
        ours, theirs = [], []
        for _ in range(given.runs):
            ours.append(backfill(folder, given.days, given.step, given.parallel))
            theirs.append(duck(folder))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    a, b = median(ours), median(theirs)
    print(f"{rows:,} rows, {given.days} days, step {given.step}, parallel {given.parallel}, median of {given.runs}")
    print(f"millstream {a:6.2f} s  {rows / a / 1e6:.2f} M rows/s  peak {peak:.0f} MiB  ({', '.join(f'{t:.2f}' for t in ours)})")
    print(f"duckdb     {b:6.2f} s  {rows / b / 1e6:.2f} M rows/s  ({', '.join(f'{t:.2f}' for t in theirs)})")
    print(f"ratio {a / b:.2f}")


if __name__ == "__main__":
    main()
