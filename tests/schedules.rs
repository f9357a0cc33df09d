//! Schedules: what is due runs once, whatever is killed, asleep or running at the same time; DuckDB's word on the tables.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::backfill::{DAY, DAYS, FIRST};
use crate::case::{Case, Dice, services};

const SIGABRT: i32 = 6;

/// A stream whose tables lack late rows. Each of the schedules fires five times before [`NOW`].
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
CREATE TABLE days (n BIGINT, k BIGINT, day TIMESTAMP, until TIMESTAMP, note VARCHAR)
WITH (connector = 'delta', location = '${LAKE}/days');
";
const NIGHTLY: &str = "
CREATE SCHEDULE nightly CRON '0 2 * * *' AS BACKFILL hours_table FOR LAST INTERVAL '1 day'
WITH (start = '2026-01-02');
";
const DAILY: &str = "
CREATE SCHEDULE daily CRON '30 2 * * *' WITH (start = '2026-01-02')
AS INSERT INTO days (k, n, until, day)
SELECT k, count(*), $interval_end, $interval_start FROM events
WHERE ts >= $interval_start AND ts < $interval_end GROUP BY k;
";
const NOW: &str = "2026-01-06T04:00:00Z";

struct Lake {
    case: Case,
}

impl Lake {
    /// Its stream has run to the end of the input.
    async fn new(name: &str, s3: bool) -> Option<Self> {
        let lake = Self::plain(name, s3, &format!("{SQL}{NIGHTLY}{DAILY}")).await?;
        fs::create_dir(lake.case.path("input")).unwrap();
        let seed =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
        println!("{name}: seed {seed}");
        let mut dice = Dice(seed);
        let mut text = String::new();
        let rows = 3_000;
        for row in 0..rows {
            let mut t = FIRST + row * DAYS * DAY / rows;
            t -= match dice.roll(30) {
                0 => dice.roll(2 * DAY).min(t - FIRST),
                _ => dice.roll(4_000).min(t - FIRST),
            };
            text.push_str(&format!("{{\"k\":{},\"t\":{t},\"v\":{}}}\n", dice.roll(20), dice.roll(100)));
        }
        fs::write(lake.case.path("input/0.ndjson"), text).unwrap();
        let out = lake.case.run(&["--until-end", "--checkpoint", "300ms"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Some(lake)
    }

    async fn plain(name: &str, s3: bool, sql: &str) -> Option<Self> {
        let services = services(name)?;
        let bucket =
            std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
        let case = Case::new(services, name, s3.then(|| format!("s3://{bucket}"))).await;
        let lake = Self { case };
        lake.sql(sql);
        Some(lake)
    }

    fn sql(&self, sql: &str) {
        let folder = self.case.folder.path().to_string_lossy();
        fs::write(self.case.path("transactions.sql"), sql.replace("FOLDER", &folder)).unwrap();
    }

    fn schedule(&self, more: &[&str]) -> Command {
        let mut all = vec!["schedule", "--name", &self.case.name, "--state", &self.case.state];
        all.extend(["--format", "csv"]);
        all.extend(more);
        self.case.command(&all)
    }

    /// What `--once` printed: interval start, attempt, state of each run; and what it said.
    fn once(&self, more: &[&str], code: i32) -> (Vec<[String; 4]>, String) {
        let out = self.schedule(&[&["--once"], more].concat()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{said}");
        (cells(&out), said)
    }

    fn runs(&self, sql: &str) -> String {
        let arguments = ["query", "--state", &self.case.state, "--format", "csv", "-c", sql];
        let out = self.case.command(&arguments).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).lines().skip(1).collect::<Vec<_>>().join("\n")
    }

    /// Each fire of both schedules succeeded once.
    fn all_succeeded(&self) {
        let succeeded = "SELECT schedule, count(*) AS n, count(DISTINCT fire_time) AS fires, min(interval_start) AS least \
                         FROM millstream.runs WHERE state = 'succeeded' GROUP BY schedule ORDER BY schedule";
        let found = self.runs(succeeded);
        let start = "2026-01-01T00:00:00";
        for (line, schedule) in found.lines().zip(["daily", "nightly"]) {
            assert!(line.starts_with(&format!("{schedule},5,5,{start}")), "{found}");
        }
        assert_eq!(found.lines().count(), 2, "{found}");
    }

    /// DuckDB's word on both tables.
    fn check(&self) {
        let hours = "SELECT k, ts, count(*) OVER w AS n, sum(v) OVER w AS v30 FROM backup WINDOW w AS (PARTITION BY k \
                     ORDER BY ts RANGE BETWEEN INTERVAL 30 HOURS PRECEDING AND CURRENT ROW)";
        let until = "(SELECT max(ts) FROM backup) - INTERVAL 5 SECONDS";
        let expected = format!("SELECT k, ts, n, v30 FROM ({hours}) WHERE ts < {until}");
        self.case.same("backup=backup,t=hours", "SELECT k, ts, n, v30 FROM t", &expected, 2_500);
        let days = "SELECT n, k, d, d + INTERVAL 1 DAY AS u, CAST(NULL AS VARCHAR) AS note FROM \
                    (SELECT count(*) AS n, k, time_bucket(INTERVAL 1 DAY, ts) AS d FROM backup GROUP BY 2, 3)";
        self.case.same("backup=backup,t=days", "SELECT n, k, day AS d, until AS u, note FROM t", days, 60);
    }
}

fn cells(out: &Output) -> Vec<[String; 4]> {
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let row = |line: &str| {
        let cell: Vec<&str> = line.split(',').collect();
        [1, 3, 5, 6].map(|at| cell[at].to_owned())
    };
    text.lines().skip(1).map(row).collect()
}

/// Waits for the end of a process.
async fn end(mut process: Child, what: &str) -> Output {
    let begun = Instant::now();
    while process.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(120) {
            process.kill().ok();
            let out = process.wait_with_output().unwrap();
            panic!("{what} does not end\n{}", String::from_utf8_lossy(&out.stderr));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    process.wait_with_output().unwrap()
}

/// The shipped schedules fit the shipped pipeline.
#[test]
fn the_shipped_schedules_are_understood() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    let out = command.args(["check", "sql/transactions.sql", "sql/schedules.sql"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains("3 sinks, 1 schedules"), "{said}");
}

/// Five nights at once; then nothing is left to do.
#[tokio::test(flavor = "multi_thread")]
async fn schedules_run_what_is_due_once() {
    let Some(lake) = Lake::new("schedules_run_what_is_due_once", false).await else { return };
    let checked = lake.case.command(&["check"]).output().unwrap();
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(checked.status.success() && said.contains("2 schedules"), "{said}");
    let planned = lake
        .case
        .command(&["plan", "--name", &lake.case.name, "--state", &lake.case.state])
        .output()
        .unwrap();
    let planned = String::from_utf8_lossy(&planned.stdout).into_owned();
    assert!(planned.contains("schedule nightly: '0 2 * * *' UTC, next "), "{planned}");
    assert!(
        lake.case.query("SHOW SCHEDULES").contains("BACKFILL hours_table FOR LAST INTERVAL '1 day',all,")
    );

    let (runs, said) = lake.once(&["--now", NOW], 0);
    assert_eq!(runs.len(), 10, "{said}");
    assert!(runs.iter().all(|run| run[2] == "1" && run[3] == "succeeded"), "{runs:?}");
    lake.all_succeeded();
    lake.check();
    let (runs, said) = lake.once(&["--now", NOW], 0);
    assert!(runs.is_empty() && said.contains("nightly: fires next at 2026-01-07T02:00:00Z"), "{said}");
    lake.check();
}

/// Killed at every step, in turn, on S3: the tables are those of an undisturbed run.
#[tokio::test(flavor = "multi_thread")]
async fn schedules_survive_kills() {
    let Some(lake) = Lake::new("schedules_survive_kills", true).await else { return };
    for (schedule, at) in [
        (DAILY, "schedule.claim.before"),
        (DAILY, "schedule.claim.after"),
        (DAILY, "insert.before"),
        (DAILY, "insert.after"),
        (NIGHTLY, "backfill.before"),
        (NIGHTLY, "backfill.after"),
        (NIGHTLY, "schedule.end.before"),
        (NIGHTLY, "schedule.end.after"),
    ] {
        lake.sql(&format!("{SQL}{schedule}"));
        let mut command = lake.schedule(&["--once", "--now", NOW, "--lease", "1s"]);
        let out = command.env("MILLSTREAM_CRASH_AT", at).output().unwrap();
        assert_eq!(out.status.signal(), Some(SIGABRT), "{at}: {}", String::from_utf8_lossy(&out.stderr));
    }
    lake.sql(&format!("{SQL}{NIGHTLY}{DAILY}"));
    let (_, said) = lake.once(&["--now", NOW, "--lease", "1s"], 0);
    lake.all_succeeded();
    let lost = lake.runs("SELECT count(*) AS n FROM millstream.runs WHERE state = 'lost'");
    assert!(lost.parse::<u32>().unwrap() >= 5, "{lost}: {said}");
    assert_eq!(
        lake.runs("SELECT count(*) AS n FROM millstream.runs WHERE state IN ('running', 'failed')"),
        "0"
    );
    lake.check();
}

/// One falls asleep before a step that others see, another one takes over and finishes; the sleeper then writes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn schedules_taken_over_write_nothing_more() {
    let Some(lake) = Lake::new("schedules_taken_over_write_nothing_more", false).await else { return };
    for (at, now) in [
        ("insert.before", "2026-01-02T02:45:00Z"),
        ("backfill.before", "2026-01-03T02:45:00Z"),
        ("schedule.end.before", NOW),
    ] {
        let mut command = lake.schedule(&["--once", "--now", now, "--lease", "2s", "--parallel", "1"]);
        let mut sleeper = command.env("MILLSTREAM_STOP_AT", at).spawn().unwrap();
        let begun = Instant::now();
        let stat = format!("/proc/{}/stat", sleeper.id());
        let asleep =
            || fs::read_to_string(&stat).is_ok_and(|s| s.rsplit(") ").next().unwrap().starts_with('T'));
        while !asleep() {
            assert!(
                begun.elapsed() < Duration::from_secs(120) && sleeper.try_wait().unwrap().is_none(),
                "{at}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (runs, said) = lake.once(&["--now", now], 0);
        assert!(runs.iter().any(|run| run[3] == "lost"), "{at}: {said}");
        let before = lake.runs("SELECT * FROM millstream.runs ORDER BY id, attempt");
        let woken = Command::new("kill").args(["-CONT", &sleeper.id().to_string()]).status().unwrap();
        assert!(woken.success());
        let out = end(sleeper, at).await;
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.contains("another process"), "{at}: {said}");
        assert_eq!(lake.runs("SELECT * FROM millstream.runs ORDER BY id, attempt"), before, "{at}: {said}");
    }
    lake.all_succeeded();
    lake.check();
}

/// Three processes at once, state on S3: no run of a schedule overlaps another one of it, and each fire is run once.
#[tokio::test(flavor = "multi_thread")]
async fn schedules_never_overlap() {
    const SQL: &str = "
CREATE TABLE marks (moment TIMESTAMP, n BIGINT) WITH (connector = 'delta', location = '${LAKE}/marks');
CREATE SCHEDULE often CRON '* * * * *' WITH (start = 'START')
AS INSERT INTO marks SELECT $interval_start, sum(value) FROM generate_series(1, 1000000);
";
    let start = std::time::SystemTime::now() - Duration::from_secs(12 * 60);
    let start: chrono::DateTime<chrono::Utc> = start.into();
    let start = start.to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
    let Some(lake) = Lake::plain("schedules_never_overlap", true, &SQL.replace("START", &start)).await else {
        return;
    };
    let each: Vec<Child> =
        (0..3).map(|_| lake.schedule(&["--once", "--lease", "60s"]).spawn().unwrap()).collect();
    let mut made = 0;
    for process in each {
        let out = end(process, "a process").await;
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        made += cells(&out).len();
    }
    // A minute more may have come.
    assert!(made >= 12, "{made}");
    let runs = "SELECT count(*) AS n, count(DISTINCT id) AS ids, sum(CASE WHEN state = 'succeeded' THEN 1 END) AS ok FROM millstream.runs";
    assert_eq!(lake.runs(runs), format!("{made},{made},{made}"));
    let overlaps =
        "SELECT count(*) AS n FROM millstream.runs a JOIN millstream.runs b ON a.schedule = b.schedule
                    WHERE a.id <> b.id AND a.started < b.ended AND b.started < a.ended";
    assert_eq!(lake.runs(overlaps), "0");
    let marks = "SELECT count(*) AS n, count(DISTINCT moment) AS d, min(n) = max(n) AS same FROM marks";
    assert_eq!(lake.case.query(marks).lines().nth(1), Some(format!("{made},{made},true").as_str()));
}

/// Failures are tried again later and later, missed fires caught up as the SQL says.
#[tokio::test(flavor = "multi_thread")]
async fn schedules_try_again_and_catch_up() {
    const SQL: &str = "
CREATE TABLE given (n BIGINT) WITH (connector = 'delta', location = '${LAKE}/given');
CREATE TABLE copies (n BIGINT) WITH (connector = 'delta', location = '${LAKE}/copies');
CREATE SCHEDULE copy CRON '0 2 * * *' WITH (start = '2026-01-02', retries = 2, retry_delay = '10 minutes')
AS INSERT INTO copies SELECT n FROM given;
";
    let Some(lake) = Lake::plain("schedules_try_again_and_catch_up", false, SQL).await else { return };
    // The table is not there. A clock goes on while a process runs, so each call comes well behind its time.
    let (runs, said) = lake.once(&["--now", "2026-01-02T02:00:00Z"], 3);
    assert_eq!(runs.iter().map(|run| run[3].as_str()).collect::<Vec<_>>(), ["failed"], "{said}");
    let (runs, said) = lake.once(&["--now", "2026-01-02T02:05:00Z"], 0);
    assert!(runs.is_empty() && said.contains("copy: is tried again at 2026-01-02T02:1"), "{said}");
    assert_eq!(lake.once(&["--now", "2026-01-02T02:20:00Z"], 3).0.len(), 1);
    let (runs, said) = lake.once(&["--now", "2026-01-02T02:35:00Z"], 0);
    assert!(runs.is_empty() && said.contains("copy: is tried again at 2026-01-02T02:4"), "{said}");
    lake.sql(&format!(
        "{SQL}CREATE SCHEDULE fill CRON '0 1 * * *' WITH (start = '2026-01-02', catch_up = 'last') \
        AS INSERT INTO given VALUES (7);"
    ));
    // Now something makes it: with catch_up = 'last'.
    let fills =
        |runs: &[[String; 4]]| runs.iter().filter(|run| run[0] == "fill").cloned().collect::<Vec<_>>();
    let (runs, said) = lake.once(&["--now", "2026-01-02T01:30:00Z"], 0);
    assert_eq!(fills(&runs).len(), 1, "{said}");
    let (runs, said) = lake.once(&["--now", "2026-01-02T02:50:00Z"], 0);
    assert_eq!(runs.len(), 1, "{said}");
    assert_eq!(runs[0], ["copy", "2026-01-01T00:00:00Z", "3", "succeeded"].map(str::to_owned), "{said}");
    let (runs, said) = lake.once(&["--now", "2026-01-05T01:30:00Z"], 0);
    let found: Vec<[String; 3]> =
        fills(&runs).into_iter().map(|[_, from, attempt, state]| [from, attempt, state]).collect();
    let skipped = ["2026-01-02T00:00:00Z", "0", "skipped"].map(str::to_owned);
    assert_eq!(found, [skipped, ["2026-01-04T00:00:00Z", "1", "succeeded"].map(str::to_owned)], "{said}");
    assert!(said.contains("2 missed, catch_up = 'last'"), "{said}");
    let copied = runs.iter().filter(|run| run[0] == "copy" && run[3] == "succeeded").count();
    assert_eq!(copied, 2, "it had missed two nights: {said}");
}

/// A stop in the middle of a run: it is begun again at once at the next start.
#[tokio::test(flavor = "multi_thread")]
async fn schedules_stop_and_go_on() {
    const SQL: &str = "
CREATE TABLE sums (n BIGINT) WITH (connector = 'delta', location = '${LAKE}/sums');
CREATE SCHEDULE big CRON '0 2 * * *' WITH (start = '2026-01-02')
AS INSERT INTO sums SELECT count(*) FROM generate_series(1, ROWS) AS a(x) CROSS JOIN generate_series(1, ROWS) AS b(y) WHERE x % 7 <> y % 5;
";
    let long = SQL.replace("ROWS", "1000000");
    let Some(lake) = Lake::plain("schedules_stop_and_go_on", false, &long).await else { return };
    let log = lake.case.path("said.log");
    let mut command = lake.schedule(&["--now", "2026-01-02T12:00:00Z"]);
    let process = command.stderr(fs::File::create(&log).unwrap()).stdout(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while !fs::read_to_string(&log).unwrap().contains("attempt 1") {
        assert!(begun.elapsed() < Duration::from_secs(120), "{}", fs::read_to_string(&log).unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let told = Command::new("kill").args(["-TERM", &process.id().to_string()]).status().unwrap();
    assert!(told.success());
    let out = end(process, "a process that was told to stop").await;
    assert_eq!(out.status.code(), Some(0), "{}", fs::read_to_string(&log).unwrap());
    let states = "SELECT attempt, state FROM millstream.runs ORDER BY attempt";
    assert_eq!(lake.runs(states), "1,stopped");
    lake.sql(&SQL.replace("ROWS", "10"));
    let (runs, said) = lake.once(&["--now", "2026-01-02T12:01:00Z"], 0);
    assert_eq!(runs.len(), 1, "{said}");
    assert_eq!(lake.runs(states), "1,stopped\n2,succeeded");
    assert_eq!(lake.case.query("SELECT count(*) AS n FROM sums").lines().nth(1), Some("1"));
}
