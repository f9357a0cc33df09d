//! Backfills of unbounded frames that go on from state snapshots: the same rows as from all history, whatever came late,
//! was killed, lost or damaged in between; and what is read is what came since.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::case::{Case, Dice, services};

/// 2026-01-01, ms.
const FIRST: u64 = 1_767_225_600_000;
const HOUR: u64 = 3_600_000;
const SIGABRT: i32 = 6;

/// One view into two tables: one goes on from snapshots, the other reads all history.
const SQL: &str = "
CREATE SOURCE events (
    k BIGINT NOT NULL, t BIGINT NOT NULL, c VARCHAR, v BIGINT, x DOUBLE, unread VARCHAR,
    ts TIMESTAMP AS (to_timestamp_millis(t)), WATERMARK FOR ts AS ts - INTERVAL '5 seconds'
) WITH (connector = 'files', path = 'FOLDER/input/*.ndjson', format = 'json', history = 'backup');
CREATE SINK backup FROM events
WITH (connector = 'delta', location = '${LAKE}/backup', partition_by = 'day(ts)', compact_interval = '1 second');

CREATE VIEW narrow AS SELECT k % 5 AS k, c, ts, v + 1 AS v, x, _partition AS p, _offset AS o
FROM events WHERE v IS NULL OR v <> 13;
CREATE VIEW features AS
SELECT k, c, ts, o, count(*) OVER a AS n, row_number() OVER a AS nth, sum(v) OVER a AS v_all, max(v) OVER a AS v_most,
       sum(v) FILTER (WHERE v > 50) OVER a AS v_big, sum(v) OVER d AS v_day, sum(x) OVER a AS x_all, avg(x) OVER a AS x_mean,
       min(x) OVER a AS x_least, sum(x) OVER d AS x_day, max(x) OVER d AS x_most
FROM narrow
WINDOW a AS (PARTITION BY k, c ORDER BY ts),
       d AS (PARTITION BY k, c ORDER BY ts RANGE BETWEEN INTERVAL '30 hours' PRECEDING AND CURRENT ROW);
CREATE SINK going_on AS SELECT *, v_all - v_big AS v_small FROM features WHERE n > 1
WITH (connector = 'delta', location = '${LAKE}/going_on', partition_by = 'day(ts)');
CREATE SINK whole AS SELECT *, v_all - v_big AS v_small FROM features WHERE n > 1
WITH (connector = 'delta', location = '${LAKE}/whole', partition_by = 'day(ts)');

CREATE VIEW total AS SELECT k, ts, count(*) OVER (PARTITION BY k ORDER BY ts) AS n FROM events;
CREATE SINK total_table FROM total WITH (connector = 'delta', location = '${LAKE}/total', partition_by = 'day(ts)');
CREATE VIEW each AS SELECT t, _offset AS o, ts, count(*) OVER (PARTITION BY t, _offset ORDER BY ts) AS n FROM events;
CREATE SINK each_table FROM each WITH (connector = 'delta', location = '${LAKE}/each', partition_by = 'day(ts)');
CREATE VIEW above AS SELECT k, ts, max(n) OVER (PARTITION BY k ORDER BY ts) AS most FROM total;
CREATE SINK above_table FROM above WITH (connector = 'delta', location = '${LAKE}/above', partition_by = 'day(ts)');
";

/// DuckDB's answer, where its sums are exact.
const ANSWER: &str = "SELECT * FROM (
    SELECT k, c, ts, o, count(*) OVER a AS n, row_number() OVER r AS nth, sum(v) OVER a AS v_all, max(v) OVER a AS v_most,
           sum(v) FILTER (WHERE v > 50) OVER a AS v_big, sum(v) OVER d AS v_day, min(x) OVER a AS x_least, max(x) OVER d AS x_most
    FROM (SELECT k % 5 AS k, c, ts, v + 1 AS v, x, _partition AS p, _offset AS o FROM backup WHERE v IS NULL OR v <> 13)
    WINDOW a AS (PARTITION BY k, c ORDER BY ts), r AS (PARTITION BY k, c ORDER BY ts, p, o),
           d AS (PARTITION BY k, c ORDER BY ts RANGE BETWEEN INTERVAL 30 HOURS PRECEDING AND CURRENT ROW)
) WHERE n > 1 AND ts < least(TIMESTAMPTZ 'UNTIL', (SELECT max(ts) FROM backup) - INTERVAL 5 SECONDS)";
const ASKED: &str = "SELECT k, c, ts, o, n, nth, v_all, v_most, v_big, v_day, x_least, x_most FROM t";

struct Lake {
    case: Case,
    dice: Dice,
    files: u64,
}

impl Lake {
    async fn new(name: &str) -> Option<Self> {
        let case = Case::new(services(name)?, name, None).await;
        let folder = case.folder.path().to_string_lossy().into_owned();
        fs::write(case.path("transactions.sql"), SQL.replace("FOLDER", &folder)).unwrap();
        fs::create_dir(case.path("input")).unwrap();
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        println!("{name}: seed {seed}");
        Some(Self { case, dice: Dice(seed), files: 0 })
    }

    /// Rows of some hours, nearly in order and with ties; one of forty is late by up to `late` hours.
    fn input(&mut self, from: u64, to: u64, rows: u64, late: u64) {
        let mut text = String::new();
        for row in 0..rows {
            let mut t = FIRST + from * HOUR + row * (to - from) * HOUR / rows;
            t -= match self.dice.roll(40) {
                0 if late > 0 => self.dice.roll(late * HOUR).min(t - FIRST),
                _ => self.dice.roll(4_000).min(t - FIRST),
            };
            let (t, k) = (t / 2_000 * 2_000, self.dice.roll(40));
            let maybe =
                |dice: &mut Dice, text: String| if dice.roll(8) == 0 { "null".to_owned() } else { text };
            let c = ["\"a\"", "\"b\"", "null"][self.dice.roll(3) as usize];
            let v = self.dice.roll(100).to_string();
            let v = maybe(&mut self.dice, v);
            let x = format!(
                "{}",
                (self.dice.roll(1 << 30) as f64 / 1e3 - 5e5) * 10f64.powi(self.dice.roll(9) as i32)
            );
            let x = maybe(&mut self.dice, x);
            text.push_str(&format!(
                "{{\"k\":{k},\"t\":{t},\"c\":{c},\"v\":{v},\"x\":{x},\"unread\":\"u{row}\"}}\n"
            ));
        }
        fs::write(self.case.path(&format!("input/{:04}.ndjson", self.files)), text).unwrap();
        self.files += 1;
    }

    /// The backup gets what is there.
    fn back_up(&self) {
        let out = self.case.run(&["--sink", "backup", "--until-end", "--checkpoint", "300ms"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    fn arguments<'a>(&'a self, sink: &'a str, days: (u64, u64), more: &[&'a str]) -> Vec<String> {
        let day = |day: u64| format!("2026-01-{:02}", day + 1);
        let (from, to) = (day(days.0), day(days.1));
        let all =
            ["backfill", sink, "--name", &self.case.name, "--format", "csv", "--from", &from, "--to", &to];
        all.iter().chain(more).map(|argument| (*argument).to_owned()).collect()
    }

    /// Stdout and stderr of a backfill that ends well.
    fn backfill(&self, sink: &str, days: (u64, u64), more: &[&str]) -> (String, String) {
        let (ok, out, log) = self.try_backfill(sink, days, more);
        assert!(ok, "{sink} {days:?}: {log}");
        (out, log)
    }

    fn try_backfill(&self, sink: &str, days: (u64, u64), more: &[&str]) -> (bool, String, String) {
        let arguments = self.arguments(sink, days, more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let out = self.case.command(&arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (out.status.success(), text(&out.stdout), text(&out.stderr))
    }

    fn snapshots(&self, table: &str) -> Vec<PathBuf> {
        let Ok(found) = fs::read_dir(Path::new(&self.case.lake).join(table).join("_snapshots")) else {
            return Vec::new();
        };
        let mut found: Vec<PathBuf> = found.map(|entry| entry.unwrap().path()).collect();
        found.sort();
        found
    }

    /// Rows of the backup on some days.
    fn backed_up(&self, from: u64, to: u64) -> u64 {
        let time = |day: u64| format!("TIMESTAMP '2026-01-{:02}T00:00:00Z'", day + 1);
        let sql = format!("SELECT count(*) FROM backup WHERE ts >= {} AND ts < {}", time(from), time(to));
        self.case.query(&sql).lines().last().unwrap().parse().unwrap()
    }

    /// Both tables are the same to the last bit, and DuckDB agrees.
    fn check(&self, days: u64, least: u64) {
        self.backfill("going_on", (0, days), &[]);
        let (_, log) = self.backfill("whole", (0, days), &["--snapshots", "0", "--force", "--step", "400d"]);
        assert!(log.contains("--snapshots 0"), "{log}");
        assert!(self.snapshots("whole").is_empty());
        self.case.same("t=going_on,whole=whole", "SELECT * FROM t", "SELECT * FROM whole", least);
        let answer = ANSWER.replace("UNTIL", &format!("2026-01-{:02}T00:00:00Z", days + 1));
        self.case.same("backup=backup,t=going_on", ASKED, &answer, least);
    }
}

/// Days in any order, late rows, other steps, kills at every step, lost and damaged snapshots.
#[tokio::test(flavor = "multi_thread")]
async fn random_backfills_from_snapshots_are_the_whole_history() {
    let Some(mut lake) = Lake::new("backfills_from_snapshots").await else { return };
    let mut days = 3;
    lake.input(0, days * 24, 2_000, 48);
    lake.back_up();
    let mut from_snapshot = 0;
    for round in 0..10 {
        if lake.dice.roll(3) == 0 {
            let late = [0, 10, 60][lake.dice.roll(3) as usize];
            lake.input(days * 24, (days + 1) * 24, 500, late);
            lake.back_up();
            days += 1;
        }
        let from = lake.dice.roll(days);
        let to = from + 1 + lake.dice.roll(days - from);
        let step = ["1d", "7 hours", "2d"][lake.dice.roll(3) as usize];
        let keep = ["1", "3", "50"][lake.dice.roll(3) as usize];
        let mut more = vec!["--step", step, "--snapshots", keep, "--parallel", "2"];
        if lake.dice.roll(3) == 0 {
            more.push("--force");
        }
        let points = [
            "snapshot.before",
            "snapshot.after:2",
            "backfill.before:2",
            "backfill.after",
            "delta.file.after:2",
        ];
        if lake.dice.roll(2) == 0 {
            let point = points[lake.dice.roll(points.len() as u64) as usize];
            let arguments = lake.arguments("going_on", (from, to), &more);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let out = lake.case.command(&arguments).env("MILLSTREAM_CRASH_AT", point).output().unwrap();
            let log = String::from_utf8_lossy(&out.stderr).into_owned();
            // Where there is too little to do it does not come that far.
            let ended = out.status.success() || out.status.signal() == Some(SIGABRT);
            assert!(ended || log.contains("is complete"), "round {round}, {point}: {log}");
        }
        let (ok, _, log) = lake.try_backfill("going_on", (from, to), &more);
        assert!(ok || log.contains("is complete"), "round {round}: {log}");
        from_snapshot += log.matches("rows read: starts from the snapshot").count();
        let found = lake.snapshots("going_on");
        if lake.dice.roll(4) == 0 && !found.is_empty() {
            let victim = &found[lake.dice.roll(found.len() as u64) as usize];
            match lake.dice.roll(2) {
                0 => fs::remove_file(victim).unwrap(),
                _ => {
                    let mut bytes = fs::read(victim).unwrap();
                    let at = lake.dice.roll(bytes.len() as u64) as usize;
                    bytes[at] ^= 1;
                    fs::write(victim, bytes).unwrap();
                }
            }
        }
    }
    println!("{from_snapshot} intervals went on from a snapshot");
    lake.check(days, 1_000);
}

/// The second night opens no file of an earlier day, and reads the rows of its day alone.
#[tokio::test(flavor = "multi_thread")]
async fn the_second_night_reads_its_own_rows() {
    let Some(mut lake) = Lake::new("the_second_night").await else { return };
    // Four days, and the beginning of a fifth, so that the fourth is complete.
    lake.input(0, 97, 2_000, 0);
    lake.back_up();
    let (_, log) = lake.backfill("total_table", (0, 3), &["--parallel", "2"]);
    assert!(log.contains("2026-01-01T00:00:00Z on: reads all history: there is no snapshot yet"), "{log}");
    assert!(log.contains("goes on from the state at the end of the one before"), "{log}");
    for (day, read) in [
        (1, "starts from the snapshot of 2026-01-02T00:00:00Z"),
        (2, "starts from the snapshot of 2026-01-03T00:00:00Z"),
    ] {
        let read = format!("{} rows read: {read}", lake.backed_up(day, day + 1));
        assert!(log.contains(&read), "{read}: {log}");
    }
    assert_eq!(lake.snapshots("total").len(), 3);

    let rows = lake.backed_up(3, 4);
    let hidden: Vec<PathBuf> = (1..=3)
        .map(|day| Path::new(&lake.case.lake).join(format!("backup/ts_day=2026-01-{day:02}")))
        .collect();
    let away = |day: usize| lake.case.path(&format!("away{day}"));
    hidden.iter().enumerate().for_each(|(day, folder)| fs::rename(folder, away(day)).unwrap());
    let (_, log) = lake.backfill("total_table", (3, 4), &["--dry-run"]);
    assert!(
        log.contains("2026-01-04T00:00:00Z on: starts from the snapshot of 2026-01-04T00:00:00Z"),
        "{log}"
    );
    let (ok, _, log) = lake.try_backfill("total_table", (3, 4), &["--snapshots", "0"]);
    assert!(!ok, "the whole history is needed without snapshots: {log}");
    let (_, log) = lake.backfill("total_table", (3, 4), &[]);
    let read = format!("{rows} rows read: starts from the snapshot of 2026-01-04T00:00:00Z");
    assert!(log.contains(&read), "{read}: {log}");
    hidden.iter().enumerate().for_each(|(day, folder)| fs::rename(away(day), folder).unwrap());

    let answer = "SELECT k, ts, count(*) OVER (PARTITION BY k ORDER BY ts) AS n FROM backup";
    let answer = format!("SELECT * FROM ({answer}) WHERE ts < TIMESTAMPTZ '2026-01-05T00:00:00Z'");
    lake.case.same("backup=backup,t=total", "SELECT k, ts, n FROM t", &answer, 1_000);
    // The newest few stay.
    let found = lake.snapshots("total");
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(!found[0].to_string_lossy().contains(&format!("{}_", (FIRST + 24 * HOUR) * 1_000)), "{found:?}");
    // The table's readers and its query do not see them.
    let (out, _) = lake.backfill("total_table", (0, 4), &[]);
    assert_eq!(out.matches("unchanged").count(), 4, "{out}");
}

/// An older late row, a row that is deleted, other SQL: a snapshot is not used that does not hold.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_goes_with_what_it_is_of() {
    let Some(mut lake) = Lake::new("a_snapshot_goes").await else { return };
    lake.input(0, 97, 1_600, 0);
    lake.back_up();
    lake.backfill("going_on", (0, 3), &[]);

    // Late rows of the second day, and new ones: the snapshot of its beginning still holds.
    lake.input(25, 47, 50, 0);
    lake.input(97, 120, 300, 0);
    lake.back_up();
    let (_, log) = lake.backfill("going_on", (3, 4), &["--dry-run"]);
    let why = "starts from the snapshot of 2026-01-02T00:00:00Z (rows older than the snapshot of 2026-01-04T00:00:00Z came since)";
    assert!(log.contains(why), "{log}");
    let (_, log) = lake.backfill("going_on", (3, 4), &[]);
    assert!(log.contains(why), "{log}");
    lake.check(4, 800);

    // Older than every snapshot.
    lake.input(0, 1, 3, 0);
    lake.back_up();
    let (_, log) = lake.backfill("going_on", (3, 4), &["--dry-run"]);
    assert!(
        log.contains("reads all history: rows older than the snapshot of 2026-01-05T00:00:00Z came since")
            || log.contains(
                "reads all history: rows older than the snapshot of 2026-01-04T00:00:00Z came since"
            ),
        "{log}"
    );
    lake.check(4, 800);

    // Somebody deletes rows of the backup: which ones, the log does not say.
    let script = "import sys\nfrom deltalake import DeltaTable\nDeltaTable(sys.argv[1]).delete(\"k = 7 AND ts < '2026-01-01T09:00:00Z'\")";
    let out = std::process::Command::new(&lake.case.services.python)
        .args(["-c", script, &format!("{}/backup", lake.case.lake)])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let (_, log) = lake.backfill("going_on", (3, 4), &["--force", "--dry-run"]);
    assert!(log.contains("reads all history: the backup lost rows since"), "{log}");
    lake.backfill("going_on", (0, 4), &["--force"]);
    lake.check(4, 800);

    // Other SQL below the window has other states; above it has not.
    let sql = fs::read_to_string(lake.case.path("transactions.sql")).unwrap();
    fs::write(lake.case.path("transactions.sql"), sql.replace("v_all - v_big", "v_all * 2 - v_big")).unwrap();
    let (_, log) = lake.backfill("going_on", (3, 4), &["--dry-run"]);
    assert!(log.contains("starts from the snapshot of 2026-01-04T00:00:00Z"), "{log}");
    fs::write(lake.case.path("transactions.sql"), sql.replace("v <> 13", "v <> 14")).unwrap();
    let (_, log) = lake.backfill("going_on", (3, 4), &["--dry-run"]);
    assert!(log.contains("reads all history: there is no snapshot yet"), "{log}");
    let (_, log) = lake.backfill("above_table", (3, 4), &["--dry-run"]);
    assert!(log.contains("reads all history: it is a window over a window"), "{log}");
}

/// A state that is larger than the memory is given up, and the rows come from all history.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_larger_than_the_memory() {
    let Some(mut lake) = Lake::new("a_state_larger").await else { return };
    lake.input(0, 49, 4_000, 0);
    lake.back_up();
    let (_, log) = lake.backfill("each_table", (0, 2), &["--memory", "1MB"]);
    assert!(log.contains("the state of its keys is larger than the memory"), "{log}");
    assert!(lake.snapshots("each").len() < 2, "that of the second day is not there");
    let answer = "SELECT t, o, ts, n FROM each_rows";
    let whole = "SELECT t, _offset, ts, 1 FROM backup WHERE ts < TIMESTAMPTZ '2026-01-03T00:00:00Z'";
    lake.case.same("backup=backup,each_rows=each", answer, whole, 3_000);
}
