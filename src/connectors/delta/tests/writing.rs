//! What is in the files and what the log says about it.

use arrow::array::{
    Date32Array, Decimal128Array, Float64Array, StringViewArray, TimestampNanosecondArray, UInt64Array,
};
use serde_json::{Value, json};

use super::*;

fn stats(file: &PreparedFile) -> Value {
    serde_json::from_str(file.add["stats"].as_str().unwrap()).unwrap()
}

fn batch(columns: Vec<(&str, arrow::array::ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).unwrap()
}

async fn write_all(config: &DeltaConfig, batches: &[RecordBatch]) -> Vec<PreparedFile> {
    let schema = batches[0].schema();
    let (mut committer, _) = DeltaCommitter::open(config, &schema, "p", "s").await.unwrap();
    committer.create("x").await.unwrap();
    let mut writer = DeltaWriter::new(config.clone(), &schema, "g1-s0".into()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    let files = writer.prepare(1).unwrap().await.unwrap();
    committer.commit(1, &files, &CommitProgress::default()).await.unwrap();
    files
}

#[tokio::test]
async fn partition_columns_are_those_of_sql_and_prune() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t),hour(t),month(t),year(t),day(d),month(d),year(d)");
    // Across 1970 and leap days; every 100,003rd minute and its neighbours at the edges of days.
    let micros: Vec<i64> = (-300..300i64)
        .flat_map(|i| {
            let t = i * 100_003 * 60_000_000;
            let midnight = t.div_euclid(86_400_000_000) * 86_400_000_000;
            [t, midnight, midnight - 1]
        })
        .collect();
    let days = micros.iter().map(|t| t.div_euclid(86_400_000_000) as i32 + 1);
    let table = batch(vec![
        ("d", Arc::new(Date32Array::from_iter_values(days))),
        ("t", Arc::new(TimestampMicrosecondArray::from_iter_values(micros.clone()).with_timezone("UTC"))),
    ]);
    write_all(&config, &[table]).await;
    let wrong = read(
        &config,
        "SELECT count(*) FROM t WHERE t_day <> CAST(t AS DATE) OR t_hour <> date_trunc('hour', t)
         OR t_month <> CAST(date_trunc('month', t) AS DATE) OR t_year <> date_part('year', t)
         OR d_day <> d OR d_month <> CAST(date_trunc('month', d) AS DATE) OR d_year <> date_part('year', d)",
    )
    .await;
    assert_eq!(number(&wrong), 0);
    assert_eq!(count(&config).await, micros.len() as i64);
    let expected = micros.iter().filter(|t| **t < 0).count() as i64;
    let found = "SELECT count(*) FROM t WHERE t_hour < '1970-01-01T00:00:00Z' AND t_day < '1970-01-01'";
    assert_eq!(number(&read(&config, found).await), expected);
}

#[tokio::test]
async fn statistics_are_exact_or_absent() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "p");
    let long = "x".repeat(100);
    let table = batch(vec![
        ("p", Arc::new(StringArray::from(vec!["k"; 4]))),
        ("i", Arc::new(Int64Array::from(vec![Some(i64::MIN), None, Some(7), Some(i64::MAX)]))),
        ("f", Arc::new(Float64Array::from(vec![1.5, f64::NAN, -2.0, 0.0]))),
        ("g", Arc::new(Float64Array::from(vec![1.5, 1e300, -2.0, 0.1]))),
        ("s", Arc::new(StringArray::from(vec![Some("b"), None, None, Some("ä")]))),
        ("l", Arc::new(StringArray::from(vec![long.as_str(); 4]))),
        ("n", Arc::new(Int64Array::from(vec![None::<i64>; 4]))),
        (
            "m",
            Arc::new(
                Decimal128Array::from(vec![-105, 1, 2, 99_999]).with_precision_and_scale(10, 2).unwrap(),
            ),
        ),
        ("w", Arc::new(Decimal128Array::from(vec![1, 2, 3, 4]).with_precision_and_scale(38, 2).unwrap())),
        ("t", rows(0..4).column(1).clone()),
        ("d", Arc::new(Date32Array::from(vec![-1, 0, 19_782, 5]))),
    ]);
    let files = write_all(&config, std::slice::from_ref(&table)).await;
    assert_eq!(files.len(), 1);
    assert_eq!(files[0].rows, 4);
    assert_eq!(files[0].add["partitionValues"], json!({ "p": "k" }));
    let found = stats(&files[0]);
    assert_eq!(found["numRecords"], 4);
    let low = json!({ "i": i64::MIN, "g": -2.0, "s": "b", "m": -1.05, "t": "2023-12-30T09:53:20.123456Z",
                      "d": "1969-12-31" });
    let high = json!({ "i": i64::MAX, "g": 1e300, "s": "ä", "m": 999.99, "t": "2023-12-31T00:53:20.123456Z",
                       "d": "2024-02-29" });
    assert_eq!((&found["minValues"], &found["maxValues"]), (&low, &high));
    let nulls = json!({ "i": 1, "f": 0, "g": 0, "s": 2, "l": 0, "n": 4, "m": 0, "w": 0, "t": 0, "d": 0 });
    assert_eq!(found["nullCount"], nulls);
    // A reader that skips files by them, or answers from them, must not be wrong.
    let oracle = SessionContext::new();
    oracle.register_batch("t", table).unwrap();
    for sql in [
        "SELECT count(*) FROM t WHERE f > 100",
        "SELECT count(*) FROM t WHERE g > 2 AND g < 1e301",
        "SELECT count(*) FROM t WHERE g > 1e300",
        "SELECT min(t), max(t), min(s), max(s), min(d), max(d), min(m), max(m), max(l), min(i), max(g) FROM t",
        "SELECT count(*) FROM t WHERE l > 'xxx' AND m < 0 AND i < 0",
        "SELECT count(s), count(n), count(i) FROM t WHERE t >= '2023-12-30T09:53:20.123456Z'",
        "SELECT p, count(*) FROM t WHERE p = 'k' GROUP BY p",
    ] {
        let expected = oracle.sql(sql).await.unwrap().collect().await.unwrap();
        assert_eq!(text(&read(&config, sql).await), text(&expected), "{sql}");
    }
}

#[tokio::test]
async fn other_types_become_those_of_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "s");
    let table = batch(vec![
        ("u", Arc::new(UInt64Array::from(vec![1, 2]))),
        ("s", Arc::new(StringViewArray::from(vec!["a", "b"]))),
        ("t", Arc::new(TimestampNanosecondArray::from(vec![1_000, 2_000_999]))),
    ]);
    write_all(&config, std::slice::from_ref(&table)).await;
    let found = read(&config, "SELECT * FROM t ORDER BY u").await;
    let kinds: Vec<String> =
        found[0].schema().fields().iter().map(|f| format!("{} {}", f.name(), f.data_type())).collect();
    assert_eq!(kinds, ["u Int64", "s Utf8", "t Timestamp(µs, \"UTC\")"]);
    let wanted = "+---+---+-----------------------------+\n\
                  | u | s | t                           |\n\
                  +---+---+-----------------------------+\n\
                  | 1 | a | 1970-01-01T00:00:00.000001Z |\n\
                  | 2 | b | 1970-01-01T00:00:00.002Z    |\n\
                  +---+---+-----------------------------+";
    assert_eq!(text(&found), wanted);
    let mut writer = DeltaWriter::new(config, &table.schema(), "g1-s0".into()).unwrap();
    let huge = batch(vec![
        ("u", Arc::new(UInt64Array::from(vec![u64::MAX]))),
        ("s", Arc::new(StringViewArray::from(vec!["a"]))),
        ("t", Arc::new(TimestampNanosecondArray::from(vec![0]))),
    ]);
    let error = writer.write(&huge).unwrap_err();
    assert!(error.message().contains("column u"), "{error}");
}

#[tokio::test]
async fn many_partitions_and_small_files_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let location = folder.path().join("t").to_string_lossy().into_owned();
    let config =
        config_at(&location, &[("partition_by", "k"), ("target_file_size", "4KB"), ("compression", "zstd")]);
    let of = |start: i64| {
        let ids = start..start + 3_000;
        batch(vec![
            ("k", Arc::new(Int64Array::from_iter_values(ids.clone().map(|i| i * 7919 % 300)))),
            ("id", Arc::new(Int64Array::from_iter_values(ids))),
        ])
    };
    let schema = of(0).schema();
    let (mut committer, _) = DeltaCommitter::open(&config, &schema, "p", "s").await.unwrap();
    committer.create("x").await.unwrap();
    let mut writer = DeltaWriter::new(config.clone(), &schema, "g1-s0".into()).unwrap();
    for part in 0..10 {
        writer.write(&of(part * 3_000)).unwrap();
        if part % 3 == 0 {
            writer.upload(1).await.unwrap();
        }
    }
    let files = writer.prepare(1).unwrap().await.unwrap();
    assert_eq!(files.iter().map(|file| file.rows).sum::<u64>(), 30_000);
    assert!(
        files
            .iter()
            .all(|file| file.path.ends_with(".zstd.parquet") && file.path.contains("0000000001-g1-s0"))
    );
    assert!(writer.prepare(2).unwrap().await.unwrap().is_empty());
    committer.commit(1, &files, &CommitProgress::default()).await.unwrap();
    let sql = "SELECT count(*) FROM (SELECT id FROM t WHERE k = id * 7919 % 300 GROUP BY id)";
    assert_eq!(number(&read(&config, sql).await), 30_000);
}

/// A file is rolled at its target size, within an epoch.
#[tokio::test]
async fn a_full_file_is_rolled() {
    let folder = tempfile::tempdir().unwrap();
    let location = folder.path().join("t").to_string_lossy().into_owned();
    let config = config_at(&location, &[("target_file_size", "64KB"), ("compression", "uncompressed")]);
    let mut writer = writer(&config, 0);
    for part in 0..20 {
        writer.write(&rows(part * 2_000..(part + 1) * 2_000)).unwrap();
    }
    let files = writer.prepare(1).unwrap().await.unwrap();
    assert!(files.len() > 3, "{} files", files.len());
    assert!(files.iter().all(|file| !file.path.contains('/') && file.size < 3 * (64 << 10)));
    assert_eq!(files.iter().map(|file| file.rows).sum::<u64>(), 40_000);
}
