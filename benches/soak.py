#!/usr/bin/env python3
"""A soak: sql/transactions.sql at a steady rate against the test services, and whether memory and files stay flat.

    docker/services.sh start; eval "$(docker/services.sh env)"
    python3 benches/soak.py --minutes 30 --rate 5000

The view's frame is 1 minute instead of 7 days, as rows of a frame are state; tables are compacted each minute and what that
leaves behind is deleted after 2 minutes. A line each half minute: resident memory, open files, files of the state folder and
of both tables, files that the newest versions of the tables name, keys in Redis, rows stored. At the end the rows are
checked: the backup has each record once, and `millstream status` finds the accounts in order. Exit code 1 when something
of the last third is more than a quarter above the middle third, or a check fails.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=int, default=5000, help="events per second")
    parser.add_argument("--checkpoint", default="1s")
    parser.add_argument("--every", type=float, default=30, help="seconds between two lines")
    parser.add_argument("--binary", default=None, help="default: the release build")
    return parser.parse_args()


def binary(given):
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    return given or str(pathlib.Path(target) / "release" / "millstream")


def files(folder):
    return sum(len(found) for _, _, found in os.walk(folder))


def live(table):
    """Files that the log names, by replaying its adds and removes (a checkpoint only repeats them)."""
    named = set()
    for entry in sorted((table / "_delta_log").glob("*.json")):
        for line in entry.read_text().splitlines():
            action = json.loads(line)
            if "add" in action:
                named.add(action["add"]["path"])
            if "remove" in action:
                named.discard(action["remove"]["path"])
    return len(named)


def resident(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    return 0


def main():
    options = arguments()
    program = binary(options.binary)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="millstream-soak-"))
    name = f"soak-{int(time.time())}"
    sql = (ROOT / "sql/transactions.sql").read_text()
    sql = sql.replace("topic             = 'transactions'", f"topic = '{name}'").replace("'user:'", f"'{name}:'")
    sql = sql.replace("INTERVAL '7 days'", "INTERVAL '1 minute'")
    upkeep = "compact_interval = '1 minute', vacuum_retention = '2 minutes', connector = 'delta'"
    sql = sql.replace("connector = 'delta'", upkeep)
    (folder / "soak.sql").write_text(sql)
    producer = (ROOT / "sql/transactions_producer.sql").read_text().replace("= 'transactions'", f"= '{name}'")
    producer = producer.replace("'1 minute'", "'1 second'")
    (folder / "producer.sql").write_text(producer)
    env = dict(os.environ, LAKE=str(folder / "lake"), RATE=str(options.rate))
    env["KAFKA_BROKERS"], env["REDIS_URL"] = env["MILLSTREAM_TEST_KAFKA"], env["MILLSTREAM_TEST_REDIS"]
    state = str(folder / "state")

    def start(sql_file, *more):
        log = open(folder / f"{sql_file}.log", "w")
        run = [program, "run", "--plain", *more, str(folder / sql_file)]
        return subprocess.Popen(run, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=log)

    feeder = start("producer.sql", "--state", str(folder / "feeder"), "--name", f"{name}-feeder")
    time.sleep(3)
    pipeline = start("soak.sql", "--state", state, "--name", name, "--checkpoint", options.checkpoint)
    header = ["seconds", "MiB", "open files", "state files", "table files", "live files", "manifests"]
    print("  ".join(f"{word:>11}" for word in header), flush=True)
    begun, seen = time.time(), []
    while time.time() - begun < options.minutes * 60:
        time.sleep(options.every)
        if pipeline.poll() is not None or feeder.poll() is not None:
            sys.exit(f"a process has ended, see {folder}")
        tables = [folder / "lake" / table for table in ("transactions_backup", "user_features")]
        try:
            row = [
                int(time.time() - begun),
                resident(pipeline.pid),
                len(os.listdir(f"/proc/{pipeline.pid}/fd")),
                files(folder / "state" / "state"),
                sum(files(table) - files(table / "_delta_log") for table in tables),
                sum(live(table) for table in tables),
                files(folder / "state" / "manifest"),
            ]
        except FileNotFoundError:
            continue  # deleted while it was looked at
        seen.append(row)
        print("  ".join(f"{value:>11}" for value in row), flush=True)
    feeder.send_signal(signal.SIGTERM)
    feeder.wait()
    time.sleep(5)
    pipeline.send_signal(signal.SIGTERM)
    code = pipeline.wait()
    sane = check(program, env, folder, state, name) and code == 0
    third = len(seen) // 3
    grown = []
    for column, word in list(enumerate(header))[1:]:
        middle = statistics.median(row[column] for row in seen[third : 2 * third])
        last = statistics.median(row[column] for row in seen[2 * third :])
        print(f"{word}: {middle:g} in the middle third, {last:g} in the last")
        if last > middle * 1.25 + 5:
            grown.append(word)
    print(f"grown: {', '.join(grown) if grown else 'nothing'}; folder {folder}")
    sys.exit(1 if grown or not sane else 0)


def check(program, env, folder, state, name):
    def asked(*words):
        done = subprocess.run([program, *words], env=env, cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    rows = "SELECT count(*) AS n, count(DISTINCT _partition * 1000000000000 + _offset) AS records FROM transactions_backup"
    _, answer, trouble = asked("query", "--format", "csv", "-c", rows, "soak.sql")
    lines = answer.split()
    stored, records = lines[1].split(",") if len(lines) > 1 else ("0", "-1")
    print(f"backup: {stored} rows of {records} records {trouble}")
    code, _, reasons = asked("status", "--state", state, "--name", name, "soak.sql")
    print(f"status: exit code {code} {reasons.strip()}")
    return stored == records and int(stored) > 0 and code == 0


if __name__ == "__main__":
    main()
