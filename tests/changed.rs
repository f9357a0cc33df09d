//! Changed SQL through the binary: what `plan` says, what a start keeps, refuses and drops. No service is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SOURCE: &str = "CREATE SOURCE t (
    user_id BIGINT NOT NULL, amount DOUBLE, at BIGINT NOT NULL,
    event_time TIMESTAMP AS (to_timestamp_millis(at)), WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'files', path = './in/*.json', format = 'json');\n";
const COUNTED: &str = "CREATE VIEW counted AS
    SELECT user_id, event_time, count(*) OVER (PARTITION BY user_id ORDER BY event_time) AS n FROM t;
CREATE SINK counted_table FROM counted WITH (connector = 'delta', location = './lake/counted');\n";
const TOTALS: &str = "CREATE VIEW totals AS SELECT user_id, count(*) AS n, sum(amount) AS amount FROM t GROUP BY user_id;
CREATE SINK totals_table FROM totals WITH (connector = 'delta', location = './lake/totals', mode = 'upsert', key = 'user_id');
CREATE SINK totals_now FROM totals WITH (connector = 'memory', key = 'user_id');\n";
const COPY: &str = "CREATE SINK copy FROM t WITH (connector = 'delta', location = './lake/copy');\n";

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("in")).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// 300 more rows.
    fn feed(&self, file: i64) {
        let row = |i: i64| {
            let (at, user) = (1_767_571_200_000 + (file * 300 + i) * 1_000, i % 7);
            format!("{{\"user_id\": {user}, \"amount\": {}, \"at\": {at}}}\n", i % 11)
        };
        fs::write(self.path(&format!("in/{file}.json")), (0..300).map(row).collect::<String>()).unwrap();
    }

    fn sql(&self, parts: &[&str]) {
        fs::write(self.path("p.sql"), parts.concat()).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        command.args(arguments).arg("p.sql").current_dir(self.0.path()).output().unwrap()
    }

    /// Exit code, stdout, stderr.
    fn plan(&self) -> (i32, String, String) {
        let out = self.command(&["plan"]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
    }

    /// Runs to the end; returns exit code and stderr.
    fn run(&self, parallelism: &str) -> (i32, String) {
        let out = self.command(&["run", "--until-end", "--plain", "--parallelism", parallelism]);
        (out.status.code().unwrap(), String::from_utf8_lossy(&out.stderr).into_owned())
    }

    fn query(&self, sql: &str) -> String {
        let out = self.command(&["query", "--state", "./.millstream/p", "--format", "csv", "-c", sql]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Nodes that have files of state.
    fn nodes(&self) -> Vec<String> {
        let listed =
            fs::read_dir(self.path(".millstream/p/state")).unwrap().map(|entry| entry.unwrap().path());
        let filled = |path: &Path| fs::read_dir(path).unwrap().next().is_some();
        let mut names: Vec<String> = listed
            .filter(|path| filled(path))
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn a_plan_says_what_a_start_does() {
    let folder = Folder::new();
    folder.sql(&[SOURCE, COUNTED, TOTALS]);
    let (code, said, _) = folder.plan();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("no state at ./.millstream/p yet") && said.contains("new: begins at scan_startup"));
    assert!(!folder.path(".millstream").exists() && !folder.path("lake").exists(), "a plan makes nothing");

    folder.feed(0);
    assert_eq!(folder.run("2").0, 0);
    let (code, said, _) = folder.plan();
    assert_eq!((code, said.matches("unchanged: keeps its state").count()), (0, 5), "{said}");

    // A longer lateness changes everything, and the start says which line it is.
    let later = SOURCE.replace("'5 seconds'", "'9 seconds'");
    folder.sql(&[&later, COUNTED, TOTALS]);
    let (code, said, refused) = folder.plan();
    assert_eq!((code, said.matches("changed: must be rebuilt").count()), (1, 5), "{said}");
    assert!(said.contains("- watermark event_time - 5 seconds") && refused.contains("--name"), "{refused}");
    let (code, refused) = folder.run("1");
    assert_eq!(code, 2);
    for part in ["+ watermark event_time - 9 seconds", "--name", "millstream plan"] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    let json = folder.command(&["plan", "--format", "json"]);
    assert_eq!(json.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (json["starts"].as_bool(), json["items"][0]["change"].as_str()),
        (Some(false), Some("changed"))
    );
    // Under another name and location it begins anew.
    let elsewhere = [later.as_str(), COUNTED, TOTALS].concat().replace("./lake/", "./lake2/");
    folder.sql(&[&elsewhere]);
    let out = folder.command(&["run", "--until-end", "--plain", "--name", "p2"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Totals by hand over the input, as the sink of the first rows would have it.
const EXPECTED: &str = "SELECT user_id, count(*) AS n, CAST(sum(amount) AS DOUBLE) AS amount FROM './in/*.json' GROUP BY 1 ORDER BY 1";
const HELD: &str = "SELECT user_id, n, amount FROM totals_table ORDER BY user_id";

#[test]
fn views_and_sinks_come_and_go_around_a_state_that_goes_on() {
    let folder = Folder::new();
    folder.feed(0);
    folder.sql(&[SOURCE, COUNTED, TOTALS]);
    assert_eq!(folder.run("2").0, 0);
    assert_eq!(folder.nodes().len(), 3, "the window, the totals and their newest rows: {:?}", folder.nodes());

    // The window and its sink go, a copy comes: the totals count on, although their node has another number now.
    folder.feed(1);
    folder.sql(&[SOURCE, COPY, TOTALS]);
    let (code, said, _) = folder.plan();
    assert_eq!(code, 0, "{said}");
    for line in
        ["sink  copy           new: begins at the offsets", "counted        gone", "totals_now     unchanged"]
    {
        assert!(said.contains(line), "{line}\n{said}");
    }
    let (code, log) = folder.run("1");
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("sink copy is new") && log.contains("view counted is gone"), "{log}");
    assert_eq!(folder.query(HELD), folder.query(EXPECTED));
    assert_eq!(folder.query(&HELD.replace("totals_table", "totals_now")), folder.query(EXPECTED));
    let copied = "SELECT count(*) AS n, min(at) AS at FROM copy";
    assert_eq!(folder.query(copied), "n,at\n300,1767571500000\n");
    // Deleted behind the next manifest; the last of the run before may stand.
    assert_eq!(folder.run("1").0, 0);
    let left = folder.nodes();
    assert!(left.len() == 2 && left.iter().all(|node| node.contains("totals")), "{left:?}");

    // A table that missed rows is not written on as if it had them.
    folder.sql(&[SOURCE, COPY, TOTALS, COUNTED]);
    let (code, _, refused) = folder.plan();
    assert!(code == 1 && refused.contains("none of those that the pipeline read without it"), "{refused}");
    assert_eq!(folder.run("1").0, 2);
    fs::remove_dir_all(folder.path("lake/counted")).unwrap();
    folder.feed(2);
    let (code, log) = folder.run("2");
    assert_eq!(code, 0, "{log}");
    assert_eq!(folder.query(HELD), folder.query(EXPECTED));
    let counts = folder.query("SELECT max(n), min(event_time) FROM counted_table");
    // Of 43 rows of a user the last is within the lateness and not final yet.
    assert_eq!(counts.lines().nth(1).unwrap(), "42,2026-01-05T00:10:00Z", "it counts from where it began");
}

#[test]
fn a_new_sink_joins_the_state_of_its_view() {
    let folder = Folder::new();
    folder.feed(0);
    folder.sql(&[SOURCE, COUNTED, TOTALS]);
    assert_eq!(folder.run("2").0, 0);
    folder.feed(1);
    let newest = "CREATE SINK counted_now FROM counted WITH (connector = 'memory', key = 'user_id');
        CREATE SINK changes FROM totals WITH (connector = 'delta', location = './lake/changes', mode = 'changelog');";
    folder.sql(&[newest, SOURCE, COUNTED, TOTALS]);
    let (code, log) = folder.run("1");
    assert_eq!(code, 0, "{log}");
    let expected = folder.query("SELECT user_id, count(*) AS n FROM './in/*.json' GROUP BY 1 ORDER BY 1");
    assert_eq!(folder.query("SELECT user_id, n FROM counted_now ORDER BY 1"), expected);
    // Changes from here on: each total of before leaves, each of now comes.
    let last = "SELECT user_id, n FROM changes GROUP BY 1, 2 HAVING sum(_weight) > 0 ORDER BY 1";
    assert_eq!(folder.query(last), expected);
}

/// Nothing that was written is mixed with rows of another meaning.
#[test]
fn a_changed_view_is_new_when_only_new_sinks_read_it() {
    let folder = Folder::new();
    folder.feed(0);
    folder.sql(&[SOURCE, COUNTED]);
    assert_eq!(folder.run("2").0, 0);
    let changed = COUNTED.replace(
        "ORDER BY event_time)",
        "ORDER BY event_time RANGE BETWEEN INTERVAL '10 seconds' PRECEDING AND CURRENT ROW)",
    );
    folder.sql(&[SOURCE, &changed]);
    let (code, said, refused) = folder.plan();
    assert!(
        code == 1 && said.contains("changed: must be rebuilt") && refused.contains("other names"),
        "{said}{refused}"
    );
    assert_eq!(folder.run("1").0, 2);
    let moved = changed.replace("counted_table", "counted_again").replace("lake/counted", "lake/again");
    folder.sql(&[SOURCE, &moved]);
    let (code, said, _) = folder.plan();
    assert_eq!(code, 0, "{said}");
    for line in
        ["view  counted        new", "counted_again  new: begins at the offsets", "counted_table  gone"]
    {
        assert!(said.contains(line), "{line}\n{said}");
    }
    folder.feed(1);
    let (code, log) = folder.run("1");
    assert_eq!(code, 0, "{log}");
    assert_eq!(folder.query("SELECT max(n) AS n FROM counted_again"), "n\n2\n");
    assert_eq!(folder.nodes().len(), 1, "the old window's state is deleted: {:?}", folder.nodes());
}

/// The last commit of a sink that is gone would never be made.
#[test]
fn a_sink_is_not_dropped_before_its_commit_is_made() {
    let folder = Folder::new();
    folder.feed(0);
    folder.sql(&[SOURCE, COUNTED, COPY]);
    assert_eq!(folder.run("1").0, 0);
    // As after a crash between manifest and commit: the newest entry of the table's log that has rows is not there.
    let log = folder.path("lake/copy/_delta_log");
    let mut entries: Vec<PathBuf> = fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    entries.sort();
    fs::remove_file(entries.pop().unwrap()).unwrap();
    folder.sql(&[SOURCE, COUNTED]);
    let (code, _, refused) = folder.plan();
    assert!(code == 1 && refused.contains("Start once with the sink"), "{refused}");
    assert_eq!(folder.run("1").0, 2);
    folder.sql(&[SOURCE, COUNTED, COPY]);
    assert_eq!(folder.run("1").0, 0);
    assert_eq!(folder.query("SELECT count(*) AS n FROM copy"), "n\n300\n");
    folder.sql(&[SOURCE, COUNTED]);
    assert_eq!(folder.plan().0, 0);
    assert_eq!(folder.run("1").0, 0);
}

/// Rows of a look-up table are no part of what a view means: they may change, and both sides say so.
#[test]
fn other_rows_in_a_lookup_table_are_named() {
    let folder = Folder::new();
    folder.feed(0);
    let table = |names: &str| fs::write(folder.path("users.csv"), format!("id,name\n{names}")).unwrap();
    table("1,ann\n2,bob\n");
    let joined = "CREATE TABLE users (id BIGINT, name VARCHAR) WITH (connector = 'csv', location = './users.csv');
        CREATE SINK named AS SELECT t.user_id, u.name, t.event_time FROM t LEFT JOIN users u ON t.user_id = u.id
        WITH (connector = 'delta', location = './lake/named');\n";
    folder.sql(&[SOURCE, joined]);
    let (code, log) = folder.run("1");
    assert!(code == 0 && !log.contains("other rows"), "{log}");
    table("2,bob\n1,ann\n");
    let (code, said, _) = folder.plan();
    assert!(code == 0 && !said.contains("other rows"), "the same rows in another order\n{said}");
    table("1,anna\n2,bob\n");
    folder.feed(1);
    let (code, said, _) = folder.plan();
    assert!(code == 0 && said.contains("table users: other rows"), "{said}");
    let (code, log) = folder.run("2");
    assert!(code == 0 && log.contains("look-up table users has other rows"), "{log}");
    let named =
        folder.query("SELECT name, count(*) AS n FROM named WHERE user_id = 1 GROUP BY name ORDER BY name");
    assert_eq!(named, "name,n\nann,43\nanna,43\n");
    let (code, log) = folder.run("1");
    assert!(code == 0 && !log.contains("other rows"), "{log}");
}
