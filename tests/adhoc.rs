//! Ad-hoc queries: files by path, versions of Delta tables, keys of a Redis store, scripts, the shell on a terminal.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::dev::{alone, plain};
use crate::queries::python;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const QUERIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/queries.py");

/// `millstream query` with a script on stdin.
fn query(folder: &Path, arguments: &[&str], script: &str) -> Output {
    let mut command = alone(env!("CARGO_BIN_EXE_millstream"), folder);
    command.arg("query").args(arguments).env("LAKE", folder);
    let mut process =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    process.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    process.wait_with_output().unwrap()
}

fn ok(folder: &Path, arguments: &[&str], script: &str) -> String {
    let out = query(folder, arguments, script);
    assert!(out.status.success(), "{script}\n{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn fails(folder: &Path, script: &str) -> String {
    let out = query(folder, &["--format", "csv"], script);
    assert!(!out.status.success(), "{script}\n{}", String::from_utf8_lossy(&out.stdout));
    String::from_utf8(out.stderr).unwrap()
}

#[test]
fn tables_are_read_as_they_were() {
    let Some(python) = python("tables_are_read_as_they_were") else { return };
    let lake = tempfile::tempdir().unwrap();
    let made = Command::new(&python).arg(QUERIES).arg("make").arg(lake.path()).status().unwrap();
    assert!(made.success());
    let pipeline = format!("{ROOT}/sql/transactions.sql");
    let count = |of: &str| {
        let sql = format!("SELECT count(*) AS n FROM {of}");
        let text = ok(lake.path(), &[&pipeline, "--format", "csv"], &sql);
        text.strip_prefix("n\n").unwrap().trim().parse::<u64>().unwrap()
    };
    let by_number: Vec<u64> =
        (0..3).map(|version| count(&format!("transactions_backup VERSION AS OF {version}"))).collect();
    assert!(400 <= by_number[0] && by_number[0] < by_number[1] && by_number[1] < by_number[2]);
    assert_eq!(count("transactions_backup"), by_number[2]);
    assert_eq!(count("'./transactions_backup' FOR VERSION AS OF 1 AS t WHERE t.user_id >= 0"), by_number[1]);
    // A version counts from when its file of the log was written.
    for (version, rows) in by_number.iter().enumerate() {
        let log = format!("transactions_backup/_delta_log/{version:020}.json");
        let written = fs::metadata(lake.path().join(log)).unwrap().modified().unwrap();
        let millis = written.duration_since(UNIX_EPOCH).unwrap().as_millis() as i64 + 1;
        let time = chrono::DateTime::from_timestamp_millis(millis).unwrap().format("%Y-%m-%dT%H:%M:%S%.3fZ");
        assert_eq!(count(&format!("transactions_backup FOR SYSTEM_TIME AS OF '{time}'")), *rows, "{version}");
    }
    let joined = "transactions_backup VERSION AS OF 1 a JOIN transactions_backup VERSION AS OF 0 b \
                  ON a._partition = b._partition AND a._offset = b._offset";
    assert!(count(joined) >= by_number[0]);
    for (of, said) in [
        (
            "'./transactions_backup' VERSION AS OF 99",
            "./transactions_backup has no version 99; its newest is 2",
        ),
        ("'./transactions_backup' VERSION AS OF x", "expected the number of a version"),
        ("'./transactions_backup' FOR SYSTEM_TIME AS OF '1999-01-01'", "no version"),
        ("'./nowhere/' VERSION AS OF 1", "there is no Delta table"),
        ("nothing VERSION AS OF 1", "nothing has no versions"),
    ] {
        let error = fails(lake.path(), &format!("SELECT * FROM {of}"));
        assert!(error.contains(said), "{of}: {error}");
    }
}

#[test]
fn files_are_tables() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("lines/a.ndjson", "{\"n\":1}\n{\"n\":2}\n");
    write("lines/b.ndjson", "{\"n\":4}\n");
    write("lines/_SUCCESS", "");
    write("days/day=2026-01-01/a.csv", "n\n1\n");
    write("days/day=2026-01-02/a.csv", "n\n2\n");
    write("empty/x.txt", "?");
    let sum = |of: &str| {
        let text = ok(folder.path(), &["--format", "csv"], &format!("SELECT sum(n) AS n FROM {of}"));
        text.strip_prefix("n\n").unwrap().trim().parse::<u64>().unwrap()
    };
    for (of, expected) in [
        ("'./lines'", 7),
        ("'lines/'", 7),
        ("'lines/b.ndjson'", 4),
        ("'./lines/*.ndjson'", 7),
        ("'./days' WHERE day = '2026-01-02'", 2),
        ("'./days/*/*.csv'", 3),
        ("'days/day=2026-01-0[13]/*.csv'", 1),
        ("'./**/b.nd?son'", 4),
        ("'./d[!x]ys/**'", 3),
    ] {
        assert_eq!(sum(of), expected, "{of}");
    }
    let copied = ok(folder.path(), &[], "COPY (SELECT * FROM './lines') TO './copy/x.parquet'");
    assert!(copied.contains('3'), "{copied}");
    assert_eq!(sum("'./copy/*.parquet'"), 7);
    assert_eq!(sum("'./copy'"), 7);
    for (of, said) in [
        ("'./nowhere'", "there is nothing to read at ./nowhere"),
        ("'./empty'", "there is nothing to read at ./empty"),
        ("'lines/c.ndjson'", "there is nothing to read at lines/c.ndjson"),
    ] {
        let error = fails(folder.path(), &format!("SELECT * FROM {of}"));
        assert!(error.contains(said), "{of}: {error}");
    }
}

#[test]
fn objects_are_tables() {
    let (Ok(endpoint), Ok(bucket)) =
        (std::env::var("MILLSTREAM_TEST_S3"), std::env::var("MILLSTREAM_TEST_S3_BUCKET"))
    else {
        println!("skipped objects_are_tables: set MILLSTREAM_TEST_S3 and MILLSTREAM_TEST_S3_BUCKET");
        return;
    };
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
    let root = format!("s3://{bucket}/adhoc-{nanos}");
    let folder = tempfile::tempdir().unwrap();
    let ask = |sql: &str| {
        let mut command = alone(env!("CARGO_BIN_EXE_millstream"), folder.path());
        command.env("AWS_ENDPOINT_URL", &endpoint).args(["query", "--format", "csv", "-c", sql]);
        let out = command.output().unwrap();
        assert!(out.status.success(), "{sql}\n{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    for day in [1, 2, 3] {
        ask(&format!("COPY (SELECT {day} AS n) TO '{root}/day=2026-01-0{day}/a b.parquet'"));
    }
    for (of, expected) in [
        ("", 6),
        ("/", 6),
        ("/day=2026-01-02/a b.parquet", 2),
        ("/day=2026-01-0[13]/*.parquet", 4),
        ("/day=2026-01-03/*.parquet", 3),
    ] {
        assert_eq!(ask(&format!("SELECT sum(n) AS n FROM '{root}{of}'")), format!("n\n{expected}\n"), "{of}");
    }
    assert_eq!(ask(&format!("SELECT n FROM '{root}' WHERE day = '2026-01-02'")), "n\n2\n");
}

#[test]
fn explain_analyze_counts_rows() {
    let folder = tempfile::tempdir().unwrap();
    let plan = ok(folder.path(), &["--explain-analyze"], "SELECT * FROM (VALUES (1), (2), (3)) AS t (n)");
    assert!(plan.contains("output_rows=3"), "{plan}");
}

#[test]
fn a_script_has_statements_and_commands() {
    let folder = tempfile::tempdir().unwrap();
    let script =
        "SELECT 1 AS a; -- ;\n.mode csv\nSELECT ';' AS b;\n\\o out.csv\nSELECT 2 AS c;\n\\q\nnonsense";
    let said = ok(folder.path(), &[], script);
    assert!(said.contains("| a |") && said.ends_with("b\n;\n"), "{said}");
    assert_eq!(fs::read_to_string(folder.path().join("out.csv")).unwrap(), "c\n2\n");
    let error = fails(folder.path(), "SELECT 1;\nSELEC 2;\nSELECT 3");
    assert!(error.contains("Did you mean SELECT?"), "{error}");
}

/// Statement by statement on stdout, commands between them, errors with the line of the whole script.
#[test]
fn stdout_has_rows_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out =
        query(folder.path(), &["--format", "csv", "--limit", "2"], "SELECT * FROM generate_series(1, 5);\n");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "value\n1\n2\n");
    assert!(String::from_utf8_lossy(&out.stderr).contains("2 of 5 rows, 3 are left out"));
    assert_eq!(
        ok(
            folder.path(),
            &["--format", "csv"],
            "SET datafusion.execution.time_zone = '+02:00';\nSELECT 1 AS a WHERE false"
        ),
        "a\n"
    );
    let two = ok(folder.path(), &["--format", "csv", "-c", "SELECT 1 AS a; SELECT 2 AS b;"], "");
    assert_eq!(two, "a\n1\nb\n2\n");
    let error = fails(folder.path(), "SELECT 1;\n\nSELECT 1,\n  nothing FROM (VALUES (1)) AS t (n);");
    assert!(error.contains("<stdin>:4:3") && error.contains("^^^^^^^"), "{error}");
    let error = fails(folder.path(), ".mode nonsense");
    assert!(error.contains("table, csv, json and ndjson"), "{error}");
}

/// A process on a terminal that `script` makes.
struct Terminal {
    process: Child,
    keys: ChildStdin,
    shown: Receiver<Vec<u8>>,
    bytes: Vec<u8>,
    /// The same without control sequences.
    text: String,
    /// What was looked at.
    seen: usize,
}

impl Terminal {
    /// `None` without `script`.
    fn open(folder: &Path, columns: usize, arguments: &str) -> Option<Self> {
        let program = env!("CARGO_BIN_EXE_millstream");
        // Ctrl-C goes to the shell around it too, and dash would end there.
        let line = format!(
            "trap : INT; stty rows 24 cols {columns}; {program} query {arguments}; echo left; stty -a"
        );
        let mut script = alone("script", folder);
        script
            .env("TERM", "xterm")
            .env("SHELL", "/bin/sh")
            .env("HOME", folder)
            .env_remove("MILLSTREAM_HISTORY")
            .env("LAKE", "./lake");
        script.args(["-q", "-e", "-c", &line, "/dev/null"]);
        let spawned = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut process) = spawned else {
            println!("skipped: install util-linux's script");
            return None;
        };
        let (keys, mut out) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let (send, shown) = sync_channel(100);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = out.read(&mut bytes) {
                if send.send(bytes[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut terminal = Self { process, keys, shown, bytes: Vec::new(), text: String::new(), seen: 0 };
        terminal.sees("millstream> ");
        Some(terminal)
    }

    fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    fn has(&mut self, word: &str, wait: Duration) -> bool {
        let end = Instant::now() + wait;
        loop {
            if let Some(at) = self.text[self.seen..].find(word) {
                self.seen += at + word.len();
                return true;
            }
            match self.shown.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => {
                    self.bytes.extend(bytes);
                    self.text = plain(&String::from_utf8_lossy(&self.bytes));
                }
                Err(_) => return false,
            }
        }
    }

    /// Waits until there is more, with this in it.
    fn sees(&mut self, word: &str) {
        assert!(self.has(word, Duration::from_secs(60)), "{word} is not in:\n{}", &self.text[self.seen..]);
    }

    /// Types `\q`: the terminal is as it was.
    fn leaves(mut self) {
        self.types("\\q\r");
        self.sees("left");
        self.sees(" echo ");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended, unless the test fails.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Errors and Ctrl-C do not end the shell, a terminal gets the first thousand rows.
#[test]
fn the_shell_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut shell) = Terminal::open(folder.path(), 60, "") else { return };
    shell.types("SELECT 1,\rnothing;\r");
    shell.sees("2 | nothing;");
    shell.sees("^^^^^^^");
    shell.types("SELEC 1;\r");
    shell.sees("Did you mean SELECT?");
    shell.types("SELECT 40 +\r2 AS sum;\r");
    shell.sees("| 42 ");
    shell.types("SELECT * FROM generate_series(1, 1005);\r");
    shell.sees("| 1000 ");
    shell.sees("1000 of 1005 rows, 5 are left out");
    assert!(!shell.text.contains("| 1001 "), "{}", shell.text);
    // Ctrl-C while the shell is not asking for a text yet would take what is typed ahead with it.
    shell.sees("millstream> ");
    shell.types("typed and dropped");
    shell.sees("typed and dropped");
    shell.types("\x03");
    shell.sees("^C");
    for endless in [
        "SELECT sum(a.value) FROM generate_series(1, 100000) a, generate_series(1, 100000000000) b;",
        "SELECT count(*) FROM generate_series(1, 100000000000) a;",
        "SELECT count(*) FROM generate_series(1, 9000) a JOIN generate_series(1, 100000000000) b ON a.value + b.value < 0;",
    ] {
        shell.sees("millstream> ");
        shell.types(&format!("{endless}\r"));
        shell.sees(&endless[endless.len() - 4..]);
        // A key that comes before the query runs belongs to the line. One that comes after its end could end the next.
        let cancelled = (0..20).any(|_| {
            shell.types("\x03");
            shell.has("cancelled", Duration::from_secs(4))
        });
        assert!(cancelled, "{}", shell.text);
    }
    shell.sees("millstream> ");
    shell.types("SELECT 7 * 7 AS square;\r");
    shell.sees("| 49 ");
    let wide: Vec<String> = (0..12).map(|n| format!("'{n} is a rather long text' AS text_{n}")).collect();
    shell.types(&format!("SELECT {};\r", wide.join(", ")));
    shell.sees("| … |");
    shell.sees("columns left out: ");
    shell.types("exit;\r");
    let start = shell.seen;
    shell.sees("left");
    assert!(!shell.text[start..].contains("error"), "{}", shell.text);
    let rows = shell.text.split("\r\n").filter(|line| line.starts_with("| "));
    assert!(rows.clone().count() > 1000 && rows.clone().all(|row| row.chars().count() <= 60));
}

/// Tab, the history of another shell, and commands.
#[test]
fn the_shell_knows_names_and_what_was_typed() {
    let folder = crate::dev::folder();
    let sql = "sql/transactions.sql";
    let Some(mut shell) = Terminal::open(folder.path(), 120, sql) else { return };
    shell.types("\\d\r");
    for word in
        ["| user_transaction_features | view ", "| user_features_training ", "| user_features_serving "]
    {
        shell.sees(word);
    }
    shell.types("\\d user_features_tr\t\r");
    shell.sees("| total_transactions_count | BIGINT ");
    shell.types("\\d nothing_such\r");
    shell.sees("there is no nothing_such");
    shell.types("\\timing\r");
    shell.sees("timing is on");
    shell.types("sel\t'a b' as x,\r  7 as n;\r");
    shell.sees("| a b | 7 |");
    shell.sees("time: 0.");
    shell.types(".mode csv\r\\o out.csv\rselect 5 as five;\r\\o\rselect 6 as six;\r");
    shell.sees("six\r\n6\r\n");
    assert_eq!(fs::read_to_string(folder.path().join("out.csv")).unwrap(), "five\n5\n");
    // Pasted: tabs and line breaks are text.
    shell.types("\x1b[200~select 1 as p;\nselect\t2\n as q;\x1b[201~\r");
    shell.sees("p\r\n1\r\n");
    shell.sees("q\r\n2\r\n");
    shell.leaves();
    let kept = fs::read_to_string(folder.path().join(".millstream_history")).unwrap();
    assert!(kept.starts_with("\\\\d\n") && kept.contains("select 'a b' as x,\\n  7 as n;\n"), "{kept}");
    let mut shell = Terminal::open(folder.path(), 120, sql).unwrap();
    shell.types("\x12five\r");
    shell.sees("| five |");
    // Up to what was pasted, down again, and on with it.
    shell.types("\x1b[A\x1b[A\x1b[A\x1b[B\x1b[B\x7f, 9 as nine;\r");
    shell.sees("| nine |");
    shell.leaves();
}

/// `=` and IN on the key of a Redis sink read those keys; nothing is scanned.
#[test]
fn a_key_of_a_redis_sink_is_looked_up() {
    let Some(services) = crate::case::services("a_key_of_a_redis_sink_is_looked_up") else { return };
    let folder = tempfile::tempdir().unwrap();
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
    let prefix = format!("adhoc-{nanos}:");
    let sql = fs::read_to_string(format!("{ROOT}/sql/transactions.sql")).unwrap();
    fs::write(folder.path().join("p.sql"), sql.replace("prefix = 'user:'", &format!("prefix = '{prefix}'")))
        .unwrap();
    let mut redis = redis::Client::open(services.redis.as_str()).unwrap().get_connection().unwrap();
    for user in 0..50 {
        let fields = [
            ("user_id", user.to_string()),
            ("event_time", "2026-01-05T00:00:00.000Z".to_owned()),
            ("total_transactions_count", (user * 2).to_string()),
        ];
        let key = format!("{prefix}{user}");
        redis::cmd("HSET").arg(&key).arg(&fields[..]).exec(&mut redis).unwrap();
        redis::cmd("EXPIRE").arg(&key).arg(600).exec(&mut redis).unwrap();
    }
    let ask = |sql: &str, format: &str| {
        let mut command = alone(env!("CARGO_BIN_EXE_millstream"), folder.path());
        command.args(["query", "p.sql", "--format", format, "-c", sql]).env("REDIS_URL", &services.redis);
        let out = command.output().unwrap();
        assert!(out.status.success(), "{sql}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    // What the server was asked meanwhile, of these keys.
    let watched = |sql: &str| {
        let mut monitor = TcpStream::connect(services.redis.rsplit('/').next().unwrap()).unwrap();
        monitor.write_all(b"MONITOR\r\n").unwrap();
        let mut lines = BufReader::new(monitor.try_clone().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "+OK");
        let answer = ask(sql, "csv");
        let mut end = redis::Client::open(services.redis.as_str()).unwrap().get_connection().unwrap();
        let mark = format!("{prefix}end");
        redis::cmd("EXISTS").arg(&mark).exec(&mut end).unwrap();
        let asked = lines.map(Result::unwrap).take_while(|line| !line.contains(&mark));
        let asked: Vec<String> = asked.filter(|line| line.contains(&prefix)).collect();
        (answer, asked)
    };
    let from = "SELECT user_id, total_transactions_count AS n FROM user_features_serving";
    for (condition, users) in [
        ("user_id = 42", vec![42]),
        ("user_id IN (7, 3, 7, 1000)", vec![3, 7]),
        ("user_id IN (1, 2, 3, 4, 5) AND total_transactions_count > 5", vec![3, 4, 5]),
        ("user_id = 1 OR 2 = user_id", vec![1, 2]),
        ("user_id = 9 AND user_id = 8", vec![]),
    ] {
        let (answer, asked) = watched(&format!("{from} WHERE {condition} ORDER BY user_id"));
        let rows: String = users.iter().map(|user| format!("{user},{}\n", user * 2)).collect();
        assert_eq!(answer, format!("user_id,n\n{rows}"), "{condition}");
        assert!(
            asked.iter().all(|line| line.contains("\"HMGET\"")) && asked.len() <= 5,
            "{condition}: {asked:?}"
        );
        assert!(!users.is_empty() || asked.len() <= 1, "{condition}: {asked:?}");
        assert!(asked.iter().all(|line| !line.contains("amount_7d")), "{asked:?}");
    }
    let (answer, asked) = watched("SELECT count(*) AS n FROM user_features_serving WHERE user_id < 10");
    assert_eq!(answer, "n\n10\n");
    assert!(asked.iter().any(|line| line.contains("\"SCAN\"")), "{asked:?}");
    let (_, asked) = watched(&format!("EXPLAIN {from} WHERE user_id = 42"));
    assert!(asked.is_empty(), "{asked:?}");
    let plan = ask(&format!("EXPLAIN {from} WHERE user_id IN (1, 2)"), "table");
    assert!(plan.contains("RedisExec: user_features_serving, HMGET of 2 keys, 2 fields"), "{plan}");
    let plan = ask(&format!("EXPLAIN {from} LIMIT 5"), "table");
    assert!(plan.contains(&format!("SCAN of {prefix}*, 2 fields, until 5 rows")), "{plan}");
}
