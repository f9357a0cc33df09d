//! `on_schema_change`: columns that come and go, before and after commits, compaction and MERGE.

use super::*;
use crate::connectors::delta::Upkeep;
use crate::connectors::delta::upsert::Stager;
use crate::error::{Domain, Error};

const GROWING: [(&str, &str); 2] = [("on_schema_change", "add_columns"), ("compact_interval", "0 seconds")];

fn growing(folder: &tempfile::TempDir, more: &[(&str, &str)]) -> DeltaConfig {
    let location = folder.path().join("t").to_string_lossy().into_owned();
    config_at(&location, &[&GROWING[..], more].concat())
}

/// Columns of BIGINT, or of the type that a name says: `n:text`.
fn columns(names: &[&str]) -> SchemaRef {
    let field = |name: &&str| match name.split_once(':') {
        Some((name, "text")) => Field::new(name, DataType::Utf8, true),
        Some((name, _)) => Field::new(name, DataType::Int32, true),
        None => Field::new(*name, DataType::Int64, true),
    };
    Arc::new(Schema::new(names.iter().map(field).collect::<Vec<_>>()))
}

fn of(schema: &SchemaRef, base: i64) -> RecordBatch {
    let columns = (0..schema.fields().len() as i64)
        .map(|c| Arc::new(Int64Array::from_iter_values((0..3).map(|r| base + c * 100 + r))) as _);
    RecordBatch::try_new(schema.clone(), columns.collect()).unwrap()
}

async fn open(config: &DeltaConfig, schema: &SchemaRef) -> Result<DeltaCommitter, Error> {
    let (mut committer, state) = DeltaCommitter::open(config, schema, "p", "s").await?;
    if !state.exists {
        committer.create("x").await?;
    }
    committer.evolve().await?;
    Ok(committer)
}

async fn append(config: &DeltaConfig, schema: &SchemaRef, epoch: u64, base: i64) {
    let mut committer = open(config, schema).await.unwrap();
    let mut writer = DeltaWriter::new(config.clone(), schema, "g00000001-s0".to_owned()).unwrap();
    writer.write(&of(schema, base)).unwrap();
    let files = writer.prepare(epoch).unwrap().await.unwrap();
    committer.commit(epoch, &files, &CommitProgress::default()).await.unwrap();
}

#[tokio::test]
async fn columns_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let config = growing(&folder, &[("partition_by", "a")]);
    append(&config, &columns(&["a", "b"]), 1, 1000).await;
    append(&config, &columns(&["a", "c", "b"]), 2, 2000).await;
    // `b` is gone and comes back.
    append(&config, &columns(&["d", "a"]), 3, 3000).await;
    append(&config, &columns(&["b", "a"]), 4, 4000).await;
    let all = "SELECT a, b, c, d FROM t ORDER BY a";
    let found = text(&read(&config, all).await);
    for line in
        ["| 1000 | 1100 |      |      |", "| 2000 | 2200 | 2100 |      |", "| 3100 |      |      | 3000 |"]
    {
        assert!(found.contains(line), "{line} is not in\n{found}");
    }
    assert!(found.contains("| 4100 | 4000 |      |      |"), "{found}");
    let names: Vec<String> = session(&config)
        .await
        .table("t")
        .await
        .unwrap()
        .schema()
        .fields()
        .iter()
        .map(|f| f.name().clone())
        .collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    // Creation, two additions, four epochs; nothing for a start that finds all its columns.
    assert_eq!(open(&config, &columns(&["b", "a"])).await.unwrap().version(), Some(6));
    // Merged files have all columns of the table, those that the SQL lacks too.
    let eager = config_at(&config.location, &[("compact_interval", "0 seconds")]);
    for epoch in 5..=20 {
        append(&config, &columns(&["a", "b", "d"]), epoch, 4000).await;
    }
    let before = text(&read(&config, all).await);
    let upkeep = Upkeep::new(&eager, "p", &["s".to_owned()], "x".to_owned(), 1).unwrap();
    let done = upkeep.compact(async || Ok(())).await.unwrap();
    assert!(done.removed > done.added, "{done:?}");
    assert_eq!(text(&read(&config, all).await), before);
}

#[tokio::test]
async fn old_files_are_merged_with_new_columns() {
    let folder = tempfile::tempdir().unwrap();
    let config = growing(&folder, &[]);
    for epoch in 1..=4 {
        append(&config, &columns(&["a", "b"]), epoch, epoch as i64).await;
    }
    for epoch in 5..=8 {
        append(&config, &columns(&["c", "a"]), epoch, epoch as i64).await;
    }
    let all = "SELECT a, b, c FROM t ORDER BY a, b, c";
    let before = text(&read(&config, all).await);
    let upkeep = Upkeep::new(&config, "p", &["s".to_owned()], "x".to_owned(), 1).unwrap();
    let done = upkeep.compact(async || Ok(())).await.unwrap();
    assert_eq!((done.removed, done.added), (8, 1));
    assert_eq!(text(&read(&config, all).await), before);
}

#[tokio::test]
async fn what_cannot_be_added_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = growing(&folder, &[]);
    append(&config, &columns(&["a", "b"]), 1, 0).await;
    for (schema, word) in [
        (columns(&["a", "b:text"]), "the column b as long, the sink writes string"),
        (columns(&["a:int", "b"]), "the column a as long, the sink writes integer"),
        (columns(&["a", "B"]), "the column b, the sink writes B"),
    ] {
        let error = open(&config, &schema).await.err().unwrap();
        assert_eq!(error.domain(), Domain::User);
        assert!(error.message().contains(word), "{error}");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("AS")));
    }
    let fail = config_at(&config.location, &[]);
    let error = open(&fail, &columns(&["a", "b", "c"])).await.err().unwrap();
    assert!(
        error.hint_text().is_some_and(|hint| hint.contains("on_schema_change = 'add_columns'")),
        "{error}"
    );
    assert_eq!(open(&config, &columns(&["a", "b"])).await.unwrap().version(), Some(1), "nothing was written");
}

#[tokio::test]
async fn of_two_starts_one_adds_the_columns() {
    let folder = tempfile::tempdir().unwrap();
    let config = growing(&folder, &[]);
    append(&config, &columns(&["a"]), 1, 0).await;
    let wider = columns(&["a", "b"]);
    let (mut left, _) = DeltaCommitter::open(&config, &wider, "p", "s").await.unwrap();
    let (mut right, _) = DeltaCommitter::open(&config, &wider, "p", "s").await.unwrap();
    let (one, two) = tokio::join!(left.evolve(), right.evolve());
    one.and(two).unwrap();
    assert_eq!((left.version(), right.version()), (Some(2), Some(2)));
}

#[tokio::test]
async fn an_upserted_row_loses_what_the_sql_no_longer_has() {
    let folder = tempfile::tempdir().unwrap();
    let config = growing(&folder, &[("mode", "upsert"), ("key", "a")]);
    for (epoch, names) in [(1, ["a", "b"]), (2, ["a", "c"])] {
        let schema = columns(&names);
        let mut committer = open(&config, &schema).await.unwrap();
        let stager = Stager::new(&config, &schema, "g00000001-s0".to_owned()).unwrap();
        let staged = stager.stage(epoch, &of(&schema, epoch as i64), None).await.unwrap();
        committer.commit(epoch, &staged, &CommitProgress::default()).await.unwrap();
    }
    let found = text(&read(&config, "SELECT a, b, c FROM t ORDER BY a").await);
    for line in ["| 1 | 101 |     |", "| 2 |     | 102 |", "| 3 |     | 103 |", "| 4 |     | 104 |"] {
        assert!(found.contains(line), "{line} is not in\n{found}");
    }
}
