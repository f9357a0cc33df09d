//! `millstream status`, `checkpoints` and `reset` over states of real runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::case::{Case, Dice, services};
use crate::online::wait_for;
use crate::state_format::{finished, folder, lines, millstream, parts};

const RUN: [&str; 6] = ["run", "--name", "v1", "--state", "./state", "--until-end"];

fn output(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    command.args(arguments).current_dir(folder).output().unwrap()
}

/// Exit code, stdout, stderr.
fn said(out: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

fn by_id<'a>(status: &'a Value, list: &str, id: &str) -> &'a Value {
    let found = status[list].as_array().unwrap().iter().find(|node| node["id"] == id);
    found.unwrap_or_else(|| panic!("{id} is not in {status:#}"))
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    found
}

#[test]
fn status_says_what_became_of_every_row_and_writes_nothing() {
    let folder = folder(true);
    let folder = folder.path();
    let status = |more: &[&str]| {
        said(&output(
            folder,
            &[&["status", "--name", "v1", "--state", "./state", "pipeline.sql"], more].concat(),
        ))
    };
    let (code, _, complaint) = status(&[]);
    assert_eq!(code, Some(1), "{complaint}");
    assert!(complaint.contains("never ran") && !folder.join("state").exists(), "{complaint}");

    millstream(folder, &[&RUN[..], &["pipeline.sql"]].concat());
    let before = files(folder);
    let (code, json, complaint) = status(&["--format", "json", "--max-dead-letters", "1", "--max-lag", "0"]);
    assert_eq!((code, complaint.as_str()), (Some(0), ""), "{json}");
    let found: Value = serde_json::from_str(&json).unwrap();
    let source = &found["sources"][0];
    assert_eq!(
        (&source["read"], &source["accepted"], &source["dead_letters"]),
        (&401.into(), &400.into(), &1.into())
    );
    assert_eq!(
        (&found["run"], &found["healthy"], &source["lag"]),
        (&"stopped".into(), &true.into(), &0.into())
    );
    assert_eq!(found["dead_letters"]["payments"]["wrong_type"], 1);
    let backup = by_id(&found, "sinks", "payments_backup");
    assert_eq!((&backup["accounts"]["written"], &backup["prepared_rows"]), (&400.into(), &400.into()));
    let late = source["late"].as_u64().unwrap();
    let over =
        found["operators"].as_array().unwrap().iter().find(|n| n["accounts"]["role"] == "over").unwrap();
    let (settled, held) = (&over["accounts"]["settled"], &over["accounts"]["held"]);
    let finals = lines(&folder.join("out/features")).len() as u64;
    assert!(
        late > 0 && settled.as_u64() == Some(finals) && held.as_u64() == Some(400 - late - finals),
        "{over:#}"
    );
    // WHERE amount > -900, counted by hand over the input that was accepted.
    let amounts = lines(&folder.join("input"));
    let amount = |line: &String| serde_json::from_str::<Value>(line).ok()?["amount"].as_i64();
    let kept = amounts.iter().filter_map(amount).filter(|amount| *amount > -900).count() as u64;
    let view = found["views"].as_array().unwrap().iter().find(|view| view["view"] == "totals").unwrap();
    let counts = ["rows_in", "applied", "filtered"].map(|name| view[name].as_u64().unwrap());
    assert_eq!(counts, [400, kept, 400 - kept]);
    assert!(kept < 400);

    for (format, words) in
        [("table", ["payments_backup", "wrong_type"]), ("markdown", ["| payments_backup |", "## Sinks"])]
    {
        let (code, text, _) = status(&["--format", format]);
        assert!(code == Some(0) && words.iter().all(|word| text.contains(word)), "{text}");
    }
    let (code, _, complaint) = status(&["--max-dead-letters", "0"]);
    assert_eq!((code, complaint.as_str()), (Some(1), "unhealthy: 1 dead letters are more than 0\n"));
    assert!(before == files(folder), "status wrote something");

    // A manifest whose numbers were changed.
    let newest = fs::read_dir(folder.join("state/manifest"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max()
        .unwrap();
    let text = fs::read_to_string(&newest).unwrap().replacen("\"accepted\":400", "\"accepted\":399", 1);
    fs::write(&newest, text).unwrap();
    let (code, _, complaint) = status(&[]);
    assert!(
        code == Some(1) && complaint.contains("the accounts of payments do not add up: read 401"),
        "{complaint}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_add_up_over_kills_and_lag_is_known() {
    let Some(services) = services("accounts_add_up_over_kills_and_lag_is_known") else { return };
    let mut case = Case::new(services, "accounts", None).await;
    let status = |case: &Case, more: &[&str]| {
        let arguments =
            [&["status", "--state", &case.state, "--name", &case.name, "--format", "json"], more].concat();
        let (code, json, complaint) = said(&case.command(&arguments).output().unwrap());
        (code, serde_json::from_str::<Value>(&json).unwrap(), complaint)
    };
    let mut dice = Dice(u64::from(std::process::id()));
    println!("seed {}", std::process::id());
    for round in 0..4 {
        case.produce(3_000).await;
        case.send_raw(&[Some("not json"), None]).await;
        let parallelism = ["1", "2", "3"][round % 3];
        let mut process = case.start(&["--parallelism", parallelism, "--checkpoint", "100ms"]);
        tokio::time::sleep(Duration::from_millis(400 + dice.roll(1_200))).await;
        process.kill().unwrap();
        process.wait().unwrap();
        let (_, found, complaint) = status(&case, &[]);
        assert!(!complaint.contains("add up"), "{complaint}{found:#}");
    }
    wait_for("a checkpoint that is a second old", || {
        let (code, _, complaint) = status(&case, &["--max-age", "1s"]);
        code == Some(1) && complaint.contains("gone or stuck")
    });
    let out = case.run(&["--until-end", "--parallelism", "2"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    case.produce(500).await;
    let (code, found, complaint) = status(&case, &["--max-age", "1ms", "--max-lag", "500"]);
    assert_eq!(code, Some(0), "stopped: {complaint}");
    assert_eq!(found["sources"][0]["lag"], 500);
    let (code, _, complaint) = status(&case, &["--max-lag", "499"]);
    assert!(
        code == Some(1) && complaint.contains("lag of transactions is 500, more than 499"),
        "{complaint}"
    );
    let (kafka, nobody) = (case.services.kafka.clone(), "127.0.0.1:9".to_owned());
    case.services.kafka = nobody;
    let (code, found, complaint) = status(&case, &[]);
    assert_eq!((code, &found["sources"][0]["lag"]), (Some(0), &Value::Null), "{complaint}");
    assert!(
        found["sources"][0]["lag_unknown"].as_str().unwrap().contains("no answer within 2 s"),
        "{found:#}"
    );
    case.services.kafka = kafka;

    case.finish("3");
    let (code, found, complaint) = status(&case, &["--max-lag", "0"]);
    assert_eq!((code, found["run"].as_str()), (Some(0), Some("closed")), "{complaint}");
    let source = &found["sources"][0];
    let numbers =
        ["read", "accepted", "tombstones", "dead_letters"].map(|name| source[name].as_u64().unwrap());
    assert_eq!(numbers, [case.produced + 8, case.produced, 4, 4]);
    for sink in ["transactions_backup", "user_features_training"] {
        let table = case.query(&format!("SELECT count(*) AS n FROM {sink}"));
        let written = by_id(&found, "sinks", sink)["accounts"]["written"].as_u64().unwrap();
        assert_eq!(table, format!("n\n{written}\n"), "{sink}");
    }
}

/// Goes on from a copy of a checkpoint.
#[rustfmt::skip]
const COPIED: [&str; 10] = [
    "run", "--name", "copy", "--state", "./copy", "--until-end", "--close", "--parallelism", "3", "copy.sql",
];

#[test]
fn checkpoints_are_listed_and_copied_but_never_put_back() {
    let folder = folder(true);
    let folder = folder.path();
    let kept = parts(folder, &["2.ndjson", "3.ndjson"]);
    millstream(folder, &[&RUN[..], &["pipeline.sql"]].concat());
    let state = ["--name", "v1", "--state", "./state"];
    let ls =
        |format: &str| millstream(folder, &[&["checkpoints", "ls", "--format", format], &state[..]].concat());
    let listed: Value = serde_json::from_str(&ls("json")).unwrap();
    let newest = listed.as_array().unwrap().last().unwrap().clone();
    assert_eq!((&newest["kind"], &newest["whole"]), (&"data".into(), &true.into()));
    assert!(newest["files"].as_u64().unwrap() > 3 && newest["bytes"].as_u64().unwrap() > 1_000, "{newest}");
    assert_eq!(ls("table").lines().count(), 1 + listed.as_array().unwrap().len());
    let epoch = newest["epoch"].to_string();

    let restore = |epoch: &str, more: &[&str]| {
        said(&output(
            folder,
            &[&["checkpoints", "restore", epoch, "pipeline.sql"], &state[..], more].concat(),
        ))
    };
    let into = |name: &'static str| ["--into-state", "./copy", "--into-name", name];
    for (epoch, more, word) in [
        (epoch.as_str(), &[][..], "--into-state"),
        (&epoch, &into("v1"), "another name"),
        ("1", &into("copy"), "start of a process"),
        ("99", &into("copy"), "checkpoints ls"),
    ] {
        let (code, _, complaint) = restore(epoch, more);
        assert!(code == Some(2) && complaint.contains(word), "{complaint}");
    }
    let first: Vec<Vec<String>> = ["out/features", "out/minutes"].map(|out| lines(&folder.join(out))).into();
    let (code, _, complaint) = restore(&epoch, &into("copy"));
    assert_eq!(code, Some(0), "{complaint}");
    let (code, _, complaint) = restore(&epoch, &into("copy"));
    assert!(code == Some(2) && complaint.contains("already"), "{complaint}");

    // The original goes on to its end.
    kept.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
    let original = finished(folder, "2");
    // The copy must write elsewhere, and comes to the same.
    let sql = fs::read_to_string(folder.join("pipeline.sql")).unwrap();
    for (changed, word) in [
        (sql.clone(), "belongs to another state"),
        (sql.replace("./lake", "./lake2"), "of which this is a copy"),
    ] {
        fs::write(folder.join("copy.sql"), changed).unwrap();
        let (code, _, complaint) = said(&output(folder, &COPIED));
        assert!(code == Some(2) && complaint.contains(word), "{complaint}");
    }
    fs::write(folder.join("copy.sql"), sql.replace("./lake", "./lake2").replace("./out", "./out2")).unwrap();
    millstream(folder, &COPIED);
    for (at, out) in ["out2/features", "out2/minutes"].into_iter().enumerate() {
        let mut all = [first[at].clone(), lines(&folder.join(out))].concat();
        all.sort();
        assert_eq!(all, original[3 + at], "{out}");
    }
    let query =
        ["query", "--state", "./copy", "--format", "csv", "-c", "SELECT * FROM features_newest", "copy.sql"];
    let mut newest: Vec<String> = millstream(folder, &query).lines().map(str::to_owned).collect();
    newest.sort();
    assert_eq!(newest, original[1]);
    assert!(
        millstream(folder, &["status", "--name", "copy", "--state", "./copy", "copy.sql"]).contains("closed")
    );
}

#[test]
fn reset_begins_anew_and_needs_yes() {
    let folder = folder(true);
    let folder = folder.path();
    millstream(folder, &[&RUN[..], &["pipeline.sql"]].concat());
    let reset = |more: &[&str]| {
        said(&output(
            folder,
            &[&["reset", "--name", "v1", "--state", "./state", "pipeline.sql"], more].concat(),
        ))
    };
    let before = files(folder);
    let (code, _, complaint) = reset(&[]);
    assert!(
        code == Some(2) && complaint.contains("would delete") && complaint.contains("--yes"),
        "{complaint}"
    );
    assert!(
        complaint.contains("payments_backup: the table ./lake/payments belongs to the old state"),
        "{complaint}"
    );
    assert!(before == files(folder), "reset without --yes did something");
    let other =
        said(&output(folder, &["reset", "--name", "v2", "--state", "./state", "--yes", "pipeline.sql"]));
    assert!(other.0 == Some(2) && other.2.contains("belongs to pipeline v1"), "{}", other.2);

    let (code, _, complaint) = reset(&["--yes"]);
    assert_eq!(code, Some(0), "{complaint}");
    assert_eq!(files(&folder.join("state")).len(), 1);
    let (code, _, complaint) = said(&output(folder, &["status", "--name", "v1", "--state", "./state"]));
    assert!(code == Some(1) && complaint.contains("no checkpoint was ever taken"), "{complaint}");
    let (code, _, complaint) = said(&output(folder, &[&RUN[..], &["pipeline.sql"]].concat()));
    assert!(code == Some(2) && complaint.contains("belongs to another state"), "{complaint}");
    fs::remove_dir_all(folder.join("lake")).unwrap();
    let fresh = self::folder(true);
    assert_eq!(finished(folder, "3"), finished(fresh.path(), "2"));
}

/// A process that runs while its state is reset writes no manifest any more.
#[test]
fn reset_fences_a_running_process() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let sql = "CREATE SOURCE ticks (seq BIGINT, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)
        WITH (connector = 'generator', rows_per_second = 1000);
        CREATE VIEW counts AS SELECT seq % 7 AS k, count(*) AS n FROM ticks GROUP BY seq % 7;
        CREATE SINK s FROM counts WITH (connector = 'memory', key = 'k');";
    fs::write(folder.join("p.sql"), sql).unwrap();
    let arguments = ["run", "--state", "./state", "--checkpoint", "50ms", "p.sql"];
    let running = Command::new(env!("CARGO_BIN_EXE_millstream"))
        .args(arguments)
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = ["status", "--name", "p", "--state", "./state"];
    wait_for("a checkpoint", || output(folder, &status).status.success());
    let (code, _, complaint) = said(&output(folder, &["reset", "--state", "./state", "--yes", "p.sql"]));
    assert_eq!(code, Some(0), "{complaint}");
    let (code, _, complaint) = said(&running.wait_with_output().unwrap());
    assert!(code == Some(3) && complaint.contains("newer process owns pipeline p"), "{complaint}");
    let left: Vec<PathBuf> = files(&folder.join("state/manifest")).into_keys().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}
