use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::files::sort_by_group;
use super::super::keys::groups_of;
use super::*;
use crate::stream::dice::Dice;

fn file(epoch: u64, bytes: u64) -> StateFile {
    StateFile {
        path: format!("state/n/rows-g1-e{epoch}-s0.parquet"),
        node: "n".into(),
        kind: "rows".into(),
        epoch,
        generation: 1,
        rows: 1,
        bytes,
        min_time: None,
        max_time: None,
    }
}

#[test]
fn few_files_stay_and_full_ones_are_left_alone() {
    let files: Vec<StateFile> = (0..20).map(|epoch| file(epoch, 1_000)).collect();
    let choose = |files: &[StateFile]| choose(&files.iter().collect::<Vec<_>>());
    assert_eq!(choose(&files[..LEAST_EPOCHS - 1]), None);
    assert_eq!(choose(&files[..LEAST_EPOCHS]), Some(0..LEAST_EPOCHS));
    let mut large = files.clone();
    large[0].bytes = 60_000;
    assert_eq!(choose(&large), Some(1..20));
    // A shard with little does not hide the others of its epoch.
    let uneven = |at: u64| [file(at, 4_000_000), file(at, 1_000)];
    assert_eq!(choose(&(0..16).flat_map(uneven).collect::<Vec<_>>()), Some(0..32));
    large[0].bytes = MAX_BYTES;
    large.extend((20..40).map(|epoch| file(epoch, MAX_BYTES / 10)));
    assert_eq!(choose(&large), None, "ten of them would be full, and no run is long enough");
}

/// 100,000 epochs of files of random sizes: few files at any time, and no row is rewritten often.
#[test]
fn a_long_run_has_few_files_and_rewrites_little() {
    let mut dice = Dice(7);
    for shards in [1, 2, 8] {
        let (mut files, mut written, mut merged) = (Vec::<StateFile>::new(), 0, 0);
        for epoch in 0..100_000 / shards {
            for _ in 0..shards {
                let bytes = 2_000 + dice.roll(3_000);
                written += bytes;
                files.push(file(epoch, bytes));
            }
            if let Some(run) = choose(&files.iter().collect::<Vec<_>>()) {
                let bytes: u64 = files.drain(run.clone()).map(|file| file.bytes).sum();
                assert!(bytes <= MAX_BYTES);
                merged += bytes;
                files.push(file(epoch, bytes));
            }
            let full = (written / (MAX_BYTES / 3)) as usize;
            assert!(
                files.len() <= (LEAST_EPOCHS + 1) * shards as usize + 16 + full,
                "{} files at {epoch}",
                files.len()
            );
        }
        assert!(merged < written * 12, "{merged} bytes for {written}");
    }
}

/// Key, value, deleted, time.
type Row = (Option<i64>, i64, bool, i64);

/// As a state file.
fn encoded(rows: &[Row]) -> Bytes {
    let keys: ArrayRef = Arc::new(rows.iter().map(|row| row.0).collect::<Int64Array>());
    let mut hashes = Vec::new();
    hash_keys(std::slice::from_ref(&keys), rows.len(), &mut hashes).unwrap();
    let long =
        |of: fn(&Row) -> i64| -> ArrayRef { Arc::new(Int64Array::from_iter_values(rows.iter().map(of))) };
    let deleted: ArrayRef = Arc::new(BooleanArray::from_iter(rows.iter().map(|row| Some(row.2))));
    let columns =
        [("v", long(|r| r.1), false), ("k", keys, true), ("d", deleted, false), (TIME, long(|r| r.3), false)];
    encode(&sort_by_group(&RecordBatch::try_from_iter_with_nullable(columns).unwrap(), &hashes).unwrap())
        .unwrap()
}

/// What a restore of these files in this order has, read by any number of shards: rows, or the newest of each key.
fn restored(files: &[Bytes], keyed: bool, shards: usize) -> Vec<Row> {
    let (mut newest, mut all) = (BTreeMap::new(), Vec::new());
    for file in files {
        for shard in 0..shards {
            for batch in decode(file.clone(), groups_of(shard, shards)).unwrap() {
                let long = |at: usize| batch.column(at).as_primitive::<Int64Type>();
                for row in 0..batch.num_rows() {
                    let key = long(2).is_valid(row).then(|| long(2).value(row));
                    let deleted = batch.column(3).as_boolean().value(row);
                    let found = (key, long(1).value(row), deleted, long(4).value(row));
                    newest.insert(key, found);
                    all.push(found);
                }
            }
        }
    }
    let mut rows: Vec<_> = if keyed { newest.into_values().collect() } else { all };
    rows.sort_unstable();
    rows
}

#[test]
fn a_restore_of_merged_files_is_that_of_the_files() {
    for seed in 0..60 {
        let mut dice = Dice(seed);
        let keyed = dice.chance(50);
        let mut value = 0;
        let mut files = Vec::new();
        for epoch in 0..2 + dice.roll(20) as i64 {
            let mut rows = BTreeMap::new();
            for at in 0..1 + dice.roll(40) as i64 {
                value += 1;
                let key = (!dice.chance(5)).then(|| dice.roll(30) as i64);
                // A file has a key once; rows may have the same key often.
                let slot = if keyed { (key, 0) } else { (key, at) };
                rows.insert(slot, (key, value, dice.chance(20), epoch * 10 + dice.roll(30) as i64));
            }
            files.push(encoded(&rows.into_values().collect::<Vec<_>>()));
        }
        let before = restored(&files, keyed, 1);
        let first = dice.roll(files.len() as u64) as usize;
        let horizon = if keyed { i64::MAX } else { dice.roll(200) as i64 };
        let keys = [1];
        let run = files.split_off(first);
        let merged = merge(run, keyed.then_some(&keys[..]), horizon).unwrap();
        // All may lie below the horizon.
        files.extend(merged.iter().map(|merged| merged.bytes.clone()));
        let live =
            |rows: Vec<Row>| -> Vec<_> { rows.into_iter().filter(|row| keyed || row.3 >= horizon).collect() };
        for shards in [1, 2, 5] {
            assert_eq!(live(restored(&files, keyed, shards)), live(before.clone()), "seed {seed}");
        }
        let Some(merged) = merged else { continue };
        let own = restored(&[merged.bytes], keyed, 1);
        assert_eq!(merged.rows, own.len(), "seed {seed}");
        let times: Vec<i64> = own.iter().map(|row| row.3).collect();
        assert_eq!(merged.times, times.iter().min().copied().zip(times.iter().max().copied()), "seed {seed}");
        assert!(keyed || own.iter().all(|row| row.3 >= horizon), "seed {seed}");
    }
}

#[test]
fn a_damaged_file_is_not_merged() {
    let whole = encoded(&[(Some(1), 2, false, 3)]);
    let damaged = whole.slice(..whole.len() - 1);
    assert!(merge(vec![whole, damaged], None, 0).is_err());
    assert!(merge(Vec::new(), None, 0).unwrap().is_none());
}
