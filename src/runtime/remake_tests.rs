use arrow::array::Int32Array;
use arrow::datatypes::{DataType, Field, Schema};
use uuid::Uuid;

use super::*;
use crate::runtime::letters;
use crate::state::manifest::{Claimant, PartitionProgress, next_claim};
use crate::stream::Stage;

fn place(partition: i32) -> Place {
    Place::new(0, 0, partition)
}

fn batch(rows: &[(i32, i64)], reached: &[(i32, i64)]) -> SourceBatch {
    let numbers: Int64Array = rows.iter().map(|(_, offset)| offset * 10).collect();
    let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
    SourceBatch {
        rows: RecordBatch::try_new(schema, vec![Arc::new(numbers.clone())]).unwrap(),
        partition: rows.iter().map(|(partition, _)| *partition).collect::<Int32Array>(),
        offset: rows.iter().map(|(_, offset)| *offset).collect(),
        timestamp: numbers,
        key: None,
        payload: Some(rows.iter().map(|(_, offset)| Some(vec![*offset as u8])).collect()),
        dead: Vec::new(),
        tombstones: 0,
        skipped: 0,
        reached: reached.iter().map(|(partition, next)| (place(*partition), *next)).collect(),
        at_end: vec![place(0)],
        missing_offsets: 0,
    }
}

fn letter(partition: i32, offset: i64) -> DeadLetter {
    DeadLetter {
        stage: Stage::Decode,
        at: "s".into(),
        topic: "t".into(),
        partition,
        offset,
        timestamp_ms: None,
        key: None,
        payload: None,
        headers: None,
        error: String::new(),
        kind: "not_json",
    }
}

#[test]
fn records_behind_the_end_are_not_read() {
    let ends: Positions = [(place(0), 5), (place(1), 9)].into_iter().collect();
    let mut whole = batch(&[(0, 3), (1, 8), (0, 4)], &[(0, 5), (1, 9)]);
    whole.dead = vec![letter(0, 2)];
    let kept = up_to(whole.clone(), &ends).unwrap();
    assert_eq!((kept.rows, kept.dead.len(), kept.reached), (whole.rows, 1, whole.reached));
    assert!(kept.at_end.is_empty(), "a partition that was read to its end could become idle");

    let mut beyond = batch(&[(0, 4), (1, 7), (0, 5), (1, 9), (0, 6)], &[(0, 8), (1, 8)]);
    beyond.dead = vec![letter(0, 7), letter(1, 7)];
    let kept = up_to(beyond, &ends).unwrap();
    assert_eq!(kept.offset.values().to_vec(), [4, 7]);
    assert_eq!(kept.partition.values().to_vec(), [0, 1]);
    assert_eq!(kept.timestamp.values().to_vec(), [40, 70]);
    assert_eq!(kept.rows.num_rows(), 2);
    assert_eq!(kept.payload.unwrap().value(1), [7]);
    assert_eq!(kept.dead.iter().map(|letter| letter.partition).collect::<Vec<_>>(), [1]);
    let reached: Vec<_> = kept.reached.iter().collect();
    assert_eq!(reached, [(place(0), 5), (place(1), 8)]);
}

#[test]
fn a_partition_that_was_added_is_read_from_its_beginning() {
    let at = |partition, next_offset| PartitionProgress { topic: 0, partition, next_offset, watermark: None };
    let from = SourceProgress { partitions: vec![at(0, 7)], ..SourceProgress::default() };
    let ends: Positions = [(place(0), 9), (place(1), 4)].into_iter().collect();
    let partitions = [PartitionInfo { topic: 0, partition: 1, low: 2, high: 30 }];
    let begun = begin(&from, &ends, &partitions);
    assert_eq!(begun.iter().collect::<Vec<_>>(), [(place(0), 7), (place(1), 2)]);
}

fn manifest(data_epoch: u64, sink: Option<&str>) -> Manifest {
    let claimant = Claimant { pipeline: "p", writer: Uuid::from_u128(1), now_ms: 0 };
    let first = next_claim(None, data_epoch, Uuid::from_u128(2), &claimant);
    let fingerprints = sink.map(|sink| (sink.to_owned(), String::new())).into_iter().collect();
    Manifest { data_epoch: Some(data_epoch), fingerprints, ..first }
}

fn lost(newest: Option<u64>) -> Lost {
    let commit = PreparedCommit {
        sink: "t".to_owned(),
        location: "./t".to_owned(),
        epoch: 8,
        files: Vec::new(),
        sources: BTreeMap::new(),
        complete_until: None,
    };
    Lost { commit, file: "f".to_owned(), newest, grows: false }
}

#[test]
fn an_epoch_is_made_again_only_behind_the_one_before() {
    let before = manifest(6, Some("t"));
    assert_eq!(possible(&lost(Some(6)), Some(&before), false), Ok(()));
    assert!(possible(&lost(Some(6)), None, false).is_err(), "the first epoch");
    assert!(possible(&lost(Some(6)), Some(&before), true).is_err(), "letters");
    assert!(possible(&lost(Some(5)), Some(&before), false).is_err(), "an older copy of the table");
    assert!(possible(&lost(None), Some(&before), false).is_err(), "the table was removed");
    assert_eq!(possible(&lost(None), Some(&manifest(6, Some("other"))), false), Ok(()), "the sink was new");
    assert!(possible(&Lost { grows: true, ..lost(Some(6)) }, Some(&before), false).is_err());
}

#[test]
fn records_that_are_gone_are_noticed() {
    let of = |accepted, late, dead_letters| Accounts { accepted, late, dead_letters, ..Accounts::default() };
    let (from, to) = (of(100, 5, 2), of(150, 7, 3));
    assert!(same_records(&of(50, 2, 1), &from, &to).is_ok());
    for other in [of(49, 2, 1), of(50, 1, 1), of(50, 2, 0)] {
        let error = same_records(&other, &from, &to).unwrap_err();
        assert!(error.hint_text().unwrap().contains("retention"), "{error}");
    }
}

#[test]
fn a_ledger_segment_is_read_back() {
    let topics: Vec<Arc<str>> = vec!["a".into(), "b".into()];
    let late = [(1, 3, 77), (0, 0, 5)];
    let batch = letters::ledger(&topics, &late).unwrap().unwrap();
    let bytes = letters::parquet(&[batch]).unwrap();
    assert_eq!(read_ledger(bytes.clone(), &topics).unwrap(), late);
    assert!(read_ledger(bytes.clone(), &topics[..1]).is_err(), "an unknown topic");
    assert!(read_ledger(bytes.slice(..bytes.len() / 2), &topics).is_err());
}
