"""Rows per second of a bootstrap from history: count per user, from a backup in Delta, as a stream.

    docker/services.sh start; eval "$(docker/services.sh env)"
    cargo build --release
    python3 benches/bootstrap.py --rows 4000000 --turns 3

A producer pipeline fills a topic, and a job of its own makes the backup of all of it. Each turn builds the view anew (a state and a
table of its own) from the backup alone: its log names the topic's end as the next offset. The time is that of the whole
process; a run over the first tenth of the rows is taken off, so that start and stop do not count. The totals must be DuckDB's over the backup before a
time counts. Nothing else may run on the machine.
"""
import argparse
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
KAFKA = os.environ.get("MILLSTREAM_TEST_KAFKA", "127.0.0.1:19092")
PYTHON = os.environ.get("MILLSTREAM_TEST_PYTHON", sys.executable)

SOURCE = """
CREATE SOURCE transactions (
    user_id BIGINT NOT NULL, transaction_timestamp_millis BIGINT NOT NULL, amount DOUBLE, currency VARCHAR, counterpart_id BIGINT,
    event_time TIMESTAMP AS (to_timestamp_millis(transaction_timestamp_millis)),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = '${KAFKA_BROKERS}', topic = '${TOPIC}', format = 'json', history = 'backup');
CREATE SINK backup FROM transactions WITH (connector = 'delta', location = '${LAKE}/backup', partition_by = 'day(event_time)');
CREATE VIEW totals AS SELECT user_id, count(*) AS n FROM transactions GROUP BY user_id;
CREATE SINK totals_now FROM totals WITH (connector = 'delta', location = '${LAKE}/${OUT:-totals}', mode = 'upsert', key = 'user_id');
"""
DUCK = """
import sys, duckdb
from deltalake import DeltaTable
db = duckdb.connect()
for name, table in (("backup", sys.argv[1]), ("totals", sys.argv[2])):
    db.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet({DeltaTable(table).file_uris()}, hive_partitioning = false)")
wrong = db.execute("SELECT count(*) FROM (SELECT user_id, count(*) AS n FROM backup GROUP BY 1 EXCEPT SELECT user_id, n FROM totals)").fetchone()[0]
rows = db.execute("SELECT sum(n) FROM totals").fetchone()[0]
print(rows)
sys.exit(wrong)
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--parallelism", type=int, default=2)
    parser.add_argument("--binary", default=str(pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release/millstream"))
    return parser.parse_args()


class Bench:
    def __init__(self, folder, rows):
        self.folder, self.rows, self.topic = folder, rows, f"bootstrap-{rows}-{int(time.time())}"
        self.sql = folder / f"{rows}.sql"
        self.sql.write_text(SOURCE)
        self.lake = folder / f"lake-{rows}"

    def run(self, *more, sql=None, **variables):
        env = {**os.environ, "KAFKA_BROKERS": KAFKA, "TOPIC": self.topic, "LAKE": str(self.lake), **variables}
        begun, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([ARGS.binary, "run", sql or self.sql, "--plain", "--until-end", *more], env=env, cwd=self.folder,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(done.stderr)
        spent = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        return time.monotonic() - begun, spent

    def prepare(self):
        """Topic and backup."""
        self.run("--name", f"producer-{self.rows}", "--close", sql=ROOT / "benches/transactions_producer.sql", ROWS=str(self.rows),
                 RATE="0", DISORDER="4000", USERS="100000", LOOKBACK="1 day")
        self.run("--name", f"b{self.rows}", "--sink", "backup", "--parallelism", str(ARGS.parallelism), "--checkpoint", "1s")

    def turn(self, number):
        out = f"totals-{number}"
        wall, cpu = self.run("--sink", "totals_now", "--name", f"b{self.rows}-{number}", "--parallelism", str(ARGS.parallelism), OUT=out)
        checked = subprocess.run([PYTHON, "-c", DUCK, self.lake / "backup", self.lake / out], capture_output=True, text=True)
        if checked.returncode or int(checked.stdout) != self.rows:
            sys.exit(f"the totals are not those of DuckDB: {checked.stdout}{checked.stderr}")
        return wall, cpu


def main():
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bootstrap-"))
    try:
        sizes = [Bench(folder, ARGS.rows // 10), Bench(folder, ARGS.rows)]
        for size in sizes:
            size.prepare()
        for number in range(ARGS.turns):
            (w0, c0), (w1, c1) = (size.turn(number) for size in sizes)
            rows = sizes[1].rows - sizes[0].rows
            print(f"{sizes[1].rows:,} rows: {w1:.1f} s wall, {c1:.1f} CPU s; without start and stop "
                  f"{rows / (w1 - w0):,.0f} rows/s (floor 500,000), {rows / (c1 - c0):,.0f} rows per CPU second", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    ARGS = arguments()
    main()
