//! `mode = 'upsert'`: random changes against a map, however the table is partitioned.

use std::collections::BTreeMap;

use super::*;
use crate::connectors::delta::store::table;
use crate::connectors::delta::upsert::Stager;
use crate::stream::dice::Dice;

/// id, t, c.
type Row = (i64, i64, Option<String>);

fn batch<'a>(rows: impl IntoIterator<Item = &'a Row>) -> RecordBatch {
    let rows: Vec<&Row> = rows.into_iter().collect();
    let times = rows.iter().map(|row| row.1);
    RecordBatch::try_new(
        schema(),
        vec![
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.0))),
            Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC")),
            Arc::new(rows.iter().map(|row| row.2.clone()).collect::<StringArray>()),
        ],
    )
    .unwrap()
}

fn upserting(folder: &tempfile::TempDir, key: &str, partition_by: &str) -> DeltaConfig {
    let location = folder.path().join("t").to_string_lossy().into_owned();
    config_at(&location, &[("mode", "upsert"), ("key", key), ("partition_by", partition_by)])
}

/// One epoch: rows to put and rows whose keys are deleted.
async fn commit(
    config: &DeltaConfig,
    committer: &mut DeltaCommitter,
    epoch: u64,
    put: &RecordBatch,
    deletes: Option<&RecordBatch>,
) {
    let stager = Stager::new(config, &schema(), "g00000001-s0".to_owned()).unwrap();
    let files = stager.stage(epoch, put, deletes).await.unwrap();
    committer.commit(epoch, &files, &CommitProgress::default()).await.unwrap();
    let again = committer.commit(epoch, &files, &CommitProgress::default()).await.unwrap();
    assert_eq!(again, Committed::AlreadyDone);
}

#[tokio::test]
async fn rows_move_between_partitions_and_each_key_has_one_row() {
    const HOUR: i64 = 3_600_000_000;
    let texts = ["", "a/b ü%2F1", "x=y", "null", " "];
    let shapes = [
        ("id", "day(t)"),
        ("id", "c"),
        ("id", "hour(t), c"),
        ("id", "month(t)"),
        ("id", "id"),
        ("c, id", "c"),
        ("c", "c, month(t)"),
        ("id, t", "day(t)"),
        ("t, id", "hour(t), id"),
        ("t, c", "minute(t), c"),
    ];
    for (seed, (key, partition_by)) in shapes.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let config = upserting(&folder, key, partition_by);
        let mut committer = created(&config).await;
        let mut dice = Dice(seed as u64);
        let has = |column: &str| config.mode.key().iter().any(|key| key == column);
        let (mut model, session) = (BTreeMap::new(), SessionContext::new());
        for epoch in 1..=6 {
            let (mut put, mut deleted) = (BTreeMap::new(), BTreeMap::new());
            for _ in 0..12 {
                let id = dice.roll(8) as i64;
                let t = dice.roll(60) as i64 * HOUR - 20 * HOUR;
                let c = texts[dice.roll(texts.len() as u64) as usize].to_owned();
                // No column of the key is NULL.
                let c = (has("c") || dice.roll(5) > 0).then_some(c);
                let of = (
                    if has("id") { id } else { 0 },
                    if has("t") { t } else { 0 },
                    c.clone().filter(|_| has("c")),
                );
                put.remove(&of);
                deleted.remove(&of);
                match dice.roll(4) {
                    0 => deleted.insert(of, (id, t, c)),
                    _ => put.insert(of, (id, t, c)),
                };
            }
            let deletes = (!deleted.is_empty()).then(|| batch(deleted.values()));
            commit(&config, &mut committer, epoch, &batch(put.values()), deletes.as_ref()).await;
            model.retain(|key, _| !deleted.contains_key(key));
            model.extend(put);
            session.deregister_table("o").unwrap();
            session.register_batch("o", batch(model.values())).unwrap();
            // The protocol has no empty text as a partition value.
            let c = if config.partition_names().contains(&"c".to_owned()) { "nullif(c, '')" } else { "c" };
            let expected = format!("SELECT id, t, {c} AS c, {c} IS NULL AS no FROM o ORDER BY 1, 2, 3");
            let expected = session.sql(&expected).await.unwrap().collect().await.unwrap();
            let found = read(&config, "SELECT id, t, c, c IS NULL AS no FROM t ORDER BY 1, 2, 3").await;
            assert_eq!(
                text(&found),
                text(&expected),
                "key {key}, partition_by {partition_by}, epoch {epoch}"
            );
            for part in config.partition_by.iter().filter(|part| part.name() != part.column) {
                let unit = part.name().replace("t_", "");
                let sql = format!(
                    "SELECT count(*) FROM t WHERE CAST(t_{unit} AS TIMESTAMP) <> date_trunc('{unit}', t)"
                );
                assert_eq!(number(&read(&config, &sql).await), 0, "{unit}");
            }
        }
    }
}

/// A partition that follows from the key is left alone when no key of it changes.
#[tokio::test]
async fn partitions_of_other_keys_are_not_rewritten() {
    const DAY: i64 = 86_400_000_000;
    let folder = tempfile::tempdir().unwrap();
    let config = upserting(&folder, "t, id", "day(t)");
    let mut committer = created(&config).await;
    let rows: Vec<_> = (0..10).map(|day| (1, day * DAY, Some("old".to_owned()))).collect();
    commit(&config, &mut committer, 1, &batch(&rows), None).await;
    let files = async || {
        let mut table = table(&config.location).unwrap();
        table.load().await.unwrap();
        table.get_file_uris().unwrap().collect::<Vec<String>>()
    };
    let before = files().await;
    commit(&config, &mut committer, 2, &batch(&[(1, 3 * DAY, Some("new".to_owned()))]), None).await;
    let after = files().await;
    let gone: Vec<_> = before.iter().filter(|file| !after.contains(file)).collect();
    assert!(before.len() == 10 && gone.len() == 1 && gone[0].contains("t_day=1970-01-04"), "{gone:?}");
    let sql = "SELECT count(*) FROM t WHERE c = 'new' AND t_day = '1970-01-04'";
    assert_eq!((count(&config).await, number(&read(&config, sql).await)), (10, 1));
}
