use uuid::Uuid;

use super::*;
use crate::runtime::again::read_ledger;
use crate::state::manifest::{Claimant, next_claim};
use crate::stream::Place;

fn place(partition: i32) -> Place {
    Place::new(0, 0, partition)
}

#[test]
fn partitions_that_were_added_later_are_not_read() {
    let begun: Positions = [(place(0), 7), (place(1), 2), (place(2), 0)].into_iter().collect();
    let ends: Positions = [(place(0), 9), (place(1), 4)].into_iter().collect();
    assert_eq!(within(&begun, &ends).iter().collect::<Vec<_>>(), [(place(0), 7), (place(1), 2)]);
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
        replaced_by: None,
    };
    Lost { commit, file: "f".to_owned(), newest, grows: false }
}

#[test]
fn an_epoch_is_made_again_only_behind_the_one_before() {
    let before = manifest(6, Some("t"));
    assert_eq!(possible(&lost(Some(6)), Some(&before), (false, false)), Ok(()));
    assert!(possible(&lost(Some(6)), None, (false, false)).is_err(), "the first epoch");
    assert!(possible(&lost(Some(5)), Some(&before), (false, false)).is_err(), "an older copy of the table");
    assert!(possible(&lost(None), Some(&before), (false, false)).is_err(), "the table was removed");
    assert_eq!(
        possible(&lost(None), Some(&manifest(6, Some("other"))), (false, false)),
        Ok(()),
        "the sink was new"
    );
    // Letters need no state before theirs, but their table does not lack any either.
    assert_eq!(possible(&lost(Some(6)), Some(&before), (true, false)), Ok(()));
    assert_eq!(possible(&lost(None), None, (true, false)), Ok(()));
    assert!(possible(&lost(Some(5)), Some(&before), (true, false)).is_err(), "an older copy of the table");
    assert!(possible(&lost(Some(5)), None, (true, false)).is_err(), "nothing says what came before");
    assert!(possible(&Lost { grows: true, ..lost(Some(6)) }, Some(&before), (false, false)).is_err());
}

#[test]
fn records_that_are_gone_are_noticed() {
    let of = |accepted, late, dead_letters| Accounts { accepted, late, dead_letters, ..Accounts::default() };
    let (from, to) = (of(100, 5, 2), of(150, 7, 3));
    assert!(same_records(&of(50, 2, 1), &from, &to, false).is_ok());
    for other in [of(49, 2, 1), of(50, 1, 1), of(50, 2, 0)] {
        let error = same_records(&other, &from, &to, false).unwrap_err();
        assert!(error.hint_text().unwrap().contains("retention"), "{error}");
    }
    assert!(same_records(&of(50, 2, 0), &from, &to, true).is_ok(), "a backup has no dead letters");
    assert!(same_records(&of(50, 1, 1), &from, &to, true).is_err());
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
