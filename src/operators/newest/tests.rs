//! The oracle: a hash map of the newest row per key, against random pushes, flushes, losses and restarts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{Array, AsArray, Int64Array, RecordBatch, StringArray, StringViewArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};

use super::{DirtyBatch, Newest, NewestCut, SNAPSHOT_COLUMNS};
use crate::error::Result;
use crate::stream::dice::Dice;
use crate::stream::{ChangeBatch, Origin};

type Key = (i64, String);
type Order = (i64, i64, i64);

#[derive(Debug, Clone)]
struct Row {
    key: Option<Key>,
    order: Order,
    value: String,
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("value", DataType::Utf8View, true),
        Field::new("user", DataType::Int64, true),
        Field::new("currency", DataType::Utf8, true),
    ]))
}

fn table(ttl: Option<i64>) -> Newest {
    Newest::new(schema(), vec![1, 2], ttl).unwrap()
}

fn batch(rows: &[Row]) -> ChangeBatch {
    let values: StringViewArray = rows.iter().map(|row| Some(row.value.as_str())).collect();
    let users: Int64Array = rows.iter().map(|row| row.key.as_ref().map(|key| key.0)).collect();
    // A NULL key has a NULL in one column only.
    let currencies: StringArray =
        rows.iter().map(|row| Some(row.key.as_ref().map_or("EUR", |key| key.1.as_str()))).collect();
    let columns: Vec<Arc<dyn Array>> = vec![Arc::new(values), Arc::new(users), Arc::new(currencies)];
    let order = |of: fn(&Order) -> i64| Int64Array::from_iter_values(rows.iter().map(|row| of(&row.order)));
    let origin = Origin { time: order(|o| o.0), place: order(|o| o.1), offset: order(|o| o.2) };
    ChangeBatch::append(RecordBatch::try_new(schema(), columns).unwrap(), origin)
}

fn content(rows: &RecordBatch) -> Vec<(Key, String)> {
    let values = rows.column(0).as_string_view();
    let users = rows.column(1).as_primitive::<Int64Type>();
    let currencies = rows.column(2).as_string::<i32>();
    (0..rows.num_rows())
        .map(|row| ((users.value(row), currencies.value(row).to_owned()), values.value(row).to_owned()))
        .collect()
}

fn random_rows(dice: &mut Dice, count: u64, keys: u64, round: u64) -> Vec<Row> {
    let row = |dice: &mut Dice, i: u64| {
        let key = (dice.roll(20) > 0).then(|| {
            let currency = ["EUR", "USD", ""][dice.roll(3) as usize];
            (dice.roll(keys) as i64, currency.to_owned())
        });
        // Few distinct orders, so that ties, equal times and old rows are common.
        let order = (dice.roll(50 + round) as i64, dice.roll(2) as i64, dice.roll(20) as i64);
        Row { key, order, value: format!("a value longer than a view's prefix {round}/{i}") }
    };
    (0..count).map(|i| row(dice, i)).collect()
}

#[derive(Default)]
struct Oracle(BTreeMap<Key, (Order, String)>);

impl Oracle {
    fn push(&mut self, rows: &[Row]) -> usize {
        for row in rows {
            let Some(key) = &row.key else { continue };
            if self.0.get(key).is_none_or(|(order, _)| row.order >= *order) {
                self.0.insert(key.clone(), (row.order, row.value.clone()));
            }
        }
        rows.iter().filter(|row| row.key.is_none()).count()
    }

    fn values(&self) -> BTreeMap<Key, String> {
        self.0.iter().map(|(key, (_, value))| (key.clone(), value.clone())).collect()
    }
}

/// Writes everything that is dirty.
fn flush_all(newest: &mut Newest, store: &mut BTreeMap<Key, String>, max: usize) {
    while let Some(dirty) = newest.take_dirty(max).unwrap() {
        assert!(dirty.slots.len() <= max);
        store.extend(content(&dirty.rows));
        newest.acknowledge(&dirty);
    }
    assert_eq!(newest.dirty_len(), 0);
}

#[test]
fn any_cut_of_pushes_flushes_and_restarts_ends_at_the_newest_row_per_key() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let (mut newest, mut oracle) = (table(None), Oracle::default());
        let mut store: BTreeMap<Key, String> = BTreeMap::new();
        let mut under_way: Vec<DirtyBatch> = Vec::new();
        let mut snapshots: Vec<RecordBatch> = Vec::new();
        // Put together only when they are read: the table has gone on by then.
        let mut cuts: Vec<NewestCut> = Vec::new();
        let mut since_snapshot: Vec<Vec<Row>> = Vec::new();
        for round in 0..120 {
            let count = 1 + dice.roll(if seed % 2 == 0 { 8 } else { 400 });
            let rows = random_rows(&mut dice, count, 150, round);
            assert_eq!(newest.push(&batch(&rows)).unwrap(), oracle.push(&rows));
            since_snapshot.push(rows);
            match dice.roll(8) {
                0..=2 => under_way.extend(newest.take_dirty(1 + dice.roll(60) as usize).unwrap()),
                // The oldest one is written, with the values of the time when it was taken.
                3 if !under_way.is_empty() => {
                    let dirty = under_way.remove(0);
                    store.extend(content(&dirty.rows));
                    newest.acknowledge(&dirty);
                }
                4 => under_way.drain(..).for_each(|dirty| newest.give_back(&dirty)),
                5 => {
                    cuts.extend(newest.cut().unwrap());
                    since_snapshot.clear();
                }
                6 if dice.roll(4) == 0 => {
                    store.clear();
                    under_way.clear();
                    newest.mark_all_dirty();
                    assert_eq!(newest.dirty_len(), newest.len());
                    cuts.extend(newest.cut().unwrap());
                    since_snapshot.clear();
                }
                7 if dice.roll(4) == 0 => {
                    under_way.clear();
                    newest = table(None);
                    snapshots.extend(cuts.drain(..).map(|cut| cut.gather().unwrap()));
                    newest.restore(&snapshots).unwrap();
                    for rows in &since_snapshot {
                        newest.push(&batch(rows)).unwrap();
                    }
                }
                _ => {}
            }
            assert_eq!(newest.len(), oracle.0.len());
        }
        let full = newest.full_cut().unwrap().gather().unwrap();
        assert_eq!(content(&full).into_iter().collect::<BTreeMap<_, _>>(), oracle.values());
        under_way.iter().for_each(|dirty| newest.give_back(dirty));
        flush_all(&mut newest, &mut store, 37);
        assert_eq!(store, oracle.values());
        let (chunks, held) = newest.chunks.shape();
        assert!(chunks <= 64 && held <= 2 * newest.len() + 64 * 1_025, "{chunks} chunks, {held} rows");
    }
}

fn one(user: i64, order: Order, value: &str) -> Row {
    Row { key: Some((user, String::new())), order, value: value.to_owned() }
}

#[test]
fn a_row_replaced_under_way_stays_dirty() {
    let mut newest = table(Some(10_500));
    newest.push(&batch(&[one(1, (5_000, 0, 0), "old"), one(2, (5_000, 0, 1), "two")])).unwrap();
    let first = newest.take_dirty(10).unwrap().unwrap();
    assert_eq!(first.expire_at_ms.as_ref().unwrap().values(), &[15, 15]);
    assert!(newest.take_dirty(10).unwrap().is_none(), "both rows are under way");
    newest.push(&batch(&[one(1, (5_000, 0, 0), "again")])).unwrap();
    newest.push(&batch(&[one(2, (4_999, 9, 9), "older")])).unwrap();
    newest.acknowledge(&first);
    assert_eq!(newest.dirty_len(), 1);
    let second = newest.take_dirty(10).unwrap().unwrap();
    assert_eq!(content(&second.rows), [((1, String::new()), "again".to_owned())]);
    newest.acknowledge(&first);
    assert_eq!(newest.dirty_len(), 1, "an old acknowledgement");
    newest.give_back(&second);
    let third = newest.take_dirty(10).unwrap().unwrap();
    newest.acknowledge(&third);
    newest.give_back(&third);
    assert_eq!((newest.dirty_len(), newest.take_dirty(10).unwrap().is_none()), (0, true));
}

#[test]
fn snapshots_hold_what_changed_and_later_ones_win() {
    let mut newest = table(None);
    newest.push(&batch(&[one(1, (1, 0, 0), "a"), one(2, (1, 0, 1), "b")])).unwrap();
    let dirty = newest.take_dirty(1).unwrap().unwrap();
    newest.acknowledge(&dirty);
    let first = newest.snapshot().unwrap().unwrap();
    assert_eq!(first.num_rows(), 2);
    assert!(newest.snapshot().unwrap().is_none());
    for name in SNAPSHOT_COLUMNS {
        assert!(first.column_by_name(name).is_some());
    }
    newest.push(&batch(&[one(2, (2, 0, 0), "c")])).unwrap();
    let second = newest.snapshot().unwrap().unwrap();
    assert_eq!(second.num_rows(), 1);
    let mut restored = table(None);
    restored.restore(&[first.clone(), second]).unwrap();
    assert_eq!((restored.len(), restored.dirty_len()), (2, 1));
    assert!(restored.snapshot().unwrap().is_none());
    let mut store = BTreeMap::new();
    flush_all(&mut restored, &mut store, 10);
    assert_eq!(store, BTreeMap::from([((2, String::new()), "c".to_owned())]));
    // The stored order still counts.
    restored.push(&batch(&[one(2, (1, 9, 9), "late")])).unwrap();
    assert_eq!(restored.dirty_len(), 0);
    let other = first.project(&[0, 1]).unwrap();
    assert!(restored.restore(&[other]).is_err());
}

#[test]
fn rows_expire_by_watermark_within_a_64th_of_the_ttl() {
    const TTL: i64 = 640;
    for seed in 0..10 {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let mut newest = table(Some(TTL));
        let mut oracle = Oracle::default();
        let mut watermark = 0_i64;
        for round in 0..400_u64 {
            let count = 1 + dice.roll(30);
            let mut rows = random_rows(&mut dice, count, 400, round);
            for row in &mut rows {
                row.order.0 = watermark + dice.roll(100) as i64 - 30;
            }
            newest.push(&batch(&rows)).unwrap();
            oracle.push(&rows);
            watermark += dice.roll(40) as i64;
            let before = newest.len();
            assert_eq!(newest.expire(watermark).unwrap(), before - newest.len());
            let held: BTreeMap<Key, String> = full(&newest).iter().flat_map(content).collect();
            // The table may have dropped the kept row; then an older push can be the newest again. So the oracle
            // forgets what the table forgot, and the table may forget only what has expired.
            oracle.0.retain(|key, (order, _)| {
                let gone = !held.contains_key(key);
                assert!(!gone || order.0 + TTL < watermark, "{key:?} of {} dropped at {watermark}", order.0);
                assert!(
                    gone || order.0 + TTL + 10 >= watermark,
                    "{key:?} of {} kept at {watermark}",
                    order.0
                );
                !gone
            });
            assert_eq!(held, oracle.values());
        }
        let (_, held) = newest.chunks.shape();
        assert!(held <= 2 * newest.len() + 64 * 1_025, "{held} rows for {}", newest.len());
        assert!(newest.filed <= 4 * newest.live + 2_048, "{} entries", newest.filed);
        newest.expire(i64::MAX).unwrap();
        assert_eq!((newest.len(), newest.dirty_len()), (0, 0));
        assert!(newest.take_dirty(10).unwrap().is_none() && newest.snapshot().unwrap().is_none());
    }
}

#[test]
fn weights_of_zero_are_nothing_and_negative_ones_delete() {
    let mut newest = table(None);
    let mut changes = batch(&[one(1, (1, 0, 0), "a"), one(2, (1, 0, 1), "b")]);
    changes.weights = Some(Int64Array::from(vec![0, 1]));
    newest.push(&changes).unwrap();
    assert_eq!((newest.len(), newest.keys.len()), (1, 1));
    changes.weights = Some(Int64Array::from(vec![-1, 1]));
    newest.push(&changes).unwrap();
    let dirty = newest.take_dirty(10).unwrap().unwrap();
    assert_eq!(content(&dirty.rows), [((2, String::new()), "b".to_owned())]);
    assert_eq!(content(&dirty.deletes.unwrap()), [((1, String::new()), "a".to_owned())]);
}

/// Writes up to three dirty keys, or loses them on the way.
fn flush(newest: &mut Newest, store: &mut BTreeMap<Key, String>, lost: bool) {
    let Some(dirty) = newest.take_dirty(3).unwrap() else { return };
    if lost {
        return newest.give_back(&dirty);
    }
    store.extend(content(&dirty.rows));
    for (key, _) in dirty.deletes.iter().flat_map(content) {
        store.remove(&key);
    }
    newest.acknowledge(&dirty);
}

/// Puts and deletes of some of six users, as weighted rows, done to the model too.
fn random_changes(
    dice: &mut Dice,
    order: Order,
    model: &mut BTreeMap<Key, String>,
    since: &mut BTreeSet<Key>,
) -> (Vec<Row>, Vec<i64>) {
    let (mut rows, mut weights) = (Vec::new(), Vec::new());
    for user in 0..6 {
        let key = (user, "EUR".to_owned());
        let row = |value: String| Row { key: Some(key.clone()), order, value };
        let old = model.get(&key).cloned();
        let change = dice.roll(6);
        if change > 1 || change == 1 && old.is_none() {
            continue;
        }
        since.insert(key.clone());
        model.remove(&key);
        old.into_iter().for_each(|old| {
            rows.push(row(old));
            weights.push(-1);
        });
        if change == 0 {
            let value = format!("{}/{}", order.0, dice.roll(1_000));
            rows.push(row(value.clone()));
            weights.push(1);
            model.insert(key, value);
        }
    }
    (rows, weights)
}

/// Random puts and deletes, a store that misses some flushes, and crashes: state and store end as the model.
#[test]
fn deletions_reach_the_store_and_survive_restarts() {
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let (mut newest, mut saved) = (table(None), Vec::new());
        let mut model: BTreeMap<Key, String> = BTreeMap::new();
        let mut store: BTreeMap<Key, String> = BTreeMap::new();
        let mut then = model.clone();
        // Keys touched since the snapshot: what the source would hand out again.
        let mut since: BTreeSet<Key> = BTreeSet::new();
        for round in 0..40 {
            let order = (round as i64, 0, 0);
            let (rows, weights) = random_changes(&mut dice, order, &mut model, &mut since);
            let mut changes = batch(&rows);
            changes.weights = Some(weights.into());
            newest.push(&changes).unwrap();
            flush(&mut newest, &mut store, dice.roll(3) == 0);
            if dice.roll(4) == 0 {
                saved.extend(newest.snapshot().unwrap());
                if dice.roll(4) == 0 {
                    saved = full(&newest).into_iter().collect();
                }
                then = model.clone();
                since.clear();
            }
            if dice.roll(8) == 0 {
                // The store keeps what it got after the snapshot; those rows come again.
                newest = table(None);
                newest.restore(&saved).unwrap();
                let lost: Vec<Key> = since.iter().cloned().collect();
                let again = |key: &Key| Row {
                    key: Some(key.clone()),
                    order,
                    value: then.get(key).cloned().unwrap_or_default(),
                };
                let mut changes = batch(&lost.iter().map(again).collect::<Vec<_>>());
                changes.weights = Some(
                    lost.iter()
                        .map(|key| if then.contains_key(key) { 1 } else { -1 })
                        .collect::<Vec<_>>()
                        .into(),
                );
                newest.push(&changes).unwrap();
                model = then.clone();
            }
        }
        while newest.dirty_len() > 0 {
            flush(&mut newest, &mut store, false);
        }
        assert_eq!(store, model, "seed {seed}");
        newest.snapshot().unwrap();
        assert_eq!(newest.len(), model.len(), "seed {seed}: deletions are forgotten");
    }
}

/// Another table's keys are deleted, unless rows come for them, over any restarts; even where rows expire.
#[test]
fn what_another_table_held_is_deleted_or_replaced() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let mut former = Newest::new(
            Arc::new(Schema::new(vec![
                Field::new("currency", DataType::Utf8, true),
                Field::new("gone", DataType::Utf8View, false),
                Field::new("user", DataType::Int64, true),
            ])),
            vec![2, 0],
            None,
        )
        .unwrap();
        let mut store = BTreeMap::new();
        let rows = random_rows(&mut dice, 200, 60, 0);
        let turned = batch(&rows);
        let columns = [2, 0, 1].map(|column| Arc::clone(turned.rows.column(column))).to_vec();
        let turned = RecordBatch::try_new(former.schema().clone(), columns).unwrap();
        former.push(&ChangeBatch::append(turned, batch(&rows).origin)).unwrap();
        for row in rows.iter().filter(|row| row.key.is_some()) {
            store.insert(row.key.clone().unwrap(), row.value.clone());
        }
        let snapshot = former.snapshot().unwrap();
        let mut newest = table((seed % 2 == 0).then_some(1_000_000));
        newest.bury(snapshot.as_slice()).unwrap();
        let (mut oracle, mut saved) = (Oracle::default(), Vec::new());
        for round in 1..10 {
            let rows = random_rows(&mut dice, 30, 40, round);
            newest.push(&batch(&rows)).unwrap();
            oracle.push(&rows);
            newest.expire(round as i64).unwrap();
            saved.extend(newest.snapshot().unwrap());
            if dice.roll(3) == 0 {
                newest = table((seed % 2 == 0).then_some(1_000_000));
                newest.restore(&saved).unwrap();
            }
        }
        while newest.dirty_len() > 0 {
            flush(&mut newest, &mut store, dice.roll(4) == 0);
        }
        assert_eq!(store, oracle.values());
    }
}

/// A row that comes in the place of another table's and expires before the store has it.
#[test]
fn an_expired_row_of_a_table_that_takes_over_is_deleted() {
    let mut former = table(Some(100));
    former.push(&batch(&[one(1, (500, 0, 0), "former"), one(2, (500, 0, 1), "former")])).unwrap();
    let snapshot = former.snapshot().unwrap();
    let mut newest = table(Some(100));
    newest.take_over();
    newest.bury(snapshot.as_slice()).unwrap();
    newest.push(&batch(&[one(1, (10, 0, 0), "old"), one(2, (510, 0, 1), "new")])).unwrap();
    newest.expire(520).unwrap();
    let mut store: BTreeMap<Key, String> =
        [1, 2].map(|user| ((user, String::new()), "former".to_owned())).into();
    flush(&mut newest, &mut store, false);
    assert_eq!(store, [((2, String::new()), "new".to_owned())].into());
}

impl Newest {
    fn snapshot(&mut self) -> Result<Option<RecordBatch>> {
        self.cut()?.map(NewestCut::gather).transpose()
    }
}

fn full(newest: &Newest) -> Option<RecordBatch> {
    newest.full_cut().map(|cut| cut.gather().unwrap())
}
