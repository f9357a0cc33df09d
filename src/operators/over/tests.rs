//! The oracle: random rows, cuts, watermarks and restarts against DataFusion's own windows over the same rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, SchemaRef, UInt64Type};
use datafusion::prelude::SessionContext;

use super::super::group::Closing;
use super::{Frame, Function, Over, OverSpec, WindowCall};
use crate::stream::dice::Dice;
use crate::stream::{ChangeBatch, END_OF_TIME, Origin, START_OF_TIME, timestamp_type};

#[derive(Debug, Clone)]
struct Row {
    id: i64,
    key: Option<i64>,
    time: i64,
    place: i64,
    amount: Option<f64>,
    units: Option<i64>,
    flag: Option<bool>,
    note: Option<String>,
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("k", DataType::Int64, true),
        Field::new("t", timestamp_type(), false),
        Field::new("a", DataType::Float64, true),
        Field::new("u", DataType::Int64, true),
        Field::new("f", DataType::Boolean, true),
        Field::new("s", DataType::Utf8, true),
        Field::new("w", timestamp_type(), false),
    ]))
}

fn batch(rows: &[Row]) -> ChangeBatch {
    let times = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.time)).with_timezone("UTC");
    let starts = rows.iter().map(|r| r.time / WINDOW * WINDOW);
    let windows = TimestampMicrosecondArray::from_iter_values(starts).with_timezone("UTC");
    let batch = RecordBatch::try_new(
        schema(),
        vec![
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| r.id))),
            Arc::new(rows.iter().map(|r| r.key).collect::<Int64Array>()),
            Arc::new(times),
            Arc::new(rows.iter().map(|r| r.amount).collect::<Float64Array>()),
            Arc::new(rows.iter().map(|r| r.units).collect::<Int64Array>()),
            Arc::new(rows.iter().map(|r| r.flag).collect::<BooleanArray>()),
            Arc::new(rows.iter().map(|r| r.note.clone()).collect::<StringArray>()),
            Arc::new(windows),
        ],
    );
    let long = |of: fn(&Row) -> i64| Int64Array::from_iter_values(rows.iter().map(of));
    ChangeBatch::append(
        batch.unwrap(),
        Origin { time: long(|r| r.time), place: long(|r| r.place), offset: long(|r| r.id) },
    )
}

/// Rows in arrival order: event times rise on the whole, with disorder below `lateness`, ties, nulls, a hot key.
fn arrivals(dice: &mut Dice, count: usize, lateness: i64) -> Vec<Row> {
    let mut front = 1_000_000i64;
    let nullable = |dice: &mut Dice, value: i64| (!dice.chance(15)).then_some(value);
    (0..count as i64)
        .map(|id| {
            front += dice.roll(30) as i64;
            let key = if dice.chance(30) { 0 } else { dice.roll(12) as i64 };
            let amount = nullable(dice, dice_range(dice.0)).map(|v| v as f64 / 64.0);
            Row {
                id,
                key: (!dice.chance(3)).then_some(key),
                time: (front - dice.roll(lateness as u64) as i64) / 8 * 8,
                place: dice.roll(3) as i64,
                amount,
                units: nullable(dice, dice_range(dice.0)),
                flag: (!dice.chance(10)).then_some(dice.chance(60)),
                note: (!dice.chance(20)).then(|| format!("n{}", id % 5)),
            }
        })
        .collect()
}

fn dice_range(seed: u64) -> i64 {
    (seed >> 40) as i64 % 20_001 - 10_000
}

/// µs of the windows by which some keys close.
const WINDOW: i64 = 160;

const CALLS: [(&str, Function, Option<usize>); 10] = [
    ("row_number()", Function::RowNumber, None),
    ("count(*)", Function::Count, None),
    ("count(s)", Function::Count, Some(6)),
    ("sum(a)", Function::Sum, Some(3)),
    ("sum(u)", Function::Sum, Some(4)),
    ("avg(a)", Function::Avg, Some(3)),
    ("min(a)", Function::Min, Some(3)),
    ("max(a)", Function::Max, Some(3)),
    ("min(u)", Function::Min, Some(4)),
    ("max(u)", Function::Max, Some(4)),
];

/// Random calls, and the same as SQL.
fn random_calls(dice: &mut Dice, by: &str) -> (Vec<WindowCall>, String) {
    let mut calls = Vec::new();
    let mut columns = Vec::new();
    for at in 0..2 + dice.roll(4) as usize {
        let (sql, function, argument) = CALLS[dice.roll(CALLS.len() as u64) as usize];
        let micros = [0, 40, 300, 5_000][dice.roll(4) as usize];
        let (frame, start) = match dice.chance(40) {
            true => (Frame::Unbounded, "UNBOUNDED".to_owned()),
            false => (Frame::Preceding { micros }, format!("INTERVAL '{micros} microseconds'")),
        };
        if function == Function::RowNumber {
            columns.push(format!("row_number() OVER (PARTITION BY {by} ORDER BY t, place, id) AS c{at}"));
            let output = Arc::new(Field::new(format!("c{at}"), DataType::UInt64, false));
            let frame = Frame::Unbounded;
            calls.push(WindowCall { function, argument, filter: None, frame, output });
            continue;
        }
        let filter = dice.chance(25).then_some(5);
        let condition = if filter.is_some() { " FILTER (WHERE f)" } else { "" };
        columns.push(format!("{sql}{condition} OVER (PARTITION BY {by} ORDER BY t RANGE BETWEEN {start} PRECEDING AND CURRENT ROW) AS c{at}"));
        let of = argument.map(|column| schema().field(column).data_type().clone());
        let output = Arc::new(Field::new(format!("c{at}"), function.output_type(of.as_ref()).unwrap(), true));
        calls.push(WindowCall { function, argument, filter, frame, output });
    }
    (calls, columns.join(", "))
}

/// Results by row id, as batch DataFusion gives them.
async fn oracle(rows: &[Row], sql: &str) -> BTreeMap<i64, Vec<Option<f64>>> {
    let mut session = SessionContext::new();
    millstream_udfs::register_all(&mut session).unwrap();
    let input = batch(rows);
    let mut columns = input.rows.columns().to_vec();
    columns.push(Arc::new(input.origin.place.clone()));
    let mut fields = schema().fields().to_vec();
    fields.push(Arc::new(Field::new("place", DataType::Int64, false)));
    let input = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap();
    session.register_batch("r", input).unwrap();
    let answer = session.sql(&format!("SELECT id, {sql} FROM r")).await.unwrap().collect().await.unwrap();
    answer.iter().flat_map(|batch| results(batch, 1)).collect()
}

/// Results from column `first` on, by the id in column 0.
fn results(batch: &RecordBatch, first: usize) -> Vec<(i64, Vec<Option<f64>>)> {
    let ids = batch.column(0).as_primitive::<Int64Type>();
    let value = |column: usize, row: usize| {
        let column = batch.column(column);
        if column.is_null(row) {
            return None;
        }
        Some(match column.data_type() {
            DataType::Int64 => column.as_primitive::<Int64Type>().value(row) as f64,
            DataType::UInt64 => column.as_primitive::<UInt64Type>().value(row) as f64,
            _ => column.as_primitive::<Float64Type>().value(row),
        })
    };
    let row = |row: usize| (ids.value(row), (first..batch.num_columns()).map(|c| value(c, row)).collect());
    (0..batch.num_rows()).map(row).collect()
}

/// What has been snapshot so far.
#[derive(Default)]
struct Saved {
    rows: Vec<RecordBatch>,
    keys: Vec<RecordBatch>,
}

fn restart(over: &mut Over, spec: &OverSpec, saved: &mut Saved) {
    let (cut, horizon, watermark) = (over.cut().unwrap(), over.horizon(), over.watermark());
    // It is put together later, and holds what was there at the cut.
    over.advance(END_OF_TIME).unwrap();
    saved.rows.extend(cut.rows.gather().unwrap());
    saved.keys.extend(cut.keys.gather().unwrap());
    saved
        .rows
        .retain(|rows| crate::state::compaction::times_of(rows).is_some_and(|(_, newest)| newest >= horizon));
    let mut next = Over::new(spec.clone()).unwrap();
    next.restore(&saved.rows, &saved.keys, watermark).unwrap();
    *over = next;
}

/// Ids of the greatest rows of the keys that `part` touches.
fn greatest(accepted: &[Row], part: &[Row], windowed: bool) -> Vec<i64> {
    let key = |row: &Row| (row.key, if windowed { row.time / WINDOW } else { 0 });
    let mut greatest: BTreeMap<(Option<i64>, i64), &Row> = BTreeMap::new();
    for row in accepted {
        let best = greatest.entry(key(row)).or_insert(row);
        if (row.time, row.place, row.id) > (best.time, best.place, best.id) {
            *best = row;
        }
    }
    let mut ids: Vec<i64> = part.iter().map(|row| greatest[&key(row)].id).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

async fn run_case(seed: u64) {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let lateness = 1 + dice.roll(400) as i64;
    let count = 50 + dice.roll(150) as usize;
    let rows = arrivals(&mut dice, count, lateness);
    let windowed = dice.chance(50);
    let (calls, sql) = random_calls(&mut dice, if windowed { "k, w" } else { "k" });
    let spec = OverSpec {
        input: schema(),
        partition_by: if windowed { vec![1, 7] } else { vec![1] },
        calls,
        closing: windowed.then_some(Closing { key: 1, bound: WINDOW }),
        want_final: true,
        want_latest: true,
    };
    let mut over = Over::new(spec.clone()).unwrap();
    let mut saved = Saved::default();
    let width = schema().fields().len();
    let (mut accepted, mut finals) = (Vec::<Row>::new(), Vec::new());
    let mut at = 0;
    while at < rows.len() {
        let end = (at + 1 + dice.roll(25) as usize).min(rows.len());
        let part: Vec<Row> = rows[at..end].iter().filter(|r| r.time >= over.watermark()).cloned().collect();
        at = end;
        accepted.extend(part.iter().cloned());
        let latest = over.push(&batch(&part)).unwrap();
        let answer = oracle(&accepted, &sql).await;
        let expected = greatest(&accepted, &part, windowed);
        let mut found = latest.map(|batch| results(&batch.rows, width)).unwrap_or_default();
        found.sort_by_key(|(id, _)| *id);
        assert_eq!(found.iter().map(|(id, _)| *id).collect::<Vec<_>>(), expected, "seed {seed}: latest rows");
        for (id, values) in &found {
            assert_eq!(values, &answer[id], "seed {seed}: latest of row {id}: {sql}");
        }
        if dice.chance(60) {
            let front = accepted.iter().map(|row| row.time).max().unwrap_or(0);
            let raised = over.advance(front - lateness).unwrap();
            finals.extend(raised.iter().flat_map(|batch| results(&batch.rows, width)));
        }
        if dice.chance(15) {
            restart(&mut over, &spec, &mut saved);
        }
    }
    finals.extend(over.advance(END_OF_TIME).unwrap().iter().flat_map(|batch| results(&batch.rows, width)));
    let answer = oracle(&accepted, &sql).await;
    finals.sort_by_key(|(id, _)| *id);
    let ids: Vec<i64> = finals.iter().map(|(id, _)| *id).collect();
    assert_eq!(
        ids,
        answer.keys().copied().collect::<Vec<_>>(),
        "seed {seed}: each accepted row is final once"
    );
    for (id, values) in &finals {
        assert_eq!(values, &answer[id], "seed {seed}: row {id}: {sql}");
    }
    assert_eq!(over.late(), 0);
    if windowed {
        assert!(over.keys() <= 2 * 4 + 1, "seed {seed}: {} closed keys are still held", over.keys());
    }
}

#[tokio::test]
async fn final_and_latest_rows_are_those_of_batch() {
    let cases = std::env::var("MILLSTREAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    for seed in 1..=cases {
        run_case(seed).await;
    }
}

#[test]
fn memory_of_rows_that_no_frame_needs_is_freed() {
    let sum = |frame| WindowCall {
        function: Function::Sum,
        argument: Some(3),
        filter: None,
        frame,
        output: Arc::new(Field::new("c", DataType::Float64, true)),
    };
    let calls = vec![sum(Frame::Unbounded), sum(Frame::Preceding { micros: 1_000 })];
    let spec = OverSpec {
        input: schema(),
        partition_by: vec![1],
        calls,
        closing: None,
        want_final: true,
        want_latest: true,
    };
    let mut over = Over::new(spec).unwrap();
    let mut dice = Dice(5);
    let rows = arrivals(&mut dice, 50_000, 100);
    let mut most = 0;
    for part in rows.chunks(100) {
        let kept: Vec<Row> = part.iter().filter(|row| row.time >= over.watermark()).cloned().collect();
        over.push(&batch(&kept)).unwrap();
        over.advance(kept.iter().map(|row| row.time).max().unwrap() - 100).unwrap();
        over.cut().unwrap();
        most = most.max(over.chunks());
    }
    assert!(most <= 8, "{most} batches of about 1,450 µs were held for a frame of 1,000 µs");
    over.advance(END_OF_TIME).unwrap();
    assert_eq!(over.chunks(), 0);
}

/// As a backfill goes on: of an earlier time only the states of keys are kept, the rows of bounded frames come again, and
/// rows count from there on but are wanted later.
async fn resumed_case(seed: u64) {
    let mut dice = Dice(seed.wrapping_mul(0xD1B5_4A32_D192_ED03));
    let count = 50 + dice.roll(150) as usize;
    let mut rows = arrivals(&mut dice, count, 300);
    rows.sort_by_key(|row| (row.time, row.place, row.id));
    let windowed = dice.chance(30);
    let (calls, sql) = random_calls(&mut dice, if windowed { "k, w" } else { "k" });
    let longest = calls.iter().map(|call| match call.frame {
        Frame::Preceding { micros } => micros,
        Frame::Unbounded => 0,
    });
    let longest = longest.max().unwrap();
    let spec = OverSpec {
        input: schema(),
        partition_by: if windowed { vec![1, 7] } else { vec![1] },
        calls,
        closing: windowed.then_some(Closing { key: 1, bound: WINDOW }),
        want_final: true,
        want_latest: false,
    };
    let within = |from: i64, to: i64| -> Vec<Row> {
        rows.iter().filter(|row| (from..to).contains(&row.time)).cloned().collect()
    };
    let answer = oracle(&rows, &sql).await;
    let mut states: Vec<(i64, Vec<RecordBatch>)> = vec![(START_OF_TIME, Vec::new())];
    let (mut found, mut from) = (BTreeMap::new(), START_OF_TIME);
    while from < END_OF_TIME {
        let until = rows.get(dice.roll(rows.len() as u64) as usize).map_or(0, |row| row.time);
        let until = if until > from { until } else { END_OF_TIME };
        let (start, keys) = &states[dice.roll(states.len() as u64) as usize];
        let mut over = Over::new(spec.clone()).unwrap();
        over.restore_keys(keys, *start).unwrap();
        for part in within(start.saturating_sub(longest), *start).chunks(1 + dice.roll(20) as usize) {
            over.refill(&batch(part)).unwrap();
        }
        over.rebuild();
        let mut out = Vec::new();
        over.emit_final(false);
        for (from, until, wanted) in [(*start, from, false), (from, until, true)] {
            over.emit_final(wanted);
            for part in within(from, until).chunks(1 + dice.roll(20) as usize) {
                over.push(&batch(part)).unwrap();
                over.forget_input();
                out.extend(over.advance(part.last().unwrap().time).unwrap());
            }
            out.extend(over.advance(until).unwrap());
        }
        found.extend(out.iter().flat_map(|batch| results(&batch.rows, schema().fields().len())));
        over.mark_all_dirty();
        let cut = over.cut().unwrap();
        assert!(cut.rows.gather().unwrap().is_none(), "seed {seed}: input was forgotten");
        states.push((until, cut.keys.gather().unwrap().into_iter().collect()));
        from = until;
    }
    assert_eq!(found, answer, "seed {seed}: {sql}");
}

#[tokio::test]
async fn a_state_of_keys_alone_goes_on() {
    let cases = std::env::var("MILLSTREAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    for seed in 1..=cases {
        resumed_case(seed).await;
    }
}
