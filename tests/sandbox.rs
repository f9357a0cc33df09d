//! `--sandbox`: what SQL may name, for every command; and who may look into a state. No service is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SOURCE: &str = "CREATE SOURCE t (id BIGINT NOT NULL, at BIGINT, event_time TIMESTAMP AS (to_timestamp_millis(at)),
    WATERMARK FOR event_time AS event_time) WITH (connector = 'files', path = './box/in/*.json', format = 'json');
CREATE TABLE names (id BIGINT, name VARCHAR) WITH (connector = 'csv', location = './box/names.csv');
CREATE SINK kept AS SELECT t.id, event_time, name FROM t JOIN names ON t.id = names.id
WITH (connector = 'delta', location = './box/lake/kept');
";
const STATE: &str = "./box/state";

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("box/in")).unwrap();
    fs::write(folder.path().join("box/in/1.json"), "{\"id\": 1, \"at\": 1767571200000}\n").unwrap();
    fs::write(folder.path().join("box/names.csv"), "id,name\n1,one\n").unwrap();
    fs::write(folder.path().join("outside.csv"), "id,name\n1,hush\n").unwrap();
    folder
}

fn run(folder: &Path, arguments: &[&str], sql: &str) -> Output {
    fs::write(folder.join("p.sql"), sql).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    command.args(arguments).args(["p.sql", "--sandbox", "./box"]).current_dir(folder).output().unwrap()
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

#[test]
fn sql_stays_inside_the_sandbox() {
    let folder = folder();
    let commands: [&[&str]; 5] = [
        &["check"],
        &["explain"],
        &["plan", "--state", STATE],
        &["run", "--until-end", "--plain", "--state", STATE],
        &["query", "-c", "SELECT name FROM kept"],
    ];
    for command in commands {
        let out = run(folder.path(), command, SOURCE);
        assert!(out.status.success(), "{command:?}: {}", said(&out));
    }
    // Each with the place of what it names.
    let named = |option: &str| format!("{SOURCE}CREATE SINK x FROM t WITH (connector = {option});");
    let outside = [
        (SOURCE.replace("'./box/in/*.json'", "'./in/*.json'"), "p.sql:2:"),
        (SOURCE.replace("./box/names.csv", "./box/../outside.csv"), "p.sql:3:"),
        (named("'ndjson', location = '/tmp/x'"), "p.sql:6:"),
        (named("'delta', location = 's3://bucket/x'"), "p.sql:6:"),
        (
            named("'redis', url = 'redis://h', key = 'id', password = secret('file:./outside.csv')"),
            "p.sql:6:",
        ),
        (named("'redis', url = 'rediss://h', key = 'id', tls_ca = '/etc/ssl/x.pem'"), "p.sql:6:"),
        (
            named(
                "'kafka', bootstrap_servers = 'h', topic = 'x', format = 'json', kafka.security.protocol = 'SSL', kafka.ssl.ca.location = '/etc/ssl/x.pem'",
            ),
            "p.sql:6:",
        ),
    ];
    for (sql, place) in &outside {
        for command in
            [&["check"][..], &["run", "--until-end", "--state", STATE], &["query", "-c", "SELECT 1"]]
        {
            let out = run(folder.path(), command, sql);
            let said = said(&out);
            assert_eq!(out.status.code(), Some(2), "{command:?} {said}");
            assert!(
                said.contains("lies outside the sandbox ./box") && said.contains(place),
                "{place}: {said}"
            );
        }
    }
    let program = named(
        "'kafka', bootstrap_servers = 'h', topic = 'x', format = 'json', kafka.plugin.library.paths = 'x.so'",
    );
    assert!(said(&run(folder.path(), &["check"], &program)).contains("cannot be set inside a sandbox"));
    // The state too, given or not.
    for state in [&["--state", "./elsewhere"][..], &[]] {
        for command in
            [&["run"][..], &["plan"], &["dev"]].into_iter().take(if state.is_empty() { 3 } else { 2 })
        {
            let out = run(folder.path(), &[command, state].concat(), SOURCE);
            assert_eq!(out.status.code(), Some(2));
            assert!(said(&out).contains("--state: ./") && said(&out).contains("outside"), "{}", said(&out));
        }
    }
    assert!(!folder.path().join("elsewhere").exists() && !folder.path().join(".millstream").exists());
}

#[test]
fn a_query_reads_inside_the_sandbox_only() {
    let folder = folder();
    let ask = |sql: &str| run(folder.path(), &["query", "-c", sql], SOURCE);
    for inside in [
        "SELECT * FROM './box/names.csv'",
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a",
        "SHOW SINKS",
        "SELECT table_name FROM information_schema.tables",
        "EXPLAIN SELECT * FROM './box/names.csv'",
    ] {
        let out = ask(inside);
        assert!(out.status.success(), "{inside}: {}", said(&out));
    }
    let absolute = folder.path().join("outside.csv").display().to_string();
    #[cfg(unix)]
    std::os::unix::fs::symlink(&absolute, folder.path().join("box/link.csv")).unwrap();
    for from in [
        "'./outside.csv'",
        "'./box/../outside.csv'",
        "'./box/link.csv'",
        "'./box/*.csv'",
        &format!("'{absolute}'"),
        &format!("'file://{absolute}'"),
        &format!("'file:{absolute}'"),
        &format!("public.\"{absolute}\""),
        "'s3://bucket/x.csv'",
        "(SELECT * FROM './outside.csv')",
        "\"./outside.csv\"",
    ] {
        let out = ask(&format!("SELECT * FROM {from}"));
        assert_eq!(out.status.code(), Some(2), "{from}: {}", said(&out));
        assert!(!said(&out).contains("hush"), "{from}: {}", said(&out));
    }
    for writes in [
        "COPY (SELECT 1) TO './box/x.csv'",
        "COPY (SELECT 1) TO './x.csv'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO './x.csv'",
        "CREATE EXTERNAL TABLE e STORED AS CSV LOCATION './outside.csv'",
        "INSERT INTO './box/names.csv' VALUES (2, 'two')",
    ] {
        let out = ask(writes);
        assert_eq!(out.status.code(), Some(2), "{writes}: {}", said(&out));
    }
    assert!(!folder.path().join("x.csv").exists() && !folder.path().join("box/x.csv").exists());
}

#[test]
fn fixtures_stay_inside_the_sandbox() {
    let folder = folder();
    fs::write(folder.path().join("box/p.sql"), SOURCE).unwrap();
    let case = |rows: &str| {
        format!("cases:\n  - name: a\n    input: {{t: {{file: {rows}}}}}\n    expect: {{kept: []}}\n")
    };
    let test = |rows: &str| {
        fs::write(folder.path().join("box/p.test.yaml"), case(rows)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        command.args(["test", "--rounds", "1", "box", "--sandbox", "./box"]).current_dir(folder.path());
        let out = command.output().unwrap();
        (out.status.code(), said(&out))
    };
    let (code, said) = test("../outside.csv");
    assert!(
        code == Some(2) && said.contains("outside the sandbox") && said.contains("p.test.yaml:3:"),
        "{said}"
    );
    assert!(!test("names.csv").1.contains("outside the sandbox"));
}

#[test]
fn credentials_in_a_location_are_refused_and_never_printed() {
    let folder = folder();
    let sql = SOURCE.replace("./box/lake/kept", "s3://AKIAHUSH:hushhush@bucket/kept");
    for command in [&["check"][..], &["explain"], &["plan"], &["run"], &["query", "-c", "SELECT 1"]] {
        fs::write(folder.path().join("p.sql"), &sql).unwrap();
        let mut program = Command::new(env!("CARGO_BIN_EXE_millstream"));
        let out = program
            .args(command)
            .arg("p.sql")
            .current_dir(folder.path())
            .env("MILLSTREAM_LOG", "trace")
            .output();
        let out = out.unwrap();
        assert_eq!(out.status.code(), Some(2), "{command:?}");
        let said = said(&out);
        assert!(
            said.contains("credentials") && said.contains("p.sql:5:") && !said.contains("hush"),
            "{said}"
        );
    }
}

#[cfg(unix)]
#[test]
fn nobody_else_looks_into_a_state() {
    use std::os::unix::fs::PermissionsExt;
    let folder = folder();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    // It was there before, open to all.
    fs::create_dir_all(folder.path().join("box/state")).unwrap();
    fs::set_permissions(folder.path().join("box/state"), fs::Permissions::from_mode(0o755)).unwrap();
    let out = run(folder.path(), &["run", "--until-end", "--plain", "--state", STATE], SOURCE);
    assert!(out.status.success(), "{}", said(&out));
    assert_eq!(mode(folder.path().join("box/state")), 0o700);
    assert!(folder.path().join("box/state/manifest").is_dir());
}
