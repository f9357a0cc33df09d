//! `millstream test`: the shipped fixtures pass, a wrong expectation does not, and what is no fixture is refused.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Exit code, stdout and stderr of `millstream test`.
pub fn millstream(folder: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    command.current_dir(folder).arg("test").args(arguments);
    ["KAFKA_BROKERS", "REDIS_URL", "LAKE"].iter().for_each(|name| {
        command.env_remove(name);
    });
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// Compares with tests/goldens/test/<name>; `MILLSTREAM_BLESS=1` writes it anew.
fn golden(name: &str, found: &str) {
    let path = root().join("tests/goldens/test").join(name);
    if std::env::var("MILLSTREAM_BLESS").is_ok() {
        fs::write(&path, found).unwrap();
    }
    assert_eq!(found, fs::read_to_string(&path).unwrap_or_default(), "{}", path.display());
}

#[test]
fn the_shipped_fixtures_pass() {
    // Every pipeline that is shipped has cases; schedules have no rows of their own (`tests/schedules.rs`).
    for entry in fs::read_dir(root().join("sql")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if let Some(stem) =
            name.strip_suffix(".sql").filter(|stem| !stem.ends_with("_producer") && *stem != "schedules")
        {
            assert!(path.with_file_name(format!("{stem}.test.yaml")).is_file(), "{name} has no fixture");
        }
    }
    let (code, out, progress) = millstream(root(), &["sql/", "--rounds", "12"]);
    assert_eq!((code, out.as_str()), (Some(0), ""), "{progress}");
    assert!(progress.contains("ok      sql/user_totals.test.yaml:"), "{progress}");
    let summary = progress.lines().last().unwrap();
    assert!(
        summary.contains(" cases, 0 failed (12 rounds as a stream and one batch each, seed "),
        "{summary}"
    );
}

/// Windows, UNION ALL, HAVING, UNNEST, DISTINCT, failing expressions, keys without a time, every kind of sink.
#[test]
fn every_shape_of_view_can_be_tested() {
    let (code, out, progress) =
        millstream(root(), &["tests/inputs/shapes.sql", "tests/inputs/lookups.sql", "--rounds", "12"]);
    assert_eq!((code, out.as_str()), (Some(0), ""), "{progress}");
}

#[test]
fn a_wrong_expectation_fails_with_its_difference() {
    let folder = root().join("tests/inputs");
    let (code, out, progress) = millstream(&folder, &["wrong.test.yaml", "--seed", "5", "--rounds", "2"]);
    assert_eq!(code, Some(1), "{progress}");
    golden("wrong.stdout", &out);
    golden("wrong.stderr", &progress);
    let again = ["wrong.test.yaml", "--case", "a sum is wrong", "--seed", "5", "--rounds", "1"];
    let (code, narrowed, _) = millstream(&folder, &again);
    assert_eq!(code, Some(1));
    assert!(!narrowed.is_empty() && out.starts_with(&narrowed), "{narrowed}");
}

#[test]
fn what_is_no_fixture_is_refused_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let sql = fs::read_to_string(root().join("sql/transactions.sql")).unwrap();
    fs::write(folder.path().join("p.sql"), sql).unwrap();
    let case = |body: &str| format!("cases:\n  - name: x\n{body}\n");
    let texts = [
        "cases: [",
        "",
        "cases:\n  - expect: {v: []}\n",
        "pipeline: q.sql\ncases: []\n",
        &case("    expect: {user_transaction_feature: []}"),
        &case("    expect: {user_transaction_features: []}"),
        &case("    input: {transaction: []}\n    expect: {user_transaction_features: []}"),
        &case("    input: {transactions: [{user: 1}]}\n    expect: {user_transaction_features: []}"),
        &case("    input: {transactions: []}\n    expect: {user_transaction_features: [{amount: 1}]}"),
        &case("    input: {transactions: []}\n    expect: {user_transaction_features: [{amount_7d: x}]}"),
        &case("    input: {transactions: {file: none.csv}}\n    expect: {user_transaction_features: []}"),
        &case("    input: {transactions: {csv: \"a,b\\n1\"}}\n    expect: {user_transaction_features: []}"),
        &case(
            "    input: {transactions: []}\n    expect: {user_transaction_features: {csv: \"user_id\\n1\\nx\"}}",
        ),
        &case("    partial: true\n    expect: {user_transaction_features: []}"),
    ];
    let mut all = String::new();
    for text in texts {
        fs::write(folder.path().join("p.test.yaml"), text).unwrap();
        let (code, out, said) = millstream(folder.path(), &["p.sql"]);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{text}: {said}");
        all.push_str(&format!("{said}\n"));
    }
    fs::write(folder.path().join("p.sql"), "CREATE VIEW v AS SELECT;").unwrap();
    fs::write(folder.path().join("p.test.yaml"), case("    expect: {v: []}")).unwrap();
    for arguments in [&["p.sql"][..], &["p.sql", "--case", "nothing"], &["."], &["no.sql"], &["no.txt"]] {
        let (code, out, said) = millstream(folder.path(), arguments);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}: {said}");
        all.push_str(&format!("{said}\n"));
    }
    golden("refused.stderr", &all);
}
