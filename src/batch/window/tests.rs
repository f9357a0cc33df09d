//! Random tables, cuts, frames and functions against DataFusion's own windows over the same rows.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, Date32Array, Decimal128Array, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray, UInt64Array,
};
use arrow::compute::{concat_batches, sort_to_indices, take_record_batch};
use arrow::datatypes::SchemaRef;
use datafusion::datasource::MemTable;
use datafusion::physical_plan::{collect, displayable};

use super::*;
use crate::plan::session::{batch_session, batch_session_within};
use crate::stream::dice::Dice;

/// A hundred seconds.
const SPAN: u64 = 100_000_000;

fn column<T>(dice: &mut Dice, rows: usize, mut one: impl FnMut(&mut Dice) -> T) -> Vec<Option<T>> {
    let nulls = [0, 0, 10, 60][dice.roll(4) as usize];
    (0..rows).map(|_| (!dice.chance(nulls)).then(|| one(dice))).collect()
}

/// Of sizes near each other, or anything.
fn double(dice: &mut Dice) -> f64 {
    match dice.roll(40) {
        0 => f64::NAN,
        1 => [f64::INFINITY, f64::NEG_INFINITY, -0.0, 5e-324, 1e308][dice.roll(5) as usize],
        2 => f64::from_bits(dice.roll(1 << 31) << 33 | dice.roll(1 << 31)),
        _ => (dice.roll(200_001) as f64 - 100_000.0) / 100.0,
    }
}

/// Sums of some of them wrap.
fn long(dice: &mut Dice) -> i64 {
    if dice.chance(10) { i64::MAX - dice.roll(3) as i64 } else { dice.roll(1_000) as i64 - 500 }
}

fn table(dice: &mut Dice, rows: usize, keys: u64) -> RecordBatch {
    let ties = 1 + dice.roll(20_000_000);
    let time = |dice: &mut Dice| (dice.roll(SPAN) / ties * ties) as i64;
    let at: TimestampMicrosecondArray = column(dice, rows, time).into_iter().collect();
    let words = column(dice, rows, |dice| ["", "a", "b", "zz"][dice.roll(4) as usize]);
    let decimals: Decimal128Array = column(dice, rows, |dice| i128::from(long(dice))).into_iter().collect();
    let shifts = |dice: &mut Dice| if dice.chance(5) { i64::MIN + dice.roll(9) as i64 } else { long(dice) };
    let far: Vec<i64> = (0..rows).map(|_| shifts(dice)).collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("id", Arc::new(Int64Array::from_iter_values(0..rows as i64))),
        (
            "k",
            Arc::new(column(dice, rows, |dice| dice.roll(keys) as i64).into_iter().collect::<Int64Array>()),
        ),
        ("word", Arc::new(words.into_iter().collect::<StringArray>())),
        ("at", Arc::new(at.with_timezone("UTC"))),
        ("n", Arc::new(column(dice, rows, |dice| dice.roll(40) as i64).into_iter().collect::<Int64Array>())),
        ("far", Arc::new(Int64Array::from(far))),
        ("f", Arc::new(column(dice, rows, double).into_iter().collect::<Float64Array>())),
        ("l", Arc::new(column(dice, rows, long).into_iter().collect::<Int64Array>())),
        ("i", Arc::new(column(dice, rows, |dice| long(dice) as i32).into_iter().collect::<Int32Array>())),
        ("u", Arc::new(column(dice, rows, |dice| long(dice) as u64).into_iter().collect::<UInt64Array>())),
        ("d", Arc::new(decimals.with_precision_and_scale(38, 2).unwrap())),
        (
            "day",
            Arc::new(column(dice, rows, |dice| dice.roll(99) as i32).into_iter().collect::<Date32Array>()),
        ),
    ];
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true)))
        .unwrap()
}

/// None that rounds on the way: peers come in any order.
const CALLS: [&str; 24] = [
    "count(*)",
    "count(f)",
    "count(word)",
    "count(1)",
    "sum(f)",
    "sum(l)",
    "sum(i)",
    "sum(u)",
    "sum(d)",
    "avg(f)",
    "avg(l)",
    "avg(d)",
    "min(f)",
    "max(f)",
    "min(l)",
    "max(i)",
    "min(u)",
    "max(d)",
    "min(at)",
    "max(day)",
    "min(word)",
    "max(word)",
    "sum(l + 1)",
    "bit_xor(l)",
];

/// PARTITION BY and ORDER BY, and frames that go with them.
const WINDOWS: [(&str, &[&str]); 6] = [
    ("PARTITION BY k ORDER BY at", &["INTERVAL '5 seconds' PRECEDING", "INTERVAL '1 minute' PRECEDING"]),
    (
        "PARTITION BY k, word ORDER BY at NULLS FIRST",
        &["INTERVAL '10 seconds' PRECEDING", "INTERVAL '2 days' PRECEDING"],
    ),
    ("ORDER BY at", &["INTERVAL '1 second' PRECEDING"]),
    ("PARTITION BY k ORDER BY n", &["3 PRECEDING", "0 PRECEDING"]),
    ("PARTITION BY word ORDER BY far", &["9 PRECEDING", "9223372036854775807 PRECEDING"]),
    ("PARTITION BY k ORDER BY at DESC, word", &[]),
];

/// Some calls over one window, or two, of random frames.
fn query(dice: &mut Dice) -> String {
    let mut calls = Vec::new();
    for _ in 0..1 + dice.roll(2) {
        let (window, frames) = WINDOWS[dice.roll(WINDOWS.len() as u64) as usize];
        for _ in 0..1 + dice.roll(4) {
            let call = CALLS[dice.roll(CALLS.len() as u64) as usize];
            let start = match dice.roll(2 + 2 * frames.len() as u64) as usize {
                0 => "UNBOUNDED PRECEDING",
                1 => "CURRENT ROW",
                other => frames[(other - 2) / 2],
            };
            let name = calls.len();
            calls.push(format!("{call} OVER ({window} RANGE BETWEEN {start} AND CURRENT ROW) AS c{name}"));
        }
    }
    format!("SELECT id, {} FROM t", calls.join(", "))
}

fn set(session: &SessionContext, batch_size: usize, partitions: usize) {
    let state = session.state_ref();
    let mut state = state.write();
    let options = state.config_mut().options_mut();
    options.set("datafusion.execution.batch_size", &batch_size.to_string()).unwrap();
    options.execution.target_partitions = partitions;
}

/// The rows by id, and the plan.
async fn answer(session: &SessionContext, sql: &str) -> (RecordBatch, String) {
    let plan = session.sql(sql).await.unwrap().create_physical_plan().await.unwrap();
    let shown = displayable(plan.as_ref()).indent(false).to_string();
    let frame = session.sql(sql).await.unwrap().sort(vec![datafusion::prelude::col("id").sort(true, true)]);
    let batches = frame.unwrap().collect().await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    (concat_batches(&batches[0].schema(), &batches).unwrap(), shown)
}

#[tokio::test]
async fn rows_are_those_of_datafusion() {
    for seed in 0..150 {
        let mut dice = Dice(seed);
        let (plain, ours) = (batch_session().unwrap(), with_windows(&batch_session().unwrap()));
        let rows = 1 + dice.roll(if seed % 10 == 0 { 3_000 } else { 200 }) as usize;
        let keys = 1 + dice.roll(12);
        let rows = table(&mut dice, rows, keys);
        let (batch_size, partitions) = (1 + dice.roll(60) as usize, 1 + dice.roll(3) as usize);
        for session in [&plain, &ours] {
            set(session, batch_size, partitions);
            let pieces = vec![vec![
                rows.slice(0, rows.num_rows() / 3),
                rows.slice(rows.num_rows() / 3, rows.num_rows() - rows.num_rows() / 3),
            ]];
            session.register_table("t", Arc::new(MemTable::try_new(rows.schema(), pieces).unwrap())).unwrap();
        }
        let sql = query(&mut dice);
        let ((expected, theirs), (found, shown)) = (answer(&plain, &sql).await, answer(&ours, &sql).await);
        assert!(theirs.contains("WindowAggExec") && !theirs.contains("RangeWindowExec"), "{theirs}");
        assert!(shown.contains("RangeWindowExec"), "{sql}\n{shown}");
        // Above a descending sort DataFusion turns ascending windows round, and their frames end elsewhere.
        assert!(!shown.contains("WindowAggExec") || sql.contains("DESC"), "{sql}\n{shown}");
        for (column, field) in expected.schema().fields().iter().enumerate() {
            let (expected, found) = (expected.column(column), found.column(column));
            if expected != found {
                let different =
                    (0..expected.len()).find(|row| expected.slice(*row, 1) != found.slice(*row, 1));
                panic!(
                    "seed {seed}: {sql}: {} differs in row {different:?}:\n{expected:?}\n{found:?}",
                    field.name()
                );
            }
        }
    }
}

#[tokio::test]
async fn what_is_not_proven_stays_with_datafusion() {
    let session = with_windows(&batch_session().unwrap());
    let rows = table(&mut Dice(1), 100, 3);
    session.register_batch("t", rows).unwrap();
    let ours = async |call: &str| {
        let (_, plan) = answer(&session, &format!("SELECT id, {call} AS c FROM t")).await;
        assert_ne!(plan.contains("RangeWindowExec"), plan.contains("WindowAggExec"), "{plan}");
        plan.contains("RangeWindowExec")
    };
    for call in [
        "sum(l) OVER (PARTITION BY k ORDER BY at)",
        "sum(l) OVER (PARTITION BY k ORDER BY at RANGE BETWEEN INTERVAL '1 hour' PRECEDING AND CURRENT ROW)",
    ] {
        assert!(ours(call).await, "{call}");
    }
    for call in [
        "sum(l) FILTER (WHERE l > 0) OVER (PARTITION BY k ORDER BY at)",
        "sum(l) FILTER (WHERE l > 0) OVER (PARTITION BY k ORDER BY at RANGE BETWEEN INTERVAL '1 hour' PRECEDING AND CURRENT ROW)",
        "count(DISTINCT l) OVER (PARTITION BY k ORDER BY at)",
        "sum(l) OVER (PARTITION BY k)",
        "sum(l) OVER (PARTITION BY k ORDER BY at ROWS BETWEEN 3 PRECEDING AND CURRENT ROW)",
        "sum(l) OVER (PARTITION BY k ORDER BY at RANGE BETWEEN INTERVAL '1 hour' PRECEDING AND INTERVAL '1 hour' FOLLOWING)",
        "sum(l) OVER (PARTITION BY k ORDER BY at RANGE BETWEEN INTERVAL '1 hour' PRECEDING AND INTERVAL '1 minute' PRECEDING)",
        "sum(l) OVER (PARTITION BY k ORDER BY at DESC RANGE BETWEEN INTERVAL '1 hour' PRECEDING AND CURRENT ROW)",
        "sum(l) OVER (PARTITION BY k ORDER BY at RANGE BETWEEN INTERVAL '1 month' PRECEDING AND CURRENT ROW)",
        "sum(l) OVER (PARTITION BY k ORDER BY f RANGE BETWEEN 1 PRECEDING AND CURRENT ROW)",
        "row_number() OVER (PARTITION BY k ORDER BY at)",
        "rank() OVER (PARTITION BY k ORDER BY at)",
    ] {
        assert!(!ours(call).await, "{call}");
    }
}

/// A day has 23 hours now and then.
#[tokio::test]
async fn days_of_a_time_zone_are_no_fixed_length() {
    let session = with_windows(&batch_session().unwrap());
    session.register_batch("t", table(&mut Dice(1), 100, 3)).unwrap();
    for (back, fixed) in [("1 day", false), ("24 hours", true)] {
        let sql = format!(
            "SELECT id, count(*) OVER (ORDER BY z RANGE BETWEEN INTERVAL '{back}' PRECEDING AND CURRENT ROW)
            FROM (SELECT id, arrow_cast(at, 'Timestamp(Microsecond, Some(\"Europe/Berlin\"))') AS z FROM t)"
        );
        let (_, plan) = answer(&session, &sql).await;
        assert_eq!(plan.contains("RangeWindowExec"), fixed, "{plan}");
    }
}

fn spec_of(plan: &Arc<dyn ExecutionPlan>) -> Option<(Arc<Spec>, SchemaRef)> {
    if let Some(window) = plan.downcast_ref::<RangeWindowExec>() {
        return Some((Arc::clone(&window.spec), window.schema()));
    }
    plan.children().into_iter().find_map(spec_of)
}

/// One partition without end: what is held does not grow with it.
#[tokio::test]
async fn only_the_frame_is_held() {
    const ROWS: i64 = 1_000;
    let batch = |at: i64| {
        let rows = at * ROWS..(at + 1) * ROWS;
        let times = TimestampMicrosecondArray::from_iter_values(rows.clone().map(|row| row * 1_000_000));
        let values: Float64Array = rows.map(|row| Some((row % 977) as f64 / 8.0)).collect();
        RecordBatch::try_from_iter([("at", Arc::new(times) as ArrayRef), ("f", Arc::new(values))]).unwrap()
    };
    let session = with_windows(&batch_session().unwrap());
    session.register_batch("t", batch(0)).unwrap();
    let calls = ["count(*)", "count(f)", "sum(f)", "min(f)", "max(f)", "stddev(f)"];
    let frames = ["INTERVAL '20 seconds'", "INTERVAL '90 minutes'", "UNBOUNDED"];
    let columns = calls.iter().flat_map(|call| {
        frames.iter().map(move |frame| {
            format!("{call} OVER (ORDER BY at RANGE BETWEEN {frame} PRECEDING AND CURRENT ROW)")
        })
    });
    let sql = format!("SELECT {} FROM t", columns.collect::<Vec<_>>().join(", "));
    let plan = session.sql(&sql).await.unwrap().create_physical_plan().await.unwrap();
    let (spec, schema) = spec_of(&plan).unwrap();
    let mut run = Run::new(&spec, schema).unwrap();
    let (mut out, mut sizes) = (0, Vec::new());
    for at in 0..200 {
        run.push(batch(at)).unwrap();
        while let Some(batch) = run.next().unwrap() {
            out += batch.num_rows();
        }
        sizes.push(run.size());
    }
    let (early, late) = (sizes[20..60].iter().max().unwrap(), sizes[60..].iter().max().unwrap());
    assert!(late <= early, "{early} bytes, then {late}");
    run.finish().unwrap();
    while let Some(batch) = run.next().unwrap() {
        out += batch.num_rows();
    }
    assert_eq!(out, 200 * ROWS as usize);
}

fn spills(plan: &Arc<dyn ExecutionPlan>) -> usize {
    let own = plan.metrics().and_then(|metrics| metrics.spill_count()).unwrap_or(0);
    own + plan.children().into_iter().map(spills).sum::<usize>()
}

#[tokio::test]
async fn the_sort_below_still_spills() {
    let mut dice = Dice(7);
    let rows = table(&mut dice, 60_000, 500);
    let sql = "SELECT id, count(*) OVER w AS n, sum(f) OVER w AS s, max(l) OVER w AS m FROM t
        WINDOW w AS (PARTITION BY k ORDER BY at RANGE BETWEEN INTERVAL '20 seconds' PRECEDING AND CURRENT ROW)";
    let mut answers = Vec::new();
    for budget in [None, Some(3 << 20)] {
        let session = with_windows(&batch_session_within(budget).unwrap());
        set(&session, 1_000, 2);
        let pieces = (0..60).map(|at| rows.slice(at * 1_000, 1_000)).collect();
        let table = MemTable::try_new(rows.schema(), vec![pieces]).unwrap();
        session.register_table("t", Arc::new(table)).unwrap();
        let plan = session.sql(sql).await.unwrap().create_physical_plan().await.unwrap();
        assert!(spec_of(&plan).is_some());
        let batches = collect(Arc::clone(&plan), session.task_ctx()).await.unwrap();
        assert_eq!(spills(&plan) > 0, budget.is_some(), "{budget:?}");
        let all = concat_batches(&plan.schema(), &batches).unwrap();
        let order = sort_to_indices(all.column(0), None, None).unwrap();
        answers.push(take_record_batch(&all, &order).unwrap());
    }
    assert_eq!(answers[0].num_rows(), 60_000);
    assert!(answers[0] == answers[1], "what was spilt came back as something else");
}
