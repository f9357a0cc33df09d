#!/usr/bin/env python3
"""The whole of sql/transactions.sql against a real broker and a real Redis: benches/transactions.py [--rows N] …

    docker/services.sh start; eval "$(docker/services.sh env)"
    cargo build --release
    python3 benches/transactions.py

Throughput: the pipeline reads a filled topic to its end and closes, for two sizes in turn; the difference of the two
removes the start. CPU seconds are those of the engine's process (user + system); broker and Redis stand beside it.
Each answer is compared with DuckDB (tests/oracle.py, same SQL over the backup) before its time counts.
Freshness: a paced producer, event time = the moment of the event; age of a row when Redis has acknowledged it.
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
KAFKA, REDIS = os.environ.get("MILLSTREAM_TEST_KAFKA"), os.environ.get("MILLSTREAM_TEST_REDIS")
PYTHON = os.environ.get("MILLSTREAM_TEST_PYTHON", sys.executable)
TICK = os.sysconf("SC_CLK_TCK")


def cpu(pattern):
    """CPU seconds of the server whose command line has the pattern."""
    total = 0.0
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if pattern in b" ".join(words) and b"python" not in words[0]:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                total += (int(fields[11]) + int(fields[12])) / TICK
        except OSError:
            pass
    return total


def servers():
    return {"broker": cpu(b"kafka.Kafka"), "redis": cpu(b"redis-server")}


def pipeline(folder, topic):
    sql = (ROOT / "sql/transactions.sql").read_text()
    changed = re.sub(r"topic +=( +)'transactions'", f"topic = '{topic}'", sql).replace("'user:'", f"'{topic}:'")
    assert changed.count(topic) == 2
    path = folder / "transactions.sql"
    path.write_text(changed)
    return path


def environment(folder):
    return {**os.environ, "KAFKA_BROKERS": KAFKA, "REDIS_URL": REDIS, "LAKE": str(folder / "lake")}


def produce(folder, topic, **variables):
    values = {"TOPIC": topic, "RATE": 0, "DISORDER": 4000, "USERS": 100_000, "LOOKBACK": "1 day", **variables}
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    command = [ARGS.binary, "run", ROOT / "benches/transactions_producer.sql", "--until-end", "--close", "--name", f"p-{topic}",
               "--state", folder / "producer-state", "--parallelism", "1", *sets]
    return subprocess.Popen(command, env=environment(folder), stdout=subprocess.DEVNULL, stderr=(folder / "producer.log").open("w"))


def finished(process, folder, what):
    if process.wait() != 0:
        sys.exit(f"{what} failed:\n" + (folder / f"{what}.log").read_text())


def measure(folder, sql, topic, state, *more):
    """Runs the pipeline to the end; wall and CPU seconds, peak memory, what the servers used beside it."""
    before, begun = servers(), time.monotonic()
    command = [ARGS.binary, "run", sql, "--name", topic, "--state", state, "--until-end", "--close", "--parallelism",
               str(ARGS.parallelism), *more]
    log = (folder / "run.log").open("w")
    process = subprocess.Popen(command, env=environment(folder), stdout=subprocess.DEVNULL, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - begun
    if process.returncode != 0:
        sys.exit("the pipeline failed:\n" + (folder / "run.log").read_text())
    after = servers()
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak MiB": usage.ru_maxrss // 1024,
            **{name: after[name] - before[name] for name in after}}


def check(folder, sql, rows):
    """DuckDB's answer over the backup; what was produced is the backup's own row count here."""
    query = [ARGS.binary, "query", sql, "--format", "ndjson", "-c", "SELECT * FROM user_features_serving"]
    with (folder / "serving.ndjson").open("w") as out:
        subprocess.run(query, env=environment(folder), stdout=out, check=True)
    counted = subprocess.run([ARGS.binary, "query", sql, "--format", "csv", "-c", "SELECT count(*) FROM transactions_backup"],
                             env=environment(folder), capture_output=True, text=True, check=True).stdout.split()[-1]
    assert int(counted) == rows, f"the backup has {counted} rows, {rows} were produced"
    done = subprocess.run([PYTHON, ROOT / "tests/oracle.py", folder / "lake", folder / "serving.ndjson", "-"],
                          capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    return done.stdout.strip()


def throughput():
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        sizes = (ARGS.rows // 4, ARGS.rows)
        for rows in sizes:
            topic = f"bench-{os.getpid()}-{rows}"
            finished(produce(folder, topic, ROWS=rows), folder, "producer")
            shutil.rmtree(folder / "producer-state")
            for turn in range(ARGS.turns):
                sql = pipeline(folder, topic)
                # A fresh life each turn: another name, so that Redis' fence and offsets are its own.
                found = measure(folder, sql, f"{topic}-{turn}", folder / "state")
                found["answer"] = check(folder, sql, rows)
                results.setdefault(rows, []).append(found)
                print(json.dumps({"rows": rows, "turn": turn, **found}), flush=True)
                shutil.rmtree(folder / "state")
                shutil.rmtree(folder / "lake")
    return sizes, results


def median(values):
    return sorted(values)[len(values) // 2]


def freshness(rate, seconds):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        topic = f"fresh-{os.getpid()}-{rate}"
        finished(produce(folder, topic, ROWS=1), folder, "producer")
        shutil.rmtree(folder / "producer-state")
        sql = pipeline(folder, topic)
        command = [ARGS.binary, "run", sql, "--name", topic, "--state", folder / "state", "--parallelism", str(ARGS.parallelism)]
        process = subprocess.Popen(command, env=environment(folder), stdout=subprocess.DEVNULL, stderr=(folder / "run.log").open("w"))
        time.sleep(3)
        finished(produce(folder, topic, ROWS=rate * seconds, RATE=rate, DISORDER=0, LOOKBACK="0 seconds"), folder, "producer")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        finished(process, folder, "run")
        lines = (folder / "run.log").read_text().splitlines()
        # One line per second; the first ones hold the start of the producer, the last one the sum.
        fresh = [line for line in lines if "fresh:" in line]
        shown = fresh[3:-1]
        number = lambda line, name: float(re.search(rf"{name} ([0-9.]+) ms", line).group(1))
        for name in ("p50", "p99", "max"):
            values = sorted(number(line, name) for line in shown)
            print(f"  {name}: median second {median(values):.1f} ms, worst second {values[-1]:.1f} ms ({len(values)} seconds)")
        print(f"  all rows, the start of the producer too: {fresh[-1].split('store ')[-1].split('  max')[0]}")


def main():
    if not (KAFKA and REDIS):
        sys.exit('start the services first: docker/services.sh start; eval "$(docker/services.sh env)"')
    print(subprocess.run([ARGS.binary, "--version"], capture_output=True, text=True).stdout.strip(),
          f"· {os.cpu_count()} cores · parallelism {ARGS.parallelism} · seed 7 · {ARGS.rows} rows, {ARGS.turns} turns")
    if ARGS.rows:
        (small, large), results = throughput()
        for key in ("wall", "cpu"):
            spent = median([r[key] for r in results[large]]) - median([r[key] for r in results[small]])
            print(f"{(large - small) / spent:,.0f} events per {key} second ({spent:.2f} s for {large - small:,} events)")
    for rate in ARGS.rate:
        print(f"freshness at {rate} events/s, {ARGS.seconds} s:")
        freshness(rate, ARGS.seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000, help="the larger size; the smaller is a quarter of it; 0: none")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--parallelism", type=int, default=2)
    parser.add_argument("--rate", type=int, nargs="*", default=[20_000], help="events per second for freshness")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--binary", default=str(TARGET / "release/millstream"))
    ARGS = parser.parse_args()
    main()
