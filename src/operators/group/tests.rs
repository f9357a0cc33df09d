//! The oracle: random rows, cuts and restarts against DataFusion's own GROUP BY over the same rows.

use std::collections::BTreeMap;

use arrow::array::{Array, Float64Array, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::Float64Type;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::aggregate::AggregateExprBuilder;
use datafusion::physical_plan::expressions::Column;
use datafusion::prelude::SessionContext;

use super::*;
use crate::state::files;
use crate::stream::END_OF_TIME;
use crate::stream::dice::Dice;

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("k", DataType::Int64, true),
        Field::new("s", DataType::Utf8, true),
        Field::new("u", DataType::Int64, true),
        Field::new("a", DataType::Float64, true),
        Field::new("f", DataType::Boolean, true),
        Field::new("w", crate::stream::timestamp_type(), false),
    ]))
}

/// µs of a window.
const WINDOW: i64 = 20;

/// Aggregates as (function, column, DISTINCT, FILTER).
const CALLS: [(&str, usize, bool, bool); 11] = [
    ("count", 2, false, false),
    ("count", 2, false, true),
    ("sum", 2, false, false),
    ("sum", 3, false, true),
    ("avg", 3, false, false),
    ("min", 1, false, false),
    ("max", 2, false, true),
    ("bool_or", 4, false, false),
    ("count", 1, true, false),
    ("stddev", 3, false, false),
    ("median", 3, false, false),
];

/// DataFusion with our aggregates.
fn session() -> SessionContext {
    let mut session = SessionContext::new();
    millstream_udfs::register_all(&mut session).unwrap();
    session
}

fn spec(keys: &[usize]) -> GroupSpec {
    let session = session().state();
    let call = |(number, (name, column, distinct, filter)): (usize, &(&str, usize, bool, bool))| {
        let function = Arc::clone(&session.aggregate_functions()[*name]);
        let schema = schema();
        let argument: Arc<dyn PhysicalExpr> = Arc::new(Column::new(schema.field(*column).name(), *column));
        let function = AggregateExprBuilder::new(function, vec![argument])
            .schema(schema)
            .alias(format!("c{number}"))
            .with_distinct(*distinct)
            .build()
            .unwrap();
        let output = function.field();
        Aggregate {
            output: Arc::new(Field::new(format!("c{number}"), output.data_type().clone(), true)),
            function: Arc::new(function),
            arguments: vec![*column],
            filter: filter.then_some(4),
        }
    };
    GroupSpec {
        input: schema(),
        keys: keys.to_vec(),
        calls: CALLS.iter().enumerate().map(call).collect(),
        exchange: (0..keys.len()).collect(),
        closing: None,
        total: None,
        want_final: false,
        want_changes: true,
        want_latest: true,
    }
}

/// Rows of `count` records from offset `first` on, not older than `since`, with the start of their window.
fn random(dice: &mut Dice, count: usize, first: i64, since: i64) -> ChangeBatch {
    let keys = 1 + dice.roll(12);
    let mut maybe = |bound: u64| (dice.roll(10) > 0).then(|| dice.roll(bound) as i64);
    let k: Int64Array = (0..count).map(|_| maybe(keys)).collect();
    let s: StringArray = (0..count).map(|_| maybe(4).map(|n| format!("s{n}"))).collect();
    let u: Int64Array = (0..count).map(|_| maybe(1_000)).collect();
    let a: Float64Array = (0..count).map(|_| maybe(100_000).map(|n| n as f64 / 100.0 - 300.0)).collect();
    let f: BooleanArray = (0..count).map(|_| maybe(2).map(|n| n == 1)).collect();
    let time: Int64Array = (0..count).map(|_| Some(since + dice.roll(50) as i64)).collect();
    let starts = time.values().iter().map(|time| time.div_euclid(WINDOW) * WINDOW);
    let w = TimestampMicrosecondArray::from_iter_values(starts).with_timezone("UTC");
    let columns: Vec<ArrayRef> =
        vec![Arc::new(k), Arc::new(s), Arc::new(u), Arc::new(a), Arc::new(f), Arc::new(w)];
    let rows = RecordBatch::try_new(schema(), columns).unwrap();
    let offset = Int64Array::from_iter_values(first..first + count as i64);
    ChangeBatch::append(rows, Origin { time, place: Int64Array::from(vec![0; count]), offset })
}

/// Rows as text → how often. Floats are exact, but for `stddev`, which depends on the order of merges.
type Bag = BTreeMap<String, i64>;

fn add(bag: &mut Bag, rows: &RecordBatch, weights: Option<&Int64Array>) {
    let schema = rows.schema();
    for row in 0..rows.num_rows() {
        let cell = |(column, name): (&ArrayRef, &str)| match column.data_type() {
            DataType::Float64 if column.is_valid(row) && name == "c9" => {
                // The square root of a rounding error is no rounding error.
                let value = column.as_primitive::<Float64Type>().value(row);
                // And cents divided by a few rows often lie half way between two roundings: moved away from there.
                format!("{:.4}", if value.abs() < 1e-4 { 0.0 } else { value + 3.3e-6 })
            }
            _ => arrow::util::display::array_value_to_string(column, row).unwrap(),
        };
        let names = schema.fields().iter().map(|field| field.name().as_str());
        let text = rows.columns().iter().zip(names).map(cell).collect::<Vec<_>>().join("|");
        let count = bag.entry(text.clone()).or_default();
        *count += weights.map_or(1, |weights| weights.value(row));
        if *count == 0 {
            bag.remove(&text);
        }
    }
}

/// Puts rows by their key columns.
fn newest(store: &mut BTreeMap<String, String>, rows: Option<&ChangeBatch>, keys: usize) {
    for batch in rows.into_iter() {
        for row in 0..batch.num_rows() {
            let mut one = Bag::new();
            add(&mut one, &batch.rows.slice(row, 1), None);
            let text = one.into_keys().next().unwrap();
            let key = text.split('|').take(keys).collect::<Vec<_>>().join("|");
            store.insert(key, text);
        }
    }
}

async fn expected(session: &SessionContext, batches: &[RecordBatch], keys: &[usize]) -> Bag {
    let whole = concat_batches(&schema(), batches).unwrap();
    session.deregister_table("t").unwrap();
    session.register_batch("t", whole).unwrap();
    let calls: Vec<String> = CALLS
        .iter()
        .map(|(name, column, distinct, filter)| {
            let distinct = if *distinct { "DISTINCT " } else { "" };
            let filter = if *filter { " FILTER (WHERE f)" } else { "" };
            format!("{name}({distinct}{}){filter}", schema().field(*column).name())
        })
        .enumerate()
        .map(|(number, call)| format!("{call} AS c{number}"))
        .collect();
    let by: Vec<String> = keys.iter().map(|key| schema().field(*key).name().clone()).collect();
    let sql = format!("SELECT {}, {} FROM t GROUP BY {}", by.join(", "), calls.join(", "), by.join(", "));
    let mut bag = Bag::new();
    for batch in session.sql(&sql).await.unwrap().collect().await.unwrap() {
        add(&mut bag, &batch, None);
    }
    bag
}

#[tokio::test]
async fn accumulated_changes_are_the_batch_answer() {
    let cases: u64 = std::env::var("MILLSTREAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    let session = session();
    for seed in 0..cases {
        let mut dice = Dice(seed);
        let keys: &[usize] = [&[0][..], &[1], &[0, 1]][dice.roll(3) as usize];
        let mut group = Group::new(spec(keys)).unwrap();
        let (mut snapshots, mut bag, mut batches) = (Vec::new(), Bag::new(), Vec::new());
        // The newest row per key, as an online store has it.
        let mut latest: BTreeMap<String, String> = BTreeMap::new();
        let mut saved: Option<(Bag, BTreeMap<String, String>, usize)> = None;
        for _ in 0..1 + dice.roll(12) {
            let count = dice.roll(40) as usize;
            let input = random(&mut dice, count, batches.len() as i64 * 100, 0);
            let pushed = group.push(&input).unwrap();
            newest(&mut latest, pushed.latest.as_ref(), keys.len());
            if let Some(out) = pushed.changes {
                add(&mut bag, &out.rows, out.weights.as_ref());
            }
            batches.push(input.rows);
            if dice.roll(3) == 0 {
                let full = dice.roll(3) == 0;
                if full {
                    snapshots.clear();
                }
                snapshots.extend(group.snapshot(full).unwrap());
                saved = Some((bag.clone(), latest.clone(), batches.len()));
            }
            // A crash: what came after the last snapshot is lost and comes again.
            if dice.roll(5) == 0
                && let Some((then, store, length)) = saved.clone()
            {
                group = Group::new(spec(keys)).unwrap();
                group.restore(&snapshots).unwrap();
                (bag, latest) = (then, store);
                batches.truncate(length);
            }
            assert_eq!(latest.len(), bag.len(), "seed {seed}: latest");
            assert!(latest.values().all(|row| bag.contains_key(row)), "seed {seed}: latest");
            assert!(bag.values().all(|count| *count == 1), "seed {seed}: {bag:?}");
            assert_eq!(bag, expected(&session, &batches, keys).await, "seed {seed}");
        }
    }
}

#[test]
fn nothing_is_said_of_rows_that_stay_the_same() {
    let mut spec = spec(&[0]);
    spec.calls = vec![spec.calls[1].clone()];
    let mut group = Group::new(spec).unwrap();
    let input = |flag: bool, offset: i64| {
        let mut batch = random(&mut Dice(1), 1, offset, 0);
        let mut columns = batch.rows.columns().to_vec();
        columns[0] = Arc::new(Int64Array::from(vec![7]));
        columns[2] = Arc::new(Int64Array::from(vec![1]));
        columns[4] = Arc::new(BooleanArray::from(vec![flag]));
        batch.rows = RecordBatch::try_new(schema(), columns).unwrap();
        batch
    };
    let first = group.push(&input(true, 0)).unwrap().changes.unwrap();
    assert!(first.weights.is_none() && first.rows.num_rows() == 1);
    let same = group.push(&input(false, 1)).unwrap();
    assert!(same.changes.is_none() && same.latest.unwrap().num_rows() == 1);
    let second = group.push(&input(true, 2)).unwrap().changes.unwrap();
    assert_eq!(second.weights.unwrap().values().to_vec(), [-1, 1]);
    assert_eq!(second.origin.offset.values().to_vec(), [1, 2]);
    assert_eq!(group.len(), 1);
}

fn windowed(keys: &[usize]) -> Panes {
    let closing = keys.iter().position(|key| *key == 5).map(|key| Closing { key, bound: WINDOW });
    Panes::new(GroupSpec { closing, want_final: true, ..spec(keys) }).unwrap()
}

/// Rows that the watermark has not passed, cuts, restarts: closed windows are the batch answer, each once; what
/// changed adds up to it too, and so do the newest rows.
#[tokio::test]
async fn closed_windows_are_the_batch_answer() {
    let cases: u64 = std::env::var("MILLSTREAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    let session = session();
    for seed in 0..cases {
        let mut dice = Dice(seed);
        let keys: &[usize] = [&[0, 5][..], &[5], &[5, 1]][dice.roll(3) as usize];
        let mut panes = windowed(keys);
        let (mut snapshots, mut finals, mut bag) = (Vec::new(), Bag::new(), Bag::new());
        let (mut batches, mut watermark, mut open) = (Vec::new(), 0, 0);
        let mut latest: BTreeMap<String, String> = BTreeMap::new();
        let mut saved = (finals.clone(), bag.clone(), latest.clone(), 0, 0);
        for _ in 0..1 + dice.roll(12) {
            let count = 1 + dice.roll(40) as usize;
            let input = random(&mut dice, count, batches.len() as i64 * 100, watermark);
            let pushed = panes.push(&input).unwrap();
            newest(&mut latest, pushed.latest.as_ref(), keys.len());
            if let Some(out) = pushed.changes {
                add(&mut bag, &out.rows, out.weights.as_ref());
            }
            batches.push(input.rows);
            watermark += dice.roll(60) as i64;
            for out in panes.advance(watermark).unwrap() {
                assert!(out.origin.time.values().iter().all(|time| time + WINDOW <= watermark));
                add(&mut finals, &out.rows, None);
            }
            open = open.max(panes.len());
            if dice.roll(3) == 0 {
                let full = dice.roll(3) == 0;
                if full {
                    snapshots.clear();
                }
                snapshots.extend(panes.snapshot(full).unwrap());
                saved = (finals.clone(), bag.clone(), latest.clone(), batches.len(), watermark);
            }
            if dice.roll(5) == 0 {
                panes = windowed(keys);
                let length;
                (finals, bag, latest, length, watermark) = saved.clone();
                panes.restore(&snapshots, watermark).unwrap();
                batches.truncate(length);
            }
        }
        let whole = match batches.is_empty() {
            true => Bag::new(),
            false => expected(&session, &batches, keys).await,
        };
        assert_eq!(bag, whole, "seed {seed}: changes");
        assert_eq!(latest.into_values().map(|row| (row, 1)).collect::<Bag>(), whole, "seed {seed}: latest");
        panes.advance(END_OF_TIME).unwrap().iter().for_each(|out| add(&mut finals, &out.rows, None));
        assert_eq!(finals, whole, "seed {seed}: final");
        assert!(panes.is_empty() && panes.snapshot(true).unwrap().is_none());
    }
}

/// A key, 1, and a number.
fn numbers() -> SchemaRef {
    let fields = ["k", "one", "v"].map(|name| Field::new(name, DataType::Int64, name == "k"));
    Arc::new(Schema::new(fields.to_vec()))
}

fn sum(schema: &SchemaRef, column: usize) -> Aggregate {
    let session = session().state();
    let argument: Arc<dyn PhysicalExpr> = Arc::new(Column::new(schema.field(column).name(), column));
    let sum = Arc::clone(&session.aggregate_functions()["sum"]);
    let function = AggregateExprBuilder::new(sum, vec![argument])
        .schema(Arc::clone(schema))
        .alias(format!("s{column}"))
        .build()
        .unwrap();
    let output = Arc::new(Field::new(format!("s{column}"), DataType::Int64, true));
    Aggregate { function: Arc::new(function), arguments: vec![column], filter: None, output }
}

/// Rows come and are taken back: what changed adds up to the batch answer over the rows that are left, groups without
/// rows are gone, and the newest rows say the same.
#[test]
fn rows_are_taken_back() {
    let schema = numbers();
    let cases: u64 = std::env::var("MILLSTREAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    for seed in 0..cases {
        let mut dice = Dice(seed);
        let calls = vec![sum(&schema, 1), sum(&schema, 2)];
        let spec = GroupSpec { input: Arc::clone(&schema), calls, total: Some(0), ..spec(&[0]) };
        let mut group = Group::new(spec).unwrap();
        let mut left: Vec<(Option<i64>, i64)> = Vec::new();
        let (mut bag, mut latest) = (Bag::new(), BTreeMap::new());
        for round in 0..1 + dice.roll(10) as i64 {
            let mut rows: Vec<(Option<i64>, i64, i64)> = Vec::new();
            for _ in 0..1 + dice.roll(20) {
                if dice.roll(2) == 0 && !left.is_empty() {
                    let (k, v) = left.swap_remove(dice.roll(left.len() as u64) as usize);
                    rows.push((k, v, -1));
                } else {
                    let (k, v) = ((dice.roll(6) > 0).then(|| dice.roll(5) as i64), dice.roll(100) as i64);
                    left.push((k, v));
                    rows.push((k, v, 1));
                }
            }
            let count = rows.len() as i64;
            let columns: Vec<ArrayRef> = vec![
                Arc::new(rows.iter().map(|row| row.0).collect::<Int64Array>()),
                Arc::new(Int64Array::from(vec![1; rows.len()])),
                Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.1))),
            ];
            let order = Int64Array::from_iter_values(round * 100..round * 100 + count);
            let origin = Origin { time: order.clone(), place: order.clone(), offset: order };
            let weights = Some(Int64Array::from_iter_values(rows.iter().map(|row| row.2)));
            let input = RecordBatch::try_new(Arc::clone(&schema), columns).unwrap();
            let pushed = group.push(&ChangeBatch { rows: input, weights, origin }).unwrap();
            if let Some(out) = &pushed.changes {
                add(&mut bag, &out.rows, out.weights.as_ref());
            }
            let out = pushed.latest.unwrap();
            for row in 0..out.num_rows() {
                let mut one = Bag::new();
                add(&mut one, &out.rows.slice(row, 1), None);
                let text = one.into_keys().next().unwrap();
                let key = text.split('|').next().unwrap().to_owned();
                match out.weights.as_ref().map_or(1, |weights| weights.value(row)) {
                    1 => latest.insert(key, text),
                    _ => latest.remove(&key),
                };
            }
            let mut sums: BTreeMap<Option<i64>, (i64, i64)> = BTreeMap::new();
            for (k, v) in &left {
                let entry = sums.entry(*k).or_default();
                *entry = (entry.0 + 1, entry.1 + v);
            }
            let text = |k: &Option<i64>| k.map(|k| k.to_string()).unwrap_or_default();
            let expected: Bag = sums.iter().map(|(k, (n, v))| (format!("{}|{n}|{v}", text(k)), 1)).collect();
            assert_eq!(bag, expected, "seed {seed}");
            assert_eq!(
                latest.values().map(|row| (row.clone(), 1)).collect::<Bag>(),
                expected,
                "seed {seed}: latest"
            );
        }
    }
}

/// Of rows that can be taken back: a key, 1, values of several types, and a weight as FILTER makes it.
fn values() -> SchemaRef {
    let field = |name: &str, kind, nullable| Field::new(name, kind, nullable);
    Arc::new(Schema::new(vec![
        field("k", DataType::Int64, true),
        field("one", DataType::Int64, false),
        field("s", DataType::Utf8, true),
        field("u", DataType::Int64, true),
        field("a", DataType::Float64, true),
        field("d", DataType::Decimal128(12, 2), true),
        field("t", crate::stream::timestamp_type(), true),
        field("b", DataType::Boolean, true),
        field("f", DataType::Int64, false),
    ]))
}

fn extent_of(column: usize, weight: usize) -> Aggregate {
    let schema = values();
    let argument = |at: usize| Arc::new(Column::new(schema.field(at).name(), at)) as Arc<dyn PhysicalExpr>;
    let name = format!("e{column}_{weight}");
    let function =
        AggregateExprBuilder::new(Arc::new(extent::extent()), vec![argument(column), argument(weight)])
            .schema(Arc::clone(&schema))
            .alias(&name)
            .build()
            .unwrap();
    let output = Arc::new(Field::new(&name, function.field().data_type().clone(), true));
    Aggregate { function: Arc::new(function), arguments: vec![column, weight], filter: None, output }
}

/// Column and weight of each extent.
const EXTENTS: [(usize, usize); 7] = [(2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (3, 8)];

fn extents() -> Group {
    let calls = [sum(&values(), 1)].into_iter();
    let calls = calls.chain(EXTENTS.map(|(column, weight)| extent_of(column, weight))).collect();
    Group::new(GroupSpec { input: values(), calls, total: Some(0), ..spec(&[0]) }).unwrap()
}

fn random_values(dice: &mut Dice, count: usize) -> RecordBatch {
    let few = 1 + dice.roll(30);
    let mut maybe = |bound: u64| (dice.roll(8) > 0).then(|| dice.roll(bound) as i64);
    let mut column = |bound: u64| -> Vec<Option<i64>> { (0..count).map(|_| maybe(bound)).collect() };
    let ints = |values: Vec<Option<i64>>| Arc::new(Int64Array::from(values)) as ArrayRef;
    let k = ints(column(5));
    let s: StringArray = column(few)
        .into_iter()
        .map(|n| n.map(|n| ["", "a", "ab", "b"][n as usize % 4].repeat(1 + n as usize / 4)))
        .collect();
    let u = ints(column(few));
    let a: Float64Array = column(few).into_iter().map(|n| n.map(|n| n as f64 / 4.0 - 1.125)).collect();
    let d: Decimal128Array = column(few).into_iter().map(|n| n.map(|n| i128::from(n) - 7)).collect();
    let t: TimestampMicrosecondArray = column(few).into_iter().collect();
    let b: BooleanArray = column(2).into_iter().map(|n| n.map(|n| n == 1)).collect();
    let f = Int64Array::from_iter_values(column(2).into_iter().map(|n| n.unwrap_or(0)));
    let columns: Vec<ArrayRef> = vec![
        k,
        Arc::new(Int64Array::from(vec![1; count])),
        Arc::new(s),
        u,
        Arc::new(a),
        Arc::new(d.with_precision_and_scale(12, 2).unwrap()),
        Arc::new(t.with_timezone("UTC")),
        Arc::new(b),
        Arc::new(f),
    ];
    RecordBatch::try_new(values(), columns).unwrap()
}

/// DataFusion's `min`, `max` and `count(DISTINCT …)` over the rows that are left, in the structs of extents.
async fn expected_extents(session: &SessionContext, left: &[RecordBatch]) -> Bag {
    session.deregister_table("t").unwrap();
    session.register_batch("t", concat_batches(&values(), left).unwrap()).unwrap();
    let calls = EXTENTS.map(|(column, weight)| {
        let name = values().field(column).name().clone();
        let filter = if weight == 1 { "" } else { " FILTER (WHERE f = 1)" };
        format!(
            "named_struct('least', min({name}){filter}, 'greatest', max({name}){filter},
                          'different', count(DISTINCT {name}){filter})"
        )
    });
    let sql = format!("SELECT k, count(*), {} FROM t GROUP BY k", calls.join(", "));
    let mut bag = Bag::new();
    for batch in session.sql(&sql).await.unwrap().collect().await.unwrap() {
        add(&mut bag, &batch, None);
    }
    bag
}

/// Random rows come and are taken back, in whatever order within a batch, across restarts from state files.
#[tokio::test]
async fn extents_of_rows_that_are_taken_back_are_the_batch_answer() {
    let cases: u64 = std::env::var("MILLSTREAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    let session = SessionContext::new();
    for seed in 0..cases {
        let mut dice = Dice(seed);
        let (mut group, mut left, mut bag) = (extents(), Vec::<RecordBatch>::new(), Bag::new());
        let mut snapshots: Vec<RecordBatch> = Vec::new();
        let mut saved = (left.clone(), bag.clone());
        for round in 0..1 + dice.roll(10) as i64 {
            let count = 1 + dice.roll(20) as usize;
            let new = random_values(&mut dice, count);
            let mut rows: Vec<(RecordBatch, i64)> = Vec::new();
            for row in 0..count {
                left.push(new.slice(row, 1));
                rows.push((new.slice(row, 1), 1));
            }
            for _ in 0..dice.roll(2 * count as u64) {
                if !left.is_empty() {
                    let gone = left.swap_remove(dice.roll(left.len() as u64) as usize);
                    rows.insert(dice.roll(1 + rows.len() as u64) as usize, (gone, -1));
                }
            }
            let input = concat_batches(&values(), rows.iter().map(|row| &row.0)).unwrap();
            let order = Int64Array::from_iter_values((0..rows.len() as i64).map(|row| round * 100 + row));
            let origin = Origin { time: order.clone(), place: order.clone(), offset: order };
            let weights = Some(Int64Array::from_iter_values(rows.iter().map(|row| row.1)));
            if let Some(out) = group.push(&ChangeBatch { rows: input, weights, origin }).unwrap().changes {
                add(&mut bag, &out.rows, out.weights.as_ref());
            }
            assert_eq!(bag, expected_extents(&session, &left).await, "seed {seed}");
            if dice.roll(3) == 0 {
                let full = dice.roll(3) == 0;
                if full {
                    snapshots.clear();
                }
                if let Some(snapshot) = group.snapshot(full).unwrap() {
                    hash_keys(&group.key_columns(&snapshot), snapshot.num_rows(), &mut group.hashes).unwrap();
                    let sorted = files::sort_by_group(&snapshot, &group.hashes).unwrap();
                    snapshots.extend(files::decode(files::encode(&sorted).unwrap(), 0..256).unwrap());
                }
                saved = (left.clone(), bag.clone());
            }
            if dice.roll(5) == 0 {
                group = extents();
                let without =
                    |batch: &RecordBatch| batch.project(&(1..batch.num_columns()).collect::<Vec<_>>());
                let rows: Vec<RecordBatch> = snapshots.iter().map(|batch| without(batch).unwrap()).collect();
                group.restore(&rows).unwrap();
                (left, bag) = saved.clone();
            }
        }
    }
}
