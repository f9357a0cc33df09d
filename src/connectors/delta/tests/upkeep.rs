//! Compaction and vacuum beside commits, other writers and older processes.

use std::process::Command;

use deltalake_core::DeltaTable;
use deltalake_core::table::config::TablePropertiesExt;

use super::*;
use crate::connectors::delta::store::table;
use crate::connectors::delta::upsert::Stager;
use crate::connectors::delta::{Compacted, Upkeep};
use crate::error::{Domain, Error};

/// Merges everything at once and keeps nothing.
const EAGER: [(&str, &str); 2] = [("compact_interval", "0 seconds"), ("vacuum_retention", "0 seconds")];

fn eager(folder: &tempfile::TempDir, more: &[(&str, &str)]) -> DeltaConfig {
    let location = folder.path().join("t").to_string_lossy().into_owned();
    config_at(&location, &[&EAGER[..], more].concat())
}

fn upkeep(config: &DeltaConfig, generation: u64) -> Upkeep {
    Upkeep::new(config, "p", &["s".to_owned()], "x".to_owned(), generation).unwrap()
}

async fn fine() -> crate::error::Result<()> {
    Ok(())
}

async fn vacuum(upkeep: &Upkeep) -> Vec<String> {
    let files = upkeep.expired_files().await.unwrap();
    upkeep.delete_files(&files).await.unwrap();
    files
}

fn of(generation: u64) -> CommitProgress {
    CommitProgress { generation: Some(generation), ..CommitProgress::default() }
}

async fn loaded(config: &DeltaConfig) -> DeltaTable {
    let mut table = table(&config.location).unwrap();
    table.load().await.unwrap();
    table
}

async fn files(config: &DeltaConfig) -> usize {
    loaded(config).await.snapshot().unwrap().log_data().num_files()
}

/// Data files in the table's folder.
fn stored(folder: &tempfile::TempDir) -> usize {
    let mut folders = vec![folder.path().join("t")];
    let mut found = 0;
    while let Some(path) = folders.pop() {
        for entry in std::fs::read_dir(path).unwrap().map(Result::unwrap) {
            let name = entry.file_name().to_string_lossy().into_owned();
            match entry.file_type().unwrap().is_dir() {
                true if name != "_delta_log" => folders.push(entry.path()),
                true => {}
                false => found += usize::from(name.ends_with(".parquet")),
            }
        }
    }
    found
}

/// Partitions with NULLs and with values that paths do not like, 20 epochs of them.
async fn filled(config: &DeltaConfig) -> DeltaCommitter {
    let mut committer = created(config).await;
    for epoch in 1..=20u64 {
        let start = epoch as i64 * 50;
        let files = prepared(config, epoch, start..start + 50).await;
        committer.commit(epoch, &files, &of(1)).await.unwrap();
    }
    committer
}

const ALL: &str = "SELECT id, t, c FROM t ORDER BY id";

#[tokio::test]
async fn compaction_and_vacuum_change_no_row() {
    for partition_by in ["c", "year(t),c", "day(t)"] {
        let folder = tempfile::tempdir().unwrap();
        let config = eager(&folder, &[("partition_by", partition_by)]);
        let mut committer = filled(&config).await;
        let (before, rows) = (files(&config).await, read(&config, ALL).await);
        let upkeep = upkeep(&config, 1);
        let done = upkeep.compact(fine).await.unwrap();
        assert!(done.removed > done.added && done.added > 0 && done.dropped == 0, "{partition_by}: {done:?}");
        assert_eq!(files(&config).await, before - done.removed + done.added);
        assert_eq!(text(&read(&config, ALL).await), text(&rows), "{partition_by}");
        assert_eq!(upkeep.compact(fine).await.unwrap(), Compacted::default(), "there is nothing left to do");
        // The committer finds it in its way and goes on behind it.
        let prepared_files = prepared(&config, 21, 2000..2050).await;
        let stored_before = stored(&folder);
        let gone = vacuum(&upkeep).await;
        assert_eq!(gone.len(), done.removed, "{gone:?}");
        assert_eq!(stored(&folder), stored_before - gone.len());
        committer.commit(21, &prepared_files, &of(1)).await.unwrap();
        assert_eq!(committer.commit(21, &prepared_files, &of(1)).await.unwrap(), Committed::AlreadyDone);
        assert_eq!(count(&config).await, 1050);
        let again = read(&config, "SELECT id, t, c FROM t WHERE id < 2000 ORDER BY id").await;
        assert_eq!(text(&again), text(&rows));
        // What readers skip by must hold for merged files too.
        let session = session(&config).await;
        for (filter, least) in [("id = 777", 1), ("c = 'a/b ü%2F1' AND id < 100", 1), ("c IS NULL", 250)] {
            let sql = format!("SELECT count(*) FROM t WHERE {filter}");
            assert!(number(&session.sql(&sql).await.unwrap().collect().await.unwrap()) >= least, "{filter}");
        }
        upkeep.checkpoint().await.unwrap();
        assert_eq!(count(&config).await, 1050);
    }
}

#[tokio::test]
async fn nan_stays_visible_in_merged_files() {
    let folder = tempfile::tempdir().unwrap();
    let config = eager(&folder, &[]);
    let schema = Arc::new(Schema::new(vec![Field::new("x", DataType::Float64, true)]));
    let (mut committer, _) = DeltaCommitter::open(&config, &schema, "p", "s").await.unwrap();
    committer.create("x").await.unwrap();
    for epoch in 1..=8u64 {
        let mut writer = DeltaWriter::new(config.clone(), &schema, "g00000001-s0".to_owned()).unwrap();
        let values = arrow::array::Float64Array::from(vec![Some(1.0), Some(f64::NAN), None]);
        writer.write(&RecordBatch::try_new(schema.clone(), vec![Arc::new(values)]).unwrap()).unwrap();
        let files = writer.prepare(epoch).unwrap().await.unwrap();
        committer.commit(epoch, &files, &of(1)).await.unwrap();
    }
    assert_eq!(upkeep(&config, 1).compact(fine).await.unwrap().added, 1);
    assert_eq!(number(&read(&config, "SELECT count(*) FROM t WHERE x > 5").await), 8);
}

#[tokio::test]
async fn vacuum_leaves_prepared_files_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = eager(&folder, &[("partition_by", "c")]);
    let mut committer = filled(&config).await;
    // Three manifests ahead, and one of a process that was overtaken: none is in the log yet.
    let mut ahead = Vec::new();
    for epoch in 21..=23u64 {
        let start = epoch as i64 * 50;
        ahead.push(prepared(&config, epoch, start..start + 50).await);
    }
    let left = prepared(&config, 20, 0..50).await;
    let upkeep = upkeep(&config, 1);
    let gone = vacuum(&upkeep).await;
    let expected: Vec<&String> = left.iter().map(|file| &file.path).collect();
    assert!(gone.len() == expected.len() && expected.iter().all(|path| gone.contains(path)), "{gone:?}");
    for (at, files) in ahead.iter().enumerate() {
        assert!(committer.missing_files(files).await.unwrap().is_empty());
        assert!(matches!(committer.commit(21 + at as u64, files, &of(1)).await, Ok(Committed::Version(_))));
        assert!(vacuum(&upkeep).await.is_empty());
    }
    assert_eq!(count(&config).await, 23 * 50);
    // A longer retention is a property of the table, so that checkpoints keep tombstones as long.
    let other = tempfile::tempdir().unwrap();
    let long = config_at(&other.path().to_string_lossy(), &[("vacuum_retention", "30 days")]);
    created(&long).await;
    let remembered = loaded(&long).await.snapshot().unwrap().table_config().deleted_file_retention_duration();
    assert_eq!(remembered.as_secs(), 30 * 24 * 3600);
    let patient = config_at(&config.location, &[("vacuum_retention", "1 hour"), ("compact_interval", "0 s")]);
    let upkeep = Upkeep::new(&patient, "p", &["s".to_owned()], "x".to_owned(), 1).unwrap();
    upkeep.compact(fine).await.unwrap();
    assert!(vacuum(&upkeep).await.is_empty(), "nothing is an hour old");
}

#[tokio::test]
async fn an_older_process_neither_merges_nor_deletes() {
    let folder = tempfile::tempdir().unwrap();
    let config = eager(&folder, &[]);
    let mut committer = filled(&config).await;
    let older = upkeep(&config, 1);
    // It is overtaken after it has read the table and written its file, right before its commit.
    let taken_over = async || {
        let files = prepared(&config, 21, 2000..2050).await;
        let mut newer = reopened(&config).await;
        newer.commit(21, &files, &of(2)).await.map(|_| ())
    };
    let error = older.compact(taken_over).await.unwrap_err();
    assert_eq!(error.domain(), Domain::Fenced, "{error}");
    assert_eq!(files(&config).await, 21, "it must not have merged anything");
    assert_eq!(older.compact(fine).await.unwrap_err().domain(), Domain::Fenced);
    assert_eq!(older.expired_files().await.unwrap_err().domain(), Domain::Fenced);
    // Told by the manifests: its file is deleted again.
    let stored_before = stored(&folder);
    let newer = upkeep(&config, 2);
    let refused = async || Err(Error::fenced("a newer process owns the pipeline"));
    assert_eq!(newer.compact(refused).await.unwrap_err().domain(), Domain::Fenced);
    assert_eq!(stored(&folder), stored_before);
    // What it left behind goes once the log carries the newer generation.
    let left = folder.path().join("t/compacted-g00000001-left.snappy.parquet");
    std::fs::write(&left, "x").unwrap();
    let own = folder.path().join("t/compacted-g00000002-open.snappy.parquet");
    std::fs::write(&own, "x").unwrap();
    assert_eq!(vacuum(&newer).await, ["compacted-g00000001-left.snappy.parquet"]);
    assert!(own.exists());
    let files = prepared(&config, 22, 3000..3050).await;
    committer.commit(22, &files, &of(2)).await.unwrap();
    assert_eq!(count(&config).await, 22 * 50);
}

#[tokio::test]
async fn a_compaction_gives_way_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let config = eager(&folder, &[]);
    let mut committer = filled(&config).await;
    let upkeep = upkeep(&config, 1);
    let stored_before = stored(&folder);
    let rows = read(&config, ALL).await;
    let optimized = async || {
        loaded(&config).await.optimize().await.unwrap();
        Ok(())
    };
    let done = upkeep.compact(optimized).await.unwrap();
    assert_eq!(done, Compacted { dropped: 1, ..Compacted::default() });
    assert_eq!(stored(&folder), stored_before + 1, "only the file of the other OPTIMIZE was added");
    assert_eq!(text(&read(&config, ALL).await), text(&rows));
    // An append in between does not touch it.
    for epoch in 21..=28u64 {
        let start = epoch as i64 * 50;
        let files = prepared(&config, epoch, start..start + 50).await;
        committer.commit(epoch, &files, &of(1)).await.unwrap();
    }
    let files_before = files(&config).await;
    let appended = async || {
        let files = prepared(&config, 29, 1450..1500).await;
        reopened(&config).await.commit(29, &files, &of(1)).await.map(|_| ())
    };
    let done = upkeep.compact(appended).await.unwrap();
    assert_eq!((done.removed, done.added, done.dropped), (files_before, 1, 0));
    assert_eq!(files(&config).await, 2, "the merged one and the new one");
    assert_eq!(count(&config).await, 29 * 50);
}

/// MERGEs of one committer and compactions of another task, at the same time: no change is lost.
#[tokio::test(flavor = "multi_thread")]
async fn merges_and_compactions_at_the_same_time() {
    let folder = tempfile::tempdir().unwrap();
    let config = eager(&folder, &[("mode", "upsert"), ("key", "id")]);
    let mut committer = created(&config).await;
    let stager = Stager::new(&config, &schema(), "g00000001-s0".to_owned()).unwrap();
    let upkeep = upkeep(&config, 1);
    let changes = async {
        for epoch in 1..=25u64 {
            // New keys in a file of their own; sometimes also keys of many files.
            let start = epoch as i64 * 20;
            let first = if epoch % 5 == 0 { start - 60 } else { start };
            let staged = stager.stage(epoch, &rows(first..start + 20), None).await.unwrap();
            committer.commit(epoch, &staged, &of(1)).await.unwrap();
        }
    };
    let mut removed = 0;
    let compactions = async {
        loop {
            removed += upkeep.compact(fine).await.unwrap().removed;
            tokio::task::yield_now().await;
        }
    };
    tokio::select! { () = changes => {} () = compactions => {} }
    assert!(removed > 0, "no compaction came through");
    // One that a MERGE overtakes gives way.
    let overtaken = async || {
        let staged = stager.stage(26, &rows(20..560), None).await.unwrap();
        reopened(&config).await.commit(26, &staged, &of(1)).await.map(|_| ())
    };
    let staged = stager.stage(100, &rows(520..540), None).await.unwrap();
    let more = DeltaCommitter::open(&config, &schema(), "p", "other")
        .await
        .unwrap()
        .0
        .commit(1, &staged, &of(1))
        .await;
    assert!(matches!(more, Ok(Committed::Version(_))), "{more:?}");
    let done = upkeep.compact(overtaken).await.unwrap();
    assert_eq!((done.removed, done.dropped), (0, 1));
    let session = session(&config).await;
    session.register_batch("o", rows(20..560)).unwrap();
    let sql = "SELECT id, t, c FROM {} ORDER BY id";
    let oracle = session.sql(&sql.replace("{}", "o")).await.unwrap().collect().await.unwrap();
    assert_eq!(text(&read(&config, ALL).await), text(&oracle));
}

const OPTIMIZE: &str = r#"
import sys
from deltalake import DeltaTable
table = DeltaTable(sys.argv[1])
print(table.optimize.compact())
table = DeltaTable(sys.argv[1])
print(table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False, full=len(sys.argv) > 2))
"#;

fn python(python: &str, config: &DeltaConfig, more: &[&str]) {
    let run = Command::new(python).args(["-c", OPTIMIZE, &config.location]).args(more).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{out}{err}");
}

#[tokio::test]
async fn optimize_and_vacuum_of_the_python_package_are_survived() {
    let Some(program) = service("MILLSTREAM_TEST_PYTHON", "a Python that has the package deltalake") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let config = eager(&folder, &[("partition_by", "c")]);
    let mut committer = filled(&config).await;
    let upkeep = upkeep(&config, 1);
    for round in 0..3u64 {
        for epoch in [21 + 2 * round, 22 + 2 * round] {
            let start = epoch as i64 * 50;
            let files = prepared(&config, epoch, start..start + 50).await;
            // Its vacuum without listing knows nothing of our files.
            python(&program, &config, &[]);
            assert!(committer.missing_files(&files).await.unwrap().is_empty());
            committer.commit(epoch, &files, &of(1)).await.unwrap();
            assert_eq!(
                reopened(&config).await.commit(epoch, &files, &of(1)).await.unwrap(),
                Committed::AlreadyDone
            );
        }
        upkeep.compact(fine).await.unwrap();
        vacuum(&upkeep).await;
    }
    let session = session(&config).await;
    session.register_batch("o", rows(50..27 * 50)).unwrap();
    let oracle = session.sql("SELECT id, t, c FROM o ORDER BY id").await.unwrap().collect().await.unwrap();
    assert_eq!(text(&read(&config, ALL).await), text(&oracle));
    // With listing and without any retention it takes prepared files for rubbish: they are missed by name.
    let files = prepared(&config, 27, 0..10).await;
    python(&program, &config, &["full"]);
    assert_eq!(committer.missing_files(&files).await.unwrap().len(), files.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn upkeep_on_s3() {
    let Some(endpoint) = service("MILLSTREAM_TEST_S3", "the URL of an S3 server") else { return };
    if std::env::var("AWS_ENDPOINT_URL").is_err() {
        let this = "connectors::delta::tests::upkeep::upkeep_on_s3";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([this, "--exact", "--nocapture"]).env("AWS_ENDPOINT_URL", endpoint);
        assert!(child.status().unwrap().success());
        return;
    }
    let bucket = std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
    let location = format!("s3://{bucket}/delta-{}/a b", uuid::Uuid::new_v4());
    let config = config_at(&location, &[&EAGER[..], &[("partition_by", "c")]].concat());
    let mut committer = filled(&config).await;
    let rows = read(&config, ALL).await;
    let upkeep = upkeep(&config, 1);
    let done = upkeep.compact(fine).await.unwrap();
    assert!(done.removed > done.added, "{done:?}");
    let files = prepared(&config, 21, 2000..2050).await;
    // Times of the server have whole seconds.
    tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
    assert_eq!(vacuum(&upkeep).await.len(), done.removed);
    assert_eq!(text(&read(&config, ALL).await), text(&rows));
    committer.commit(21, &files, &of(1)).await.unwrap();
    upkeep.checkpoint().await.unwrap();
    assert_eq!(count(&config).await, 1050);
    assert!(vacuum(&upkeep).await.is_empty());
}
