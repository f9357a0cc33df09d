#!/usr/bin/env python3
"""Millstream against Flink SQL, the same four queries from the same Kafka topic: benches/peers.py [--rows N] …

    docker/services.sh start; eval "$(docker/services.sh env)"
    cargo build --release
    python3 benches/peers.py --hot --plot peers.png

Queries: count per user; count and sum per event OVER 1 hour RANGE; TUMBLE of 1 minute; join with a CSV file of 4 rows. Topics
of 4 partitions hold JSON transactions of about 130 bytes, --step ms of event time apart and up to 4 s out of order (lateness
is 5 s: none is late); the smaller one passes an hour, so that between the sizes the frame of OVER keeps its size.
Answers first: each engine's result over the smaller topic (Delta; Flink's print) must be DuckDB's over the rows that Kafka's
own console consumer read, sums to a millionth. Then times, into a blackhole, engines in turn: the difference of the medians of
two sizes over the difference of the rows, so that start and stop drop out. CPU seconds are user + system of Millstream's
process, and of Flink's JVM with its compiler and collector; peak memory is VmHWM at the larger size.
Flink: PyFlink in a virtual environment in the cache folder, made on first use (Python 3.9 to 3.12, Java 17, Maven); streaming
mode, object reuse, state on the heap, no checkpoints (Millstream writes one every 10 s). Its look-up is a temporal join, as
its regular join would keep every transaction as state.
"""
import argparse
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from statistics import median

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = pathlib.Path(os.environ.get("MILLSTREAM_CACHE")
                     or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "millstream")
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
KAFKA = os.environ.get("MILLSTREAM_TEST_KAFKA")
PYTHON = os.environ.get("MILLSTREAM_TEST_PYTHON", sys.executable)
FLINK, CONNECTOR = "2.3.0", "5.0.0-2.2"  # the newest connector; it names the Flink that it was built with
JAVA = os.path.join(os.environ["JAVA_HOME"], "bin/java") if "JAVA_HOME" in os.environ else "java"
TICK = os.sysconf("SC_CLK_TCK")
ENGINES = ("millstream", "flink")

OVER = ("SELECT user_id, transaction_timestamp_millis AS t, count(*) OVER w AS n, sum(amount) OVER w AS s FROM transactions "
        "WINDOW w AS (PARTITION BY user_id ORDER BY {time} RANGE BETWEEN {hour} PRECEDING AND CURRENT ROW)")
COUNT = "SELECT user_id, count(*) AS n FROM transactions GROUP BY user_id"
TUMBLE = "SELECT user_id, {start} AS t, count(*) AS n, sum(amount) AS s FROM {rows} GROUP BY {keys}"
LOOKUP = ("SELECT r.user_id, r.transaction_timestamp_millis AS t, r.amount * c.rate_to_eur AS s FROM transactions r "
          "LEFT JOIN currencies {as_of} c ON r.currency = c.currency")
WINDOWED = {"start": "window_start", "keys": "user_id, window_start, window_end"}
QUERIES = {
    "count": {"millstream": COUNT, "flink": COUNT, "duckdb": COUNT},
    "over": {"millstream": OVER.format(time="event_time", hour="INTERVAL '1 hour'"),
             "flink": OVER.format(time="event_time", hour="INTERVAL '1' HOUR"),
             "duckdb": OVER.format(time="transaction_timestamp_millis", hour="3600000")},
    "tumble": {"millstream": TUMBLE.format(rows="TUMBLE(transactions, event_time, INTERVAL '1 minute')", **WINDOWED),
               "flink": TUMBLE.format(rows="TUMBLE(TABLE transactions, DESCRIPTOR(event_time), INTERVAL '1' MINUTE)", **WINDOWED),
               "duckdb": TUMBLE.format(start="epoch_ms(transaction_timestamp_millis // 60000 * 60000)", rows="transactions",
                                       keys="1, 2")},
    "lookup": {"millstream": LOOKUP.format(as_of=""), "duckdb": LOOKUP.format(as_of=""),
               "flink": LOOKUP.format(as_of="FOR SYSTEM_TIME AS OF r.event_time")},
}
TYPES = {
    "count": {"user_id": "BIGINT", "n": "BIGINT"},
    "over": {"user_id": "BIGINT", "t": "BIGINT", "n": "BIGINT", "s": "DOUBLE"},
    "tumble": {"user_id": "BIGINT", "t": "TIMESTAMP(3)", "n": "BIGINT", "s": "DOUBLE"},
    "lookup": {"user_id": "BIGINT", "t": "BIGINT", "s": "DOUBLE"},
}
HOT = "over, a hot user"
RATES = {"EUR": 1.0, "USD": 0.92, "GBP": 1.17, "CHF": 1.04}  # JPY has none: a left join keeps its rows


def kafka_tool(tool, *arguments, **options):
    """One of Kafka's command line tools, from the jars that docker/services.sh copied."""
    jars = sorted(CACHE.glob("kafka-[0-9]*/kafka-tools-[0-9]*.jar"))
    if not jars:
        sys.exit("Kafka's jars are missing: docker/services.sh install kafka")
    command = [JAVA, "-XX:TieredStopAtLevel=1", "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-cp", f"{jars[-1].parent}/*",
               f"org.apache.kafka.tools.{tool}", "--bootstrap-server", KAFKA, *arguments]
    subprocess.run(command, check=True, **options)


def produce(folder, topic, rows, hot):
    """Fills a topic. Event time rises by --step per row (the generator has 1 ms; the rest here), less up to 4 s of disorder."""
    users = "CASE WHEN seq % 2 = 0 THEN 0 ELSE 100000 END" if hot else "100000"
    values = {"TOPIC": topic, "ROWS": rows, "RATE": 0, "USERS": users, "DISORDER": f"{1 - ARGS.step} * seq + 4000",
              "LOOKBACK": f"{rows * ARGS.step // 1000 + 60} seconds"}
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    command = [ARGS.binary, "run", ROOT / "benches/transactions_producer.sql", "--until-end", "--close", "--name", topic,
               "--state", folder / "producer-state", "--parallelism", "1", *sets]
    done = subprocess.run(command, env={**os.environ, "KAFKA_BROKERS": KAFKA}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit("the producer failed:\n" + done.stderr.decode())
    shutil.rmtree(folder / "producer-state")


def memory(pid):
    """Peak memory of a process in MiB; 0 when it has ended."""
    found = re.search(r"VmHWM:\s*(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def supervise(command, what, folder, out, **options):
    """Runs a command to its end in a process group of its own, of which nothing is left; wall and CPU seconds, peak memory."""
    log, begun, peak, ended = folder / f"{what}.log", time.monotonic(), 0, 0
    process = subprocess.Popen(command, stdout=out, stderr=log.open("w"), start_new_session=True, **options)
    try:
        while not ended:
            time.sleep(0.02)
            peak = max(peak, memory(process.pid))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if time.monotonic() - begun > ARGS.timeout:
                sys.exit(f"{what} has not finished after {ARGS.timeout} s")
        wall = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        sys.exit(f"{what} failed:\n" + log.read_text()[-4000:])
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak MiB": peak}


def millstream(folder, topic, query, check):
    sink = f"connector = 'delta', location = '{folder}/answer'" if check else "connector = 'blackhole'"
    upsert = ", mode = 'upsert', key = 'user_id'" if check and query == "count" else ""
    table = f"CREATE TABLE currencies WITH (connector = 'csv', location = '{folder}/currencies.csv');" if query == "lookup" else ""
    path = folder / "query.sql"
    path.write_text(f"""
        CREATE SOURCE transactions (
            user_id BIGINT NOT NULL, transaction_timestamp_millis BIGINT NOT NULL, amount DOUBLE, currency VARCHAR,
            counterpart_id BIGINT, event_time TIMESTAMP AS (to_timestamp_millis(transaction_timestamp_millis)),
            WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
        ) WITH (connector = 'kafka', bootstrap_servers = '{KAFKA}', topic = '{topic}', format = 'json', scan_startup = 'earliest');
        {table}
        CREATE SINK answer AS {QUERIES[query]["millstream"]} WITH ({sink}{upsert});""")
    command = [ARGS.binary, "run", path, "--until-end", "--close", "--parallelism", str(ARGS.parallelism),
               "--state", folder / "state", "--name", topic]
    found = supervise(command, "millstream", folder, subprocess.DEVNULL)
    shutil.rmtree(folder / "state")
    return found


def flink(folder, topic, query, check):
    home = flink_home()
    spec = {"role": "flink", "query": query, "topic": topic, "kafka": KAFKA, "connector": "print" if check else "blackhole",
            "currencies": f"{folder}/rates.csv", "parallelism": ARGS.parallelism, "set": ARGS.flink_set,
            "jar": str(home / f"flink-sql-connector-kafka-{CONNECTOR}.jar"), "result": f"{folder}/flink.json"}
    environment = {**os.environ, "TMPDIR": str(folder), "JVM_ARGS": f"-Xmx{ARGS.heap} -Djava.io.tmpdir={folder}"}
    environment.pop("FLINK_HOME", None)  # another Flink than the one of the environment
    with (folder / "answer.txt").open("w") as out:
        wall = supervise([home / "bin/python", __file__, json.dumps(spec)], "flink", folder, out, env=environment)["wall"]
    return {"wall": wall, **json.loads((folder / "flink.json").read_text())}


def flink_home():
    """The virtual environment with PyFlink and the Kafka connector's jar."""
    home = CACHE / f"flink-{FLINK}-{CONNECTOR}"
    if (home / "complete").exists():
        return home
    suits = ["-c", "import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))"]
    python = next((name for name in (sys.executable, "python3.12", "python3.11", "python3.10", "python3.9")
                   if shutil.which(name) and subprocess.run([name, *suits], stderr=subprocess.DEVNULL).returncode == 0), None)
    if not python:
        sys.exit("PyFlink needs a Python from 3.9 to 3.12")
    shutil.rmtree(home, ignore_errors=True)
    print(f"installing PyFlink {FLINK} …", file=sys.stderr)
    for command in ([python, "-m", "venv", home],
                    [home / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", f"apache-flink=={FLINK}"],
                    ["mvn", "-B", "-q", "-ntp", "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy",
                     f"-Dartifact=org.apache.flink:flink-sql-connector-kafka:{CONNECTOR}", f"-DoutputDirectory={home}"]):
        subprocess.run(command, check=True, stdout=sys.stderr)
    (home / "complete").touch()
    return home


def flink_job(spec):
    """Runs in PyFlink's Python: one query to the end, then what the JVM has used."""
    from pyflink.java_gateway import get_gateway
    from pyflink.table import EnvironmentSettings, TableEnvironment
    env = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
    for key, value in {
        "parallelism.default": str(spec["parallelism"]), "taskmanager.numberOfTaskSlots": "4",
        "pipeline.object-reuse": "true", "restart-strategy.type": "none", "table.local-time-zone": "UTC",
        "pipeline.jars": f"file://{spec['jar']}", **dict(pair.split("=", 1) for pair in spec["set"]),
    }.items():
        env.get_config().set(key, value)
    env.execute_sql(f"""
        CREATE TABLE transactions (
            user_id BIGINT, transaction_timestamp_millis BIGINT, amount DOUBLE, currency STRING, counterpart_id BIGINT,
            event_time AS TO_TIMESTAMP_LTZ(transaction_timestamp_millis, 3),
            WATERMARK FOR event_time AS event_time - INTERVAL '5' SECOND
        ) WITH ('connector' = 'kafka', 'properties.bootstrap.servers' = '{spec["kafka"]}', 'topic' = '{spec["topic"]}',
                'format' = 'json', 'scan.startup.mode' = 'earliest-offset', 'scan.bounded.mode' = 'latest-offset')""")
    # One version of each rate, valid since 1970: what a temporal join wants.
    env.execute_sql(f"""
        CREATE TABLE currencies (
            currency STRING, rate_to_eur DOUBLE, valid_from AS TO_TIMESTAMP_LTZ(0, 3),
            WATERMARK FOR valid_from AS valid_from, PRIMARY KEY (currency) NOT ENFORCED
        ) WITH ('connector' = 'filesystem', 'path' = 'file://{spec["currencies"]}', 'format' = 'csv')""")
    columns = [f"{name} {type}" for name, type in TYPES[spec["query"]].items()]
    if spec["query"] == "count":
        columns.append("PRIMARY KEY (user_id) NOT ENFORCED")
    env.execute_sql(f"CREATE TABLE answer ({', '.join(columns)}) WITH ('connector' = '{spec['connector']}')")
    env.execute_sql(f"INSERT INTO answer {QUERIES[spec['query']]['flink']}").wait()
    pid = get_gateway().jvm.java.lang.ProcessHandle.current().pid()
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    used = {"cpu": (int(fields[11]) + int(fields[12])) / TICK, "peak MiB": memory(pid)}
    pathlib.Path(spec["result"]).write_text(json.dumps(used))


def compare(spec):
    """Runs in a Python that has duckdb and deltalake: exit code 0 when the answer is DuckDB's."""
    import duckdb
    from deltalake import DeltaTable
    db, types, folder = duckdb.connect(), TYPES[spec["query"]], spec["folder"]
    db.execute("SET TimeZone = 'UTC'")
    db.execute("CREATE TABLE transactions AS SELECT * FROM read_json(?, format = 'newline_delimited', columns = {"
               "user_id: 'BIGINT', transaction_timestamp_millis: 'BIGINT', amount: 'DOUBLE', currency: 'VARCHAR'})", [spec["rows"]])
    db.execute("CREATE TABLE currencies AS SELECT * FROM read_csv(?)", [f"{folder}/currencies.csv"])
    names, who = list(types), f"{spec['name']}, {spec['engine']}"
    if spec["engine"] == "millstream":
        files = DeltaTable(f"{folder}/answer").file_uris()
        db.execute(f"CREATE TABLE found AS SELECT {', '.join(names)} FROM read_parquet(?, hive_partitioning = false)", [files])
    else:
        # Lines such as `2> +I[7, 1]`; a change of an updating query is taken back by the line of its -U.
        db.execute("CREATE TABLE lines AS SELECT regexp_extract(line, '([+-])[IUD]\\[(.*)\\]', ['op', 'v']) AS l "
                   "FROM read_csv(?, columns = {line: 'VARCHAR'}, header = false, delim = '\x01', quote = '', escape = '')",
                   [f"{folder}/answer.txt"])
        fields = {name: f"nullif(v[{i + 1}], 'null')" for i, name in enumerate(names)}
        typed = [f"strptime({text}, ['%Y-%m-%dT%H:%M:%S', '%Y-%m-%dT%H:%M']) AS {name}" if "TIME" in types[name]
                 else f"CAST({text} AS {types[name]}) AS {name}" for name, text in fields.items()]
        db.execute(f"CREATE TABLE found AS SELECT {', '.join(typed)} FROM (SELECT string_split(l.v, ', ') AS v, unnest(range(CAST("
                   "sum(CASE l.op WHEN '+' THEN 1 ELSE -1 END) AS BIGINT))) FROM lines WHERE l.op <> '' GROUP BY l.v)")
    db.execute(f"CREATE TABLE expected AS {QUERIES[spec['query']]['duckdb']}")
    rows, produced = (db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("expected", "transactions"))
    found = db.execute("SELECT count(*) FROM found").fetchone()[0]
    if produced != spec["produced"] or rows != found:
        sys.exit(f"{who}: {found} rows, DuckDB has {rows}; {produced} rows in the topic, {spec['produced']} were produced")
    differ = [f"abs(e.{name} - f.{name}) > 1e-6 + 1e-9 * abs(e.{name}) OR (e.{name} IS NULL) <> (f.{name} IS NULL)"
              if type == "DOUBLE" else f"e.{name} IS DISTINCT FROM f.{name}" for name, type in types.items()]
    numbered = f"SELECT *, row_number() OVER (ORDER BY {', '.join(names)}) AS number FROM"
    wrong = db.execute(f"SELECT e, f FROM ({numbered} expected) e JOIN ({numbered} found) f USING (number) "
                       f"WHERE {' OR '.join(differ)}").fetchall()
    if wrong:
        sys.exit(f"{who}: {len(wrong)} of {rows} rows differ, for example (DuckDB's first): {wrong[0]}")
    print(f"{who}: {rows} rows agree with DuckDB", flush=True)


def report(jobs, sizes, results):
    """Per job: rows per CPU second and per second of wall, by difference; the table, and the ratios in it."""
    small, large = sizes
    rates = {}
    for name, engine, _, _ in jobs:
        less, more = ({key: median(run[key] for run in results[name, engine, rows]) for key in ("cpu", "wall", "peak MiB")}
                      for rows in sizes)
        rates[name, engine] = rate = {"peak MiB": more["peak MiB"]}
        for key in ("cpu", "wall"):
            rate[key] = (large - small) / (more[key] - less[key]) if more[key] > less[key] else float("nan")
    print("\n| query | engine | rows per CPU second | rows per second | peak memory | Millstream / Flink: CPU, wall, memory |\n"
          "|---|---|---|---|---|---|")
    for (name, engine), rate in rates.items():
        peer = rates.get((name, "flink")) if engine == "millstream" else None
        ratio = ", ".join(f"{rate[key] / peer[key]:.2f} ×" for key in ("cpu", "wall", "peak MiB")) if peer else ""
        print(f"| {name} | {engine} | {rate['cpu']:,.0f} | {rate['wall']:,.0f} | {rate['peak MiB']:,.0f} MiB | {ratio} |")
    if (HOT, "millstream") in rates:
        even, hot = rates["over", "millstream"], rates[HOT, "millstream"]
        print(f"\nWith a hot user a row costs {even['cpu'] / hot['cpu']:.2f} × the CPU time, "
              f"{even['wall'] / hot['wall']:.2f} × the wall time.")
    return rates


def plot(rates, path):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no plot: matplotlib is not installed", file=sys.stderr)
    names = list(dict.fromkeys(name for name, _ in rates))
    figure = Figure(figsize=(8, 1.4 + 0.8 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, (engine, colour) in enumerate(zip(ENGINES, ("#2a6fb0", "#e0803a"))):
        shown = [(i, rates[name, engine]["cpu"]) for i, name in enumerate(names) if (name, engine) in rates]
        bars = axes.barh([i + 0.4 * place - 0.2 for i, _ in shown], [rate for _, rate in shown], 0.38, color=colour, label=engine)
        axes.bar_label(bars, [f" {rate:,.0f}" for _, rate in shown])
    axes.set(xscale="log", xlabel="rows per CPU second", yticks=range(len(names)), yticklabels=names)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main():
    if not KAFKA:
        sys.exit('start the services first: docker/services.sh start; eval "$(docker/services.sh env)"')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if "flink" in ARGS.engines:
        flink_home()
    sizes, run = (ARGS.small, ARGS.rows), {"millstream": millstream, "flink": flink}
    jobs = [(query, engine, query, False) for query in ARGS.queries for engine in ENGINES if engine in ARGS.engines]
    if ARGS.hot:
        jobs.insert(jobs.index(("over", "millstream", "over", False)) + 1, (HOT, "millstream", "over", True))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    version = subprocess.run([ARGS.binary, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"{version} · Flink {FLINK}, Kafka connector {CONNECTOR} · {os.cpu_count()} cores, {total:.0f} GiB · parallelism "
          f"{ARGS.parallelism} · heap {ARGS.heap} · seed 7 · {ARGS.small} and {ARGS.rows} rows, {ARGS.turns} turns\n"
          + shlex.join(["benches/peers.py", *sys.argv[1:]]), flush=True)
    topics, results = {}, {}
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = pathlib.Path(name)
        lines = [f"{currency},{rate}" for currency, rate in RATES.items()]
        (folder / "rates.csv").write_text("\n".join(lines) + "\n")
        (folder / "currencies.csv").write_text("\n".join(["currency,rate_to_eur", *lines]) + "\n")
        try:
            for hot in sorted({job[3] for job in jobs}):
                for rows in sizes:
                    topics[rows, hot] = f"peers-{os.getpid()}-{rows}{'-hot' if hot else ''}"
                    produce(folder, topics[rows, hot], rows, hot)
                read = folder / f"rows-{hot}.ndjson"
                with read.open("w") as out:
                    kafka_tool("consumer.ConsoleConsumer", "--topic", topics[ARGS.small, hot], "--from-beginning", "--max-messages",
                               str(ARGS.small), "--timeout-ms", "30000", stdout=out, stderr=subprocess.DEVNULL)
                for job in (job for job in jobs if job[3] == hot):
                    run[job[1]](folder, topics[ARGS.small, hot], job[2], True)
                    spec = {"role": "compare", "engine": job[1], "query": job[2], "folder": str(folder), "rows": str(read)}
                    if subprocess.run([PYTHON, __file__, json.dumps({**spec, "name": job[0], "produced": ARGS.small})]).returncode:
                        sys.exit(1)
                    shutil.rmtree(folder / "answer", ignore_errors=True)
            for turn in range(ARGS.turns):
                for name, engine, query, hot in jobs:
                    for rows in sizes:
                        found = run[engine](folder, topics[rows, hot], query, False)
                        results.setdefault((name, engine, rows), []).append(found)
                        print(json.dumps({"query": name, "engine": engine, "rows": rows, "turn": turn, **found}), flush=True)
        finally:
            for topic in topics.values():
                kafka_tool("TopicCommand", "--delete", "--if-exists", "--topic", topic)
    if ARGS.turns:
        rates = report(jobs, sizes, results)
        if ARGS.plot:
            plot(rates, ARGS.plot)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # this script, started by itself with another Python
        given = json.loads(sys.argv[1])
        sys.exit({"flink": flink_job, "compare": compare}[given["role"]](given))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000, help="the larger size")
    parser.add_argument("--small", type=int, default=1_000_000, help="the smaller size, where answers are compared")
    parser.add_argument("--turns", type=int, default=3, help="0: only the answers")
    parser.add_argument("--step", type=int, default=4, help="ms of event time between rows; --small rows should pass an hour")
    parser.add_argument("--queries", nargs="+", choices=QUERIES, default=list(QUERIES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--hot", action="store_true", help="also Millstream's over where one user has half of the rows")
    parser.add_argument("--parallelism", type=int, default=2)
    parser.add_argument("--heap", default="6g", help="largest heap of Flink's JVM")
    parser.add_argument("--flink-set", nargs="*", default=[], metavar="KEY=VALUE", help="more of Flink's configuration")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one run")
    parser.add_argument("--binary", default=str(TARGET / "release/millstream"))
    parser.add_argument("--plot", metavar="FILE", help="writes a PNG, needs matplotlib")
    ARGS = parser.parse_args()
    if not ARGS.small < ARGS.rows < 86_000_000 // ARGS.step:
        parser.error("--small must be below --rows, and all rows within a day: the topic keeps no more")
    if ARGS.hot and not ("over" in ARGS.queries and "millstream" in ARGS.engines):
        parser.error("--hot is compared with the query over of millstream: have both run")
    main()
