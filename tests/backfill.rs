//! Backfill: tables of views equal DuckDB's answer over the backup, whatever was wrong in them before, and whatever is
//! killed, repeated or running at the same time.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millstream::stream::crash::{Of, points};

use crate::case::{Case, Dice, send, services};

pub const DAYS: u64 = 5;
/// 2026-01-01, ms.
pub const FIRST: u64 = 1_767_225_600_000;
pub const DAY: u64 = 86_400_000;
const SIGABRT: i32 = 6;

/// Views with a bounded and an unbounded frame, a window over a window, groups by time, and rows as they come; partitioned
/// and not.
const SQL: &str = "
CREATE SOURCE events (
    k BIGINT NOT NULL, t BIGINT NOT NULL, v BIGINT,
    ts TIMESTAMP AS (to_timestamp_millis(t)), WATERMARK FOR ts AS ts - INTERVAL '5 seconds'
) WITH (connector = 'files', path = 'FOLDER/input/*.ndjson', format = 'json', history = 'backup');
CREATE SINK backup FROM events WITH (connector = 'delta', location = '${LAKE}/backup', partition_by = 'day(ts)');

CREATE VIEW hours AS
SELECT k, ts, count(*) OVER w AS n, sum(v) OVER w AS v30
FROM events WINDOW w AS (PARTITION BY k ORDER BY ts RANGE BETWEEN INTERVAL '30 hours' PRECEDING AND CURRENT ROW);
CREATE SINK hours_table FROM hours
WITH (connector = 'delta', location = '${LAKE}/hours', partition_by = 'day(ts)');

CREATE VIEW stacked AS
SELECT k, ts, n, max(v30) OVER w AS most
FROM hours WINDOW w AS (PARTITION BY k ORDER BY ts RANGE BETWEEN INTERVAL '6 hours' PRECEDING AND CURRENT ROW);
CREATE SINK stacked_table FROM stacked WITH (connector = 'delta', location = '${LAKE}/stacked');

CREATE VIEW total AS SELECT k, ts, sum(v) OVER w AS v_all FROM events WINDOW w AS (PARTITION BY k ORDER BY ts);
CREATE SINK total_table FROM total
WITH (connector = 'delta', location = '${LAKE}/total', partition_by = 'hour(ts)');

CREATE SINK groups_table AS
SELECT k, window_start, count(*) AS n, sum(v) AS v FROM TUMBLE(events, ts, INTERVAL '3 hours')
GROUP BY k, window_start, window_end
WITH (connector = 'delta', location = '${LAKE}/groups');

CREATE SINK plain_table AS SELECT k, ts, v * 2 AS v2, _offset AS o FROM events WHERE v > 20
WITH (connector = 'delta', location = '${LAKE}/plain', partition_by = 'k');

CREATE SINK never AS SELECT k, sum(v) AS v FROM events GROUP BY k
WITH (connector = 'delta', location = '${LAKE}/never', mode = 'upsert', key = 'k');
CREATE SINK timeless AS SELECT k, v FROM events WITH (connector = 'delta', location = '${LAKE}/timeless');
CREATE SINK served FROM hours WITH (connector = 'redis', url = '${REDIS_URL}', key = 'k', prefix = 'TOPIC:');
CREATE SINK files FROM hours WITH (connector = 'ndjson', location = '${LAKE}/files');
";

/// Sink, its folder, its columns, and DuckDB's answer over `backup`.
const ANSWERS: [(&str, &str, &str, &str); 5] = [
    ("hours_table", "hours", "k, ts, n, v30", HOURS),
    (
        "stacked_table",
        "stacked",
        "k, ts, n, most",
        "SELECT k, ts, n, max(v30) OVER (PARTITION BY k ORDER BY ts RANGE BETWEEN INTERVAL 6 HOURS PRECEDING AND CURRENT ROW)
         AS most FROM (HOURS)",
    ),
    ("total_table", "total", "k, ts, v_all", "SELECT k, ts, sum(v) OVER (PARTITION BY k ORDER BY ts) AS v_all FROM backup"),
    (
        "groups_table",
        "groups",
        "k, ts, n, v",
        "SELECT k, time_bucket(INTERVAL 3 HOURS, ts) AS ts, count(*) AS n, sum(v) AS v FROM backup GROUP BY 1, 2",
    ),
    ("plain_table", "plain", "k, ts, v2, o", "SELECT k, ts, v * 2 AS v2, _offset AS o FROM backup WHERE v > 20"),
];
const HOURS: &str = "SELECT k, ts, count(*) OVER w AS n, sum(v) OVER w AS v30 FROM backup
    WINDOW w AS (PARTITION BY k ORDER BY ts RANGE BETWEEN INTERVAL 30 HOURS PRECEDING AND CURRENT ROW)";

pub struct Lake {
    pub case: Case,
    dice: Dice,
    files: u64,
}

impl Lake {
    /// The pipeline of this file, with its first input.
    pub async fn new(name: &str) -> Option<Self> {
        let case = Case::new(services(name)?, name, None).await;
        let folder = case.folder.path().to_string_lossy().into_owned();
        let sql = SQL.replace("FOLDER", &folder).replace("TOPIC", &case.topic);
        fs::write(case.path("transactions.sql"), sql).unwrap();
        fs::create_dir(case.path("input")).unwrap();
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        println!("{name}: seed {seed}");
        let mut lake = Self { case, dice: Dice(seed), files: 0 };
        lake.input(0, DAYS * 24, 4_000);
        Some(lake)
    }

    /// Rows of some hours, nearly in order; one of thirty is late, by up to two days.
    pub fn input(&mut self, from: u64, to: u64, rows: u64) {
        let (start, hours) = (FIRST + from * DAY / 24, to - from);
        let mut text = String::new();
        for row in 0..rows {
            let mut t = start + row * hours * (DAY / 24) / rows;
            t -= match self.dice.roll(30) {
                0 => self.dice.roll(2 * DAY).min(t - FIRST),
                _ => self.dice.roll(4_000).min(t - FIRST),
            };
            let (k, v) = (self.dice.roll(20), self.dice.roll(100));
            text.push_str(&format!("{{\"k\":{k},\"t\":{t},\"v\":{v}}}\n"));
        }
        fs::write(self.case.path(&format!("input/{:04}.ndjson", self.files)), text).unwrap();
        self.files += 1;
    }

    /// The stream, to the end of the input. Its tables lack what late rows change.
    pub fn stream(&self) {
        let out = self.case.run(&["--until-end", "--checkpoint", "300ms"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    fn arguments<'a>(&'a self, sink: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["backfill", sink, "--name", &self.case.name, "--format", "csv"];
        let given = |option: &str| more.contains(&option);
        if !given("--from") {
            all.extend(["--from", "2026-01-01"]);
        }
        if !given("--to") {
            all.extend(["--to", "2026-01-20"]);
        }
        all.extend(more);
        all
    }

    pub fn backfill(&self, sink: &str, more: &[&str]) -> Backfilled {
        let out = self.case.command(&self.arguments(sink, more)).output().unwrap();
        let done = Backfilled::of(&out);
        assert!(out.status.success(), "{sink}: {}", done.log);
        done
    }

    fn start(&self, sink: &str, more: &[&str], variable: Option<(&str, &str)>) -> Child {
        let mut command = self.case.command(&self.arguments(sink, more));
        if let Some((name, value)) = variable {
            command.env(name, value);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// DuckDB's word on every sink given; rows that the stream may still add are left out.
    fn check(&self, sinks: &[&str]) {
        for (sink, folder, columns, answer) in ANSWERS.iter().filter(|(sink, ..)| sinks.contains(sink)) {
            let answer = answer.replace("HOURS)", &format!("{HOURS})"));
            let until = match *sink {
                "groups_table" => {
                    "time_bucket(INTERVAL 3 HOURS, (SELECT max(ts) FROM backup) - INTERVAL 5 SECONDS)"
                }
                "plain_table" => "TIMESTAMPTZ '2100-01-01'",
                _ => "(SELECT max(ts) FROM backup) - INTERVAL 5 SECONDS",
            };
            let found = match *sink {
                "groups_table" => "SELECT k, window_start AS ts, n, v FROM t".to_owned(),
                _ => format!("SELECT {columns} FROM t"),
            };
            let expected = format!("SELECT {columns} FROM ({answer}) WHERE ts < {until}");
            self.case.same(&format!("backup=backup,t={folder}"), &found, &expected, 500);
        }
    }

    /// Takes and adds rows of a table as another program would.
    pub fn spoil(&self, folder: &str, python: &str) {
        let script = format!(
            "import sys\nfrom deltalake import DeltaTable, QueryBuilder, write_deltalake\n\
             table = DeltaTable(sys.argv[1])\n{python}\n"
        );
        let out = std::process::Command::new(&self.case.services.python)
            .args(["-c", &script, &format!("{}/{folder}", self.case.lake)])
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

/// What a backfill printed.
pub struct Backfilled {
    log: String,
    /// from, to, rows before, rows after, status
    rows: Vec<(String, String, String, String, String)>,
}

impl Backfilled {
    fn of(out: &Output) -> Self {
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let row = |line: &str| {
            let cell: Vec<&str> = line.split(',').collect();
            let cell = |at: usize| cell[at].to_owned();
            (cell(0), cell(1), cell(2), cell(3), cell(6))
        };
        Self {
            log: String::from_utf8_lossy(&out.stderr).into_owned(),
            rows: text.lines().skip(1).map(row).collect(),
        }
    }

    pub fn count(&self, status: &str) -> usize {
        self.rows.iter().filter(|row| row.4 == status).count()
    }

    fn after(&self) -> u64 {
        self.rows.iter().map(|row| row.3.parse::<u64>().unwrap_or(0)).sum()
    }
}

const SINKS: [&str; 5] = ["hours_table", "stacked_table", "total_table", "groups_table", "plain_table"];

/// Tables of a stream that left late rows out become the batch answer; the second time nothing is done; new rows have
/// those intervals computed anew that see them.
#[tokio::test(flavor = "multi_thread")]
async fn backfill_is_the_batch_answer() {
    let Some(mut lake) = Lake::new("backfill_is_the_batch_answer").await else { return };
    lake.stream();
    let before = lake.case.query("SELECT sum(v30) FROM hours_table");
    for (sink, look_back) in [
        ("hours_table", "30 hours before each interval"),
        ("stacked_table", "36 hours before each interval"),
        ("total_table", "every row from the start (unbounded frame)"),
        ("groups_table", "3 hours before each interval"),
        ("plain_table", "no row before an interval"),
    ] {
        let done = lake.backfill(sink, &["--parallel", "2"]);
        assert_eq!(done.count("written"), done.rows.len(), "{sink}");
        // Five days, or four and what of the last windows is final.
        assert!((5..=6).contains(&done.rows.len()), "{sink}: {:?}", done.rows);
        assert!(done.log.contains("ends at 2026-01-05T"), "{sink} is clipped: {}", done.log);
        assert!(done.log.contains(look_back), "{sink}: {}", done.log);
    }
    lake.check(&SINKS);
    assert_ne!(before, lake.case.query("SELECT sum(v30) FROM hours_table"), "late rows changed nothing");
    for sink in SINKS {
        let again = lake.backfill(sink, &[]);
        assert_eq!(again.count("unchanged"), again.rows.len(), "{sink}: {:?}", again.rows);
    }
    let forced = lake.backfill("hours_table", &["--force", "--step", "7 hours"]);
    assert_eq!(forced.count("written"), forced.rows.len());
    assert_eq!(
        forced.rows.iter().map(|row| &row.2).collect::<Vec<_>>(),
        forced.rows.iter().map(|row| &row.3).collect::<Vec<_>>(),
        "the same rows"
    );
    lake.check(&["hours_table"]);

    // New rows, the late ones among them at most two days back.
    lake.input(DAYS * 24, DAYS * 24 + 12, 600);
    lake.stream();
    for sink in SINKS {
        let done = lake.backfill(sink, &[]);
        assert!(
            done.count("unchanged") >= if sink == "total_table" { 2 } else { 1 },
            "{sink}: {:?}",
            done.rows
        );
        assert!(done.count("written") >= 2, "{sink}: {:?}", done.rows);
    }
    lake.check(&SINKS);
}

/// What others did to an interval is repaired; what they did outside stays.
#[tokio::test(flavor = "multi_thread")]
async fn backfill_repairs_an_interval() {
    let Some(lake) = Lake::new("backfill_repairs_an_interval").await else { return };
    lake.stream();
    for (sink, folder) in [("hours_table", "hours"), ("stacked_table", "stacked"), ("plain_table", "plain")] {
        lake.backfill(sink, &[]);
        lake.spoil(folder, "table.delete(\"ts >= '2026-01-02T05:00:00Z' AND ts < '2026-01-02T11:00:00Z'\")");
        lake.spoil(folder, "table.update(updates={\"k\": \"k + 1\"}, predicate=\"ts >= '2026-01-02T20:00:00Z' AND ts < '2026-01-03T00:00:00Z'\")");
        lake.spoil(
            folder,
            "rows = QueryBuilder().register('t', table).execute(\"SELECT * FROM t WHERE ts >= '2026-01-02T12:00:00Z' AND \
             ts < '2026-01-02T15:00:00Z'\").read_all()\nwrite_deltalake(table, rows, mode='append')",
        );
        let done = lake.backfill(sink, &["--force", "--from", "2026-01-02", "--to", "2026-01-03T00:00:00Z"]);
        assert_eq!(done.rows.len(), 1);
        assert_ne!(done.rows[0].2, done.rows[0].3, "{sink}: the spoilt table has other rows");
    }
    lake.check(&["hours_table", "stacked_table", "plain_table"]);
}

/// Kills at each step and at some moments; run again, the table is that of an undisturbed run.
#[tokio::test(flavor = "multi_thread")]
async fn backfill_survives_kills() {
    let Some(mut lake) = Lake::new("backfill_survives_kills").await else { return };
    lake.stream();
    for sink in ["hours_table", "stacked_table", "plain_table"] {
        let second = |point: &str| format!("{point}:2");
        let own = || points(Of::Backfill).map(str::to_owned);
        let steps = own().chain([second("delta.file.after")]).chain(own().map(|point| second(&point)));
        for at in steps {
            let child = lake.start(sink, &["--force"], Some(("MILLSTREAM_CRASH_AT", at.as_str())));
            let out = child.wait_with_output().unwrap();
            assert_eq!(
                out.status.signal(),
                Some(SIGABRT),
                "{sink} {at}: {}",
                String::from_utf8_lossy(&out.stderr)
            );
        }
    }
    // Without --force what is finished stays.
    lake.input(DAYS * 24, DAYS * 24 + 24, 1_000);
    lake.stream();
    let child = lake.start("total_table", &[], Some(("MILLSTREAM_CRASH_AT", "backfill.after:3")));
    assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(SIGABRT));
    let rest = lake.backfill("total_table", &[]);
    assert_eq!(rest.count("unchanged"), 3, "{:?}", rest.rows);
    for _ in 0..6 {
        let wait = lake.dice.roll(1_500);
        let mut child =
            lake.start("stacked_table", &["--force", "--step", "6 hours", "--parallel", "3"], None);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        child.kill().unwrap();
        child.wait().unwrap();
    }
    for sink in SINKS {
        lake.backfill(sink, &[]);
    }
    lake.check(&SINKS);
}

/// Two backfills of one sink: both end well, and the table is right.
#[tokio::test(flavor = "multi_thread")]
async fn two_backfills_of_one_sink() {
    let Some(lake) = Lake::new("two_backfills_of_one_sink").await else { return };
    lake.stream();
    for (sink, one, other) in [
        ("hours_table", &["--parallel", "2"][..], &["--parallel", "2"][..]),
        ("stacked_table", &["--step", "6 hours"], &["--step", "8 hours", "--parallel", "2"]),
        ("plain_table", &["--force"], &["--step", "12 hours"]),
    ] {
        let both = [lake.start(sink, one, None), lake.start(sink, other, None)];
        for child in both {
            let out = child.wait_with_output().unwrap();
            let log = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{sink}: {log}");
            println!("{sink}: {log}");
        }
    }
    lake.check(&["hours_table", "stacked_table", "plain_table"]);
}

/// A table that no stream ever wrote; and what is refused, with the reason.
#[tokio::test(flavor = "multi_thread")]
async fn backfill_makes_a_table_and_refuses_what_it_cannot() {
    let Some(lake) = Lake::new("backfill_makes_a_table").await else { return };
    let out = lake.case.command(&lake.arguments("hours_table", &[])).output().unwrap();
    let log = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(3) && log.contains("there is no backup"), "{log}");

    let out = lake.case.run(&["--sink", "backup", "--until-end"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let planned = lake.backfill("hours_table", &["--dry-run"]);
    assert_eq!(planned.count("planned"), 5, "{:?}", planned.rows);
    assert!(planned.log.contains("looks back at 30 hours before each interval"), "{}", planned.log);
    let folders: Vec<String> = fs::read_dir(&lake.case.lake)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(folders, ["backup"], "a dry run writes nothing");

    for sink in SINKS {
        let done = lake.backfill(sink, &[]);
        assert!(done.log.contains("the backup is complete until there"), "{}", done.log);
        assert!(done.after() > 500, "{sink}");
    }
    // Clipped, so the plain rows end there too.
    lake.check(&["hours_table", "stacked_table", "total_table", "groups_table"]);
    let again = lake.backfill("total_table", &[]);
    assert_eq!(again.count("unchanged"), 5, "{:?}", again.rows);

    for (arguments, code, said) in [
        (vec!["never"], 2, "its rows change"),
        (vec!["timeless"], 2, "its rows have no time"),
        (vec!["served"], 2, "a redis sink cannot be backfilled"),
        (vec!["files"], 2, "a ndjson sink cannot be backfilled"),
        (vec!["backup"], 2, "the backup that a backfill would read"),
        (vec!["nothing"], 2, "there is no sink nothing"),
        (vec!["hours_table", "--from", "2026-02-01", "--to", "2026-02-02"], 2, "nothing from 2026-02-01"),
        (vec!["hours_table", "--from", "2026-01-02", "--to", "2026-01-02"], 2, "is not after --from"),
        (vec!["hours_table", "--to", "soon"], 2, "expected a day"),
        (vec!["hours_table", "--step", "1us"], 2, "step"),
    ] {
        let out = lake.case.command(&lake.arguments(arguments[0], &arguments[1..])).output().unwrap();
        let log = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            out.status.code() == Some(code) && log.contains(said),
            "{arguments:?}: {:?} {log}",
            out.status
        );
    }
    lake.check(&["hours_table"]);
}

/// A backup behind the sink is waited for; then windows end where it is complete, and rows that come late at any time are
/// refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_lags_behind() {
    let Some(mut lake) = Lake::new("a_backup_that_lags_behind").await else { return };
    let run = |lake: &Lake, sink: &str| {
        let state = format!("{}-{sink}", lake.case.state);
        let arguments = [
            "run",
            "--state",
            &state,
            "--name",
            &lake.case.name,
            "--sink",
            sink,
            "--until-end",
            "--checkpoint",
            "300ms",
        ];
        let out = lake.case.command(&arguments).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    run(&lake, "backup");
    lake.input(DAYS * 24, DAYS * 24 + 24, 800);
    run(&lake, "hours_table");
    run(&lake, "plain_table");
    let wait = ["--wait", "1 second"];
    let done = lake.backfill("hours_table", &wait);
    assert!(done.log.contains("waiting: the backup lacks rows"), "{}", done.log);
    assert!(
        done.log.contains("ends at 2026-01-05T") && done.log.contains("the backup is complete until there")
    );
    let out = lake.case.command(&lake.arguments("plain_table", &wait)).output().unwrap();
    let log = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.code() == Some(3) && log.contains("lacks rows that the sink plain_table has"),
        "{log}"
    );
    run(&lake, "backup");
    for sink in ["hours_table", "plain_table"] {
        let done = lake.backfill(sink, &[]);
        assert!(done.log.contains("ends at 2026-01-06T") && !done.log.contains("waiting"), "{}", done.log);
    }
    lake.check(&["hours_table", "plain_table"]);
}

/// No command reaches Redis during a backfill of a pipeline that serves from it.
#[tokio::test(flavor = "multi_thread")]
async fn backfill_never_touches_redis() {
    let Some(lake) = Lake::new("backfill_never_touches_redis").await else { return };
    lake.stream();
    let address = lake.case.services.redis.trim_start_matches("redis://").trim_end_matches('/').to_owned();
    let mut monitor = TcpStream::connect(&address).unwrap();
    monitor.write_all(b"MONITOR\r\n").unwrap();
    let mut lines = BufReader::new(monitor).lines();
    assert!(lines.next().unwrap().unwrap().contains("OK"));
    let mut connection =
        redis::Client::open(lake.case.services.redis.as_str()).unwrap().get_connection().unwrap();
    lake.backfill("hours_table", &["--parallel", "2"]);
    lake.backfill("plain_table", &["--force"]);
    let last = format!("{}-last", lake.case.topic);
    redis::cmd("GET").arg(&last).exec(&mut connection).unwrap();
    let mut seen = Vec::new();
    for line in lines {
        let line = line.unwrap();
        if line.contains(&last) {
            break;
        }
        seen.push(line);
    }
    // Others use the server too, with names of their own.
    let ours: Vec<&String> = seen.iter().filter(|line| line.contains(&lake.case.topic)).collect();
    assert!(ours.is_empty(), "{ours:?}");
}

/// The shipped pipeline runs while its training table is backfilled again and again.
#[tokio::test(flavor = "multi_thread")]
async fn backfill_beside_a_running_stream() {
    let Some(services) = services("backfill_beside_a_running_stream") else { return };
    let mut case = Case::new(services, "backfill_beside", None).await;
    let sql = fs::read_to_string(case.path("transactions.sql")).unwrap();
    let plain = "CREATE SINK plain AS SELECT user_id, event_time, amount, _partition AS p, _offset AS o FROM transactions
                 WITH (connector = 'delta', location = '${LAKE}/plain', compact_interval = '1 second');\n";
    let merged = "location = '${LAKE:-./lake}/user_features', compact_interval = '1 second',";
    let sql = sql.replace("location = '${LAKE:-./lake}/user_features',", merged);
    assert!(sql.contains("compact_interval"));
    fs::write(case.path("transactions.sql"), sql + plain).unwrap();
    case.produce(2_000).await;
    let mut stream = case.start(&["--checkpoint", "150ms"]);
    let (name, from) = (case.name.clone(), (case.start - 60_000) * 1_000);
    let mut written = 0;
    for round in 0..12u64 {
        case.produce(1_500).await;
        // Hours behind, for the rows without windows alone: windows leave late rows out.
        let sink = ["user_features_training", "plain"][round as usize % 2];
        let (from, to) = (shown(from), shown(from + 3_600_000_000));
        let step = ["20 seconds", "1d"][(round as usize / 2) % 2];
        let arguments = [
            "backfill", sink, "--name", &name, "--from", &from, "--to", &to, "--step", step, "--force",
            "--format", "csv",
        ];
        let out = case.command(&arguments).output().unwrap();
        let done = Backfilled::of(&out);
        // At the start nothing is final yet.
        let early = ["committed no final row", "there is no backup", "is complete"];
        let early = written == 0 && early.iter().any(|reason| done.log.contains(reason));
        assert!(out.status.success() || early, "{}", done.log);
        written += done.count("written");
    }
    assert!(written > 12, "{written} intervals");
    stream.kill().unwrap();
    stream.wait().unwrap();
    case.produce(1_000).await;
    case.finish("2");
    case.verify();
    let rows = "SELECT user_id, event_time, amount, _partition AS p, _offset AS o FROM backup";
    case.same("backup=transactions_backup,plain=plain", rows, "SELECT * FROM plain", 5_000);
}

/// Late rows of a view without windows: appended by the stream, replaced by the backfill, each there once.
#[tokio::test(flavor = "multi_thread")]
async fn late_rows_beside_a_running_stream() {
    let Some(services) = services("late_rows_beside_a_running_stream") else { return };
    let mut case = Case::new(services, "backfill_late", None).await;
    let sql = fs::read_to_string(case.path("transactions.sql")).unwrap();
    let first = sql.find("CREATE VIEW").unwrap();
    let plain = "CREATE SINK plain AS SELECT user_id, event_time, amount, _partition AS p, _offset AS o FROM transactions
                 WITH (connector = 'delta', location = '${LAKE}/plain', partition_by = 'minute(event_time)');\n";
    fs::write(case.path("transactions.sql"), sql[..first].to_owned() + plain).unwrap();
    let mut stream = case.start(&["--checkpoint", "100ms"]);
    let mut dice = Dice(17);
    let mut written = 0;
    for round in 0..12u64 {
        let records: Vec<(String, String)> = (0..800)
            .map(|_| {
                let behind = if dice.roll(3) == 0 { dice.roll(240_000) } else { dice.roll(2_000) };
                let millis = case.start + 240_000 + round * 1_000 - behind;
                let user = dice.roll(50);
                let json = format!(
                    r#"{{"user_id": {user}, "transaction_timestamp_millis": {millis}, "amount": {}}}"#,
                    dice.roll(100)
                );
                (user.to_string(), json)
            })
            .collect();
        let sent = send(
            &case.services.kafka,
            &case.topic,
            records.iter().map(|(k, v)| (Some(k.as_str()), Some(v.as_str()))),
        );
        let (from, to) = (shown((case.start - 60_000) * 1_000), shown((case.start + 3_600_000) * 1_000));
        let arguments = [
            "backfill",
            "plain",
            "--name",
            &case.name,
            "--from",
            &from,
            "--to",
            &to,
            "--step",
            "1 minute",
            "--force",
            "--parallel",
            "2",
            "--format",
            "csv",
        ];
        let mut command = case.command(&arguments);
        let backfill = tokio::task::spawn_blocking(move || command.output().unwrap());
        let (_, out) = tokio::join!(sent, backfill);
        let out = out.unwrap();
        let done = Backfilled::of(&out);
        assert!(out.status.success() || written == 0, "{}", done.log);
        written += done.count("written");
        case.produced += 800;
    }
    assert!(written > 20, "{written} intervals");
    stream.kill().unwrap();
    stream.wait().unwrap();
    case.finish("2");
    let rows = "SELECT user_id, event_time, amount, _partition AS p, _offset AS o FROM backup";
    case.same(
        "backup=transactions_backup,plain=plain",
        rows,
        "SELECT user_id, event_time, amount, p, o FROM plain",
        9_600,
    );
}

fn shown(micros: u64) -> String {
    let (seconds, rest) = (micros / 1_000_000, micros % 1_000_000);
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = millstream::stream::civil(days as i64);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{rest:06}Z",
        of_day / 3_600,
        of_day / 60 % 60,
        of_day % 60
    )
}
