"""Point-in-time joins against DuckDB: asof.py make FOLDER SEED, or asof.py compare FOLDER NAME ANSWER.ndjson

`make` writes labels.parquet and features.parquet: random times on a coarse grid (many are equal), keys and times that are
NULL, keys on one side only. `compare` prints how many rows there are and how many of them differ.
"""
import json
import random
import sys

import duckdb

ROWS = 20_000


def make(folder, seed):
    dice = random.Random(int(seed))
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'")
    some = lambda value, share=0.02: None if dice.random() < share else value
    base = 1_700_000_000_000_000
    time = lambda: some(base + dice.randrange(2_000) * 500_000)
    db.execute("CREATE TABLE labels_raw (id BIGINT, k BIGINT, word VARCHAR, ts BIGINT)")
    db.execute("CREATE TABLE features_raw (n BIGINT, k BIGINT, word VARCHAR, seen BIGINT, known BIGINT, v DOUBLE)")
    words = ["a", "b", ""]
    db.executemany("INSERT INTO labels_raw VALUES (?, ?, ?, ?)", [
        (i, some(dice.randrange(0, 60)), some(dice.choice(words)), time()) for i in range(ROWS // 10)])
    rows = []
    for n in range(ROWS // 5):
        at = time()
        known = None if at is None else some(at + dice.choice([0, 0, 1_000_000, 300_000_000]))
        rows.append((n, some(dice.randrange(20, 80)), some(dice.choice(words)), at, known, some(dice.random())))
    db.executemany("INSERT INTO features_raw VALUES (?, ?, ?, ?, ?, ?)", rows)
    stamp = lambda column: f"make_timestamp({column})::TIMESTAMPTZ AS {column}"
    db.execute(f"COPY (SELECT id, k, word, {stamp('ts')} FROM labels_raw) TO '{folder}/labels.parquet'")
    db.execute(f"COPY (SELECT n, k, word, {stamp('seen')}, {stamp('known')}, v FROM features_raw) TO '{folder}/features.parquet'")


# ASOF JOIN says nothing of ties, so of each key and time the row is taken that all columns order last. An index join that
# also knows `known` there is not: the oracle is the definition itself.
NEWEST = """SELECT * FROM features WHERE k IS NOT NULL AND seen IS NOT NULL
            QUALIFY row_number() OVER (PARTITION BY k, seen ORDER BY n DESC) = 1"""
DEFINITION = """SELECT l.id, f.n, f.v, f.seen FROM labels l LEFT JOIN features f
                ON l.k = f.k AND l.word = f.word AND f.seen <= l.ts AND f.known <= l.ts
                QUALIFY row_number() OVER (PARTITION BY l.id ORDER BY f.seen DESC NULLS LAST, f.known DESC, f.n DESC) = 1"""
ORACLES = {
    "inner": f"SELECT l.id, f.n, f.v, f.seen FROM labels l ASOF JOIN ({NEWEST}) f ON l.k = f.k AND f.seen <= l.ts",
    "left": f"SELECT l.id, f.n, f.v, f.seen FROM labels l ASOF LEFT JOIN ({NEWEST}) f ON l.k = f.k AND f.seen <= l.ts",
    "known": DEFINITION,
}


def compare(folder, name, answer):
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'")
    for table in ["labels", "features"]:
        db.execute(f"CREATE TABLE {table} AS SELECT * FROM '{folder}/{table}.parquet'")
    expected = db.execute(f"SELECT id, n, v, epoch_us(seen) FROM ({ORACLES[name]}) ORDER BY id").fetchall()
    stamp = lambda text: None if text is None else db.execute("SELECT epoch_us(?::TIMESTAMPTZ)", [text]).fetchone()[0]
    found = []
    for line in open(answer):
        row = json.loads(line)
        found.append((row["id"], row.get("n"), row.get("v"), stamp(row.get("seen"))))
    found.sort()
    odd = [pair for pair in zip(expected, found) if pair[0] != pair[1]]
    differ = len(odd) + abs(len(expected) - len(found))
    matched = sum(row[1] is not None for row in found)
    print(f"{len(found)} rows, {differ} differ, {matched} with a feature")
    for pair in odd[:5]:
        print(*pair)


if sys.argv[1] == "make":
    make(*sys.argv[2:])
else:
    compare(*sys.argv[2:])
