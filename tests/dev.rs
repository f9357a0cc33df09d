//! `dev` in a fresh folder, without any service: bad records, the live view on a terminal, and what it leaves behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A folder with the shipped transactions pipeline.
pub fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    fs::create_dir(folder.path().join("sql")).unwrap();
    for name in ["transactions.sql", "transactions_producer.sql"] {
        fs::copy(source.join(name), folder.path().join("sql").join(name)).unwrap();
    }
    folder
}

/// A command in that folder that finds no service.
pub fn alone(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).env("REDIS_URL", "redis://127.0.0.1:9").stdin(Stdio::null());
    ["LAKE", "RATE", "KAFKA_BROKERS", "MILLSTREAM_LOG", "NO_COLOR"].iter().for_each(|name| {
        command.env_remove(name);
    });
    command
}

/// Starts a command, lets it run, interrupts it; stdout and stderr after its end.
pub fn interrupted(mut command: Command, after: Duration) -> (String, String) {
    let process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = process.id().to_string();
    let stop = std::thread::spawn(move || {
        std::thread::sleep(after);
        Command::new("kill").args(["-INT", &id]).status().unwrap();
    });
    let out = process.wait_with_output().unwrap();
    stop.join().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (said, errors) = (text(out.stdout), text(out.stderr));
    assert!(out.status.success(), "{:?}\n{said}\n{errors}", out.status);
    (said, errors)
}

fn asked(folder: &Path, sql: &str) -> String {
    let state = "./.millstream/transactions-dev";
    let mut command = alone(env!("CARGO_BIN_EXE_millstream"), folder);
    command.args(["query", "sql/transactions.sql", "--state", state, "--format", "csv", "-c", sql]);
    let out = command.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Every 500th record is broken, in each of the four ways: counted, kept, and nothing else is lost.
#[test]
fn bad_records_are_kept_aside_and_the_pipeline_goes_on() {
    let folder = folder();
    let mut dev = alone(env!("CARGO_BIN_EXE_millstream"), folder.path());
    dev.args(["dev", "--inject-bad", "500", "sql/transactions.sql"]);
    let (_, said) = interrupted(dev, Duration::from_secs(8));
    let last = said.lines().rfind(|line| line.contains("rows/s")).unwrap();
    let number = |word: &str| -> u64 {
        let after = last.split_once(word).unwrap().1.trim_start();
        after.split(' ').next().unwrap().parse().unwrap()
    };
    let dead = number("dead letters");
    assert!(dead >= 8, "{said}");
    let letters = "./.millstream/transactions-dev/dead-letters/transactions/*.parquet";
    let kinds =
        asked(folder.path(), &format!("SELECT kind, count(*) FROM '{letters}' GROUP BY kind ORDER BY kind"));
    let kinds: Vec<(&str, u64)> = kinds
        .lines()
        .skip(1)
        .map(|line| line.split_once(',').map(|(kind, count)| (kind, count.parse().unwrap())).unwrap())
        .collect();
    let names: Vec<&str> = kinds.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(names, ["future", "missing_field", "not_json", "wrong_type"]);
    assert_eq!(kinds.iter().map(|(_, count)| count).sum::<u64>(), dead, "{said}");
    // Rows of the backup and dead letters together are every offset, once.
    let rows: u64 = asked(folder.path(), "SELECT count(*) FROM transactions_backup")
        .lines()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let offsets = "SELECT _partition AS p, _offset AS o FROM transactions_backup UNION ALL \
                   SELECT partition, \"offset\" FROM";
    let next = asked(
        folder.path(),
        &format!("SELECT sum(n) FROM (SELECT max(o) + 1 AS n FROM ({offsets} '{letters}') GROUP BY p)"),
    );
    assert_eq!(next.lines().nth(1).unwrap().parse::<u64>().unwrap(), rows + dead);
    assert!(rows > 8 * 400, "{rows} rows");
}

#[test]
fn there_must_be_a_producer_to_break_records_of() {
    let folder = folder();
    fs::remove_file(folder.path().join("sql/transactions_producer.sql")).unwrap();
    let mut dev = alone(env!("CARGO_BIN_EXE_millstream"), folder.path());
    let out = dev.args(["dev", "--inject-bad", "10", "sql/transactions.sql"]).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("transactions_producer.sql"), "{said}");
}

/// What a terminal (one that `script` makes) shows of a shell line.
pub fn on_a_terminal(folder: &Path, size: &str, line: &str) -> Option<String> {
    let line = format!("stty {size}; {line}; stty -a");
    let mut script = alone("script", folder);
    let out = script.env("TERM", "xterm").args(["-q", "-e", "-c", &line, "/dev/null"]).output().ok()?;
    Some(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The view is drawn, and the terminal is as before after Ctrl-C and after an error.
#[test]
fn the_view_gives_the_terminal_back() {
    let folder = folder();
    let dev = format!("{} dev sql/transactions.sql", env!("CARGO_BIN_EXE_millstream"));
    let Some(stopped) =
        on_a_terminal(folder.path(), "rows 30 cols 90", &format!("timeout --foreground -s INT 6 {dev}"))
    else {
        println!("skipped the_view_gives_the_terminal_back: install util-linux's script");
        return;
    };
    let sql = folder.path().join("sql/transactions.sql");
    let text = fs::read_to_string(&sql).unwrap();
    fs::write(&sql, text.replacen("history  ", "on_error = 'fail', history  ", 1)).unwrap();
    fs::remove_dir_all(folder.path().join("lake")).unwrap();
    fs::remove_dir_all(folder.path().join(".millstream")).unwrap();
    let failed = on_a_terminal(
        folder.path(),
        "rows 30 cols 90",
        &format!("timeout --foreground 60 {dev} --inject-bad 3000"),
    )
    .unwrap();
    for (shown, end) in [(&stopped, "Try next:"), (&failed, "error: topic transactions")] {
        for word in ["held back by partition", "newest in user_features_serving", "dead letters", end] {
            assert!(shown.contains(word), "{word} is not in:\n{shown}");
        }
        let (hidden, given_back) = (shown.rfind("\x1b[?25l").unwrap(), shown.rfind("\x1b[?25h").unwrap());
        assert!(hidden < given_back && given_back < shown.rfind(end).unwrap(), "{shown}");
        assert!(shown.contains(" echo "), "{shown}");
        // No line is wider than the terminal.
        let drawn = shown.split("\r\n").map(plain).filter(|line| line.contains("user_features_training  "));
        assert!(drawn.clone().count() > 4 && drawn.clone().all(|line| line.chars().count() < 90), "{shown}");
    }
}

/// A line without control sequences.
pub fn plain(line: &str) -> String {
    let mut parts = line.split("\x1b[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        let end = part.find(|c: char| c.is_ascii_alphabetic()).map_or(part.len(), |at| at + 1);
        text + &part[end..]
    })
}
