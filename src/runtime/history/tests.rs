use super::*;

fn partition(partition: i32, low: i64, high: i64) -> PartitionInfo {
    PartitionInfo { topic: 0, partition, low, high }
}

fn at(offsets: &[(i32, i64)]) -> Positions {
    offsets.iter().map(|(partition, at)| (Place::new(0, 0, *partition), *at)).collect()
}

/// What is said of a topic and its backup.
fn judged<T>(
    partitions: &[PartitionInfo],
    backup: &[(i32, i64)],
    allow_gap: bool,
    judge: impl Fn(&Contiguity) -> Result<T>,
) -> std::result::Result<T, String> {
    let backup = backup.iter().copied().collect();
    let contiguity = Contiguity { topic: "t", partitions, backup: &backup, allow_gap };
    judge(&contiguity).map_err(|error| error.to_string())
}

#[test]
fn a_first_start_goes_over_where_the_backup_ends() {
    let topic = [partition(0, 100, 900), partition(1, 0, 40)];
    let first = |backup: &[(i32, i64)], allow| judged(&topic, backup, allow, |contiguity| contiguity.first());
    // Both ends of what the topic holds count; a partition that the backup does not know is read from its beginning.
    assert_eq!(first(&[(0, 100), (1, 40)], false), Ok(at(&[(0, 100), (1, 40)])));
    assert_eq!(first(&[(0, 900)], false), Ok(at(&[(0, 900), (1, 0)])));
    let said = |backup: &[(i32, i64)], numbers: &[&str]| {
        let error = first(backup, false).unwrap_err();
        numbers.iter().for_each(|number| assert!(error.contains(number), "{number}: {error}"));
    };
    said(&[(0, 99), (1, 0)], &["topic t, partition 0", "offset 99", "first is 100", "1 records"]);
    said(&[(1, 0)], &["partition 0", "does not have it", "first is 100", "100 records"]);
    said(&[(0, 100), (1, 41)], &["partition 1", "up to 41", "ends at 40"]);
    said(&[(0, 100), (7, 3)], &["no partition 7", "offset 3"]);
    assert_eq!(first(&[(0, 60)], true), Ok(at(&[(0, 100), (1, 0)])));
    // A topic that was made anew is no gap.
    assert!(first(&[(0, 901)], true).is_err());
}

#[test]
fn a_start_goes_on_in_history_and_fills_in_what_expired() {
    let topic = [partition(0, 100, 900), partition(1, 100, 900), partition(2, 100, 900), partition(3, 0, 9)];
    let stored = at(&[(0, 20), (1, 50), (2, 300)]);
    let resumed = |backup: &[(i32, i64)], until: &Positions, allow| {
        judged(&topic, backup, allow, |contiguity| contiguity.resumed(&stored, until))
    };
    let next = at(&[(0, 20), (1, 50), (2, 300), (3, 0)]);
    // In the middle of a bootstrap: partition 1 had gone over at 50 and stood still since, partition 2 has gone on.
    let until = at(&[(0, 400), (1, 50), (2, 200)]);
    let ends = at(&[(0, 400), (1, 700), (2, 300), (3, 0)]);
    assert_eq!(resumed(&[(0, 400), (1, 700), (2, 200)], &until, false), Ok((next.clone(), ends)));
    // What followed the history of partition 0 has expired as well.
    let until = at(&[(0, 90), (1, 150), (2, 200)]);
    let ends = at(&[(0, 500), (1, 150), (2, 300), (3, 0)]);
    assert_eq!(resumed(&[(0, 500), (1, 700), (2, 200)], &until, false), Ok((next.clone(), ends)));
    // After a standstill, without a bootstrap on its way; the backup has too little of partition 1.
    let error = resumed(&[(0, 400), (1, 99)], &Positions::default(), false).unwrap_err();
    assert!(
        error.contains("partition 1: its backup ends at offset 99, but the broker's first is 100"),
        "{error}"
    );
    let ends = at(&[(0, 400), (1, 100), (2, 300), (3, 0)]);
    assert_eq!(resumed(&[(0, 400), (1, 99)], &Positions::default(), true), Ok((next, ends)));
}

#[test]
fn a_manifest_knows_of_the_history_until_every_partition_has_gone_over() {
    let until = at(&[(0, 10), (1, 20)]);
    let (location, topic) = ("lake/backup".to_owned(), "t".into());
    let bootstrap =
        Bootstrap { location, version: 7, topic, until: until.clone(), limit: None, allow_gap: false };
    let reached = |offsets: [i64; 2]| {
        let progress = |(partition, next_offset): (usize, i64)| PartitionProgress {
            topic: 0,
            partition: partition as i32,
            next_offset,
            watermark: None,
        };
        bootstrap.progress(&offsets.into_iter().enumerate().map(progress).collect::<Vec<_>>())
    };
    let known = reached([10, 19]).unwrap();
    assert_eq!((known.location.as_str(), known.version, ends_of(&known)), ("lake/backup", 7, until));
    assert_eq!(reached([11, 20]), None);
}
