//! Random tables in small batches over several partitions, against the definition as plain SQL.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{Int64Type, TimeUnit};
use datafusion::datasource::MemTable;

use super::*;
use crate::plan::session::batch_session;

struct Dice(u64);

impl Dice {
    fn roll(&mut self, bound: u64) -> i64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % bound) as i64
    }

    /// NULL now and then.
    fn some(&mut self, bound: u64) -> Option<i64> {
        (self.roll(25) > 0).then(|| self.roll(bound))
    }
}

/// id, k, word, at, known.
fn table(dice: &mut Dice, rows: usize, keys: u64) -> RecordBatch {
    let stamp = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
    let number = |values: Vec<Option<i64>>| -> ArrayRef { Arc::new(Int64Array::from(values)) };
    let k = number((0..rows).map(|_| dice.some(keys)).collect());
    let words = (0..rows).map(|_| dice.some(2).map(|n| if n == 0 { "a" } else { "b" }));
    let words: ArrayRef = Arc::new(words.collect::<StringArray>());
    let at: Vec<Option<i64>> = (0..rows).map(|_| dice.some(40)).collect();
    let known = at.iter().map(|at| Some((*at)? + dice.some(10)?)).collect();
    let time = |values: Vec<Option<i64>>| arrow::compute::cast(&number(values), &stamp).unwrap();
    RecordBatch::try_from_iter_with_nullable([
        ("id", ids, false),
        ("k", k, true),
        ("word", words, true),
        ("known", time(known), true),
        ("at", time(at), true),
    ])
    .unwrap()
}

async fn ids(session: &SessionContext, sql: &str) -> Vec<(i64, Option<i64>)> {
    let mut found = Vec::new();
    for batch in session.sql(sql).await.unwrap().collect().await.unwrap() {
        let (l, f) =
            (batch.column(0).as_primitive::<Int64Type>(), batch.column(1).as_primitive::<Int64Type>());
        found.extend(l.values().iter().copied().zip(f.iter()));
    }
    found.sort_unstable();
    found
}

#[tokio::test]
async fn matches_are_those_of_the_definition() {
    for seed in 0..60 {
        let mut dice = Dice(seed);
        let batch_size = 1 + dice.roll(9) as usize;
        let session = with_joins(&batch_session().unwrap(), &StreamPlan::default());
        {
            let state = session.state_ref();
            let mut state = state.write();
            let options = state.config_mut().options_mut();
            options.set("datafusion.execution.batch_size", &batch_size.to_string()).unwrap();
            options.execution.target_partitions = 1 + seed as usize % 3;
        }
        // Few labels and many features too: batches of features pass without a match.
        let (labels, features) = (1 + dice.roll(150) as usize, 1 + dice.roll(600) as usize);
        let keys = 1 + dice.roll(8) as u64;
        for (name, rows) in [("l", labels), ("f", features)] {
            let rows = table(&mut dice, rows, keys);
            let pieces =
                (0..rows.num_rows()).step_by(7).map(|at| rows.slice(at, 7.min(rows.num_rows() - at)));
            let table = MemTable::try_new(rows.schema(), vec![pieces.collect()]).unwrap();
            session.register_table(name, Arc::new(table)).unwrap();
        }
        for (kind, on, known) in [
            ("JOIN", "l.k = f.k", false),
            ("LEFT JOIN", "l.k = f.k AND f.word = l.word", false),
            ("LEFT JOIN", "l.k = f.k", true),
            ("JOIN", "l.k = f.k AND l.word = f.word", true),
        ] {
            let more = if known { "AND f.known <= l.at" } else { "" };
            let answer = format!(
                "SELECT l.id, f.id FROM l {kind} f ON system_time_as_of(l.at) AND {on} AND f.at <= l.at {more}"
            );
            // A row that is known before its time counts from its time on.
            let last = if known { "greatest(f.at, f.known) DESC, " } else { "" };
            let definition = format!(
                "SELECT l, f FROM (SELECT l.id AS l, f.id AS f, row_number() OVER (PARTITION BY l.id
                     ORDER BY f.at DESC NULLS LAST, {last} f.id DESC) AS n
                 FROM l {kind} f ON {on} AND f.at <= l.at {more}) WHERE n = 1"
            );
            let (found, expected) = (ids(&session, &answer).await, ids(&session, &definition).await);
            assert_eq!(found, expected, "seed {seed}, {kind} {on} {more}, batches of {batch_size}");
        }
    }
}

/// No pairs are made.
#[tokio::test]
async fn the_plan_sorts_and_merges() {
    let session = with_joins(&batch_session().unwrap(), &StreamPlan::default());
    for name in ["l", "f"] {
        let rows = table(&mut Dice(1), 50, 3);
        session.register_batch(name, rows).unwrap();
    }
    let sql = "EXPLAIN SELECT l.id, f.word FROM l LEFT JOIN f ON system_time_as_of(l.at) AND l.k = f.k AND f.at <= l.at";
    let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
    let text = arrow::util::pretty::pretty_format_batches(&batches).unwrap().to_string();
    assert!(text.contains("AsOfExec") && text.contains("SortExec"), "{text}");
    assert!(!text.contains("NestedLoopJoin") && !text.contains("HashJoin"), "{text}");
}
