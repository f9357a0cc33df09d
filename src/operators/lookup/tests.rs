//! The oracle: random rows and tables against DataFusion's own join.

use std::collections::BTreeMap;

use arrow::array::{Int64Array, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use datafusion::common::DFSchema;
use datafusion::prelude::SessionContext;

use super::*;
use crate::stream::Origin;
use crate::stream::dice::Dice;

fn schema(names: [&str; 3]) -> SchemaRef {
    let types = [DataType::Int64, DataType::Utf8, DataType::Int64];
    let fields = names.iter().zip(types).map(|(name, t)| Field::new(*name, t, true));
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// Two key columns with NULLs and few values, so that keys repeat and miss, and a value.
fn rows(dice: &mut Dice, names: [&str; 3], count: usize) -> RecordBatch {
    let mut maybe = |bound: u64| (dice.roll(8) > 0).then(|| dice.roll(bound) as i64);
    let a: Int64Array = (0..count).map(|_| maybe(6)).collect();
    let b: StringArray = (0..count).map(|_| maybe(3).map(|n| format!("b{n}"))).collect();
    let v: Int64Array = (0..count).map(|_| maybe(50)).collect();
    RecordBatch::try_new(schema(names), vec![Arc::new(a), Arc::new(b), Arc::new(v)]).unwrap()
}

fn bag(bag: &mut BTreeMap<String, i64>, rows: &RecordBatch) {
    for row in 0..rows.num_rows() {
        let cell = |column: &ArrayRef| arrow::util::display::array_value_to_string(column, row).unwrap();
        *bag.entry(rows.columns().iter().map(cell).collect::<Vec<_>>().join("|")).or_default() += 1;
    }
}

#[tokio::test]
async fn joins_are_the_batch_answer() {
    let cases: u64 = std::env::var("MILLSTREAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    for seed in 0..cases {
        let mut dice = Dice(seed);
        let count = dice.roll(12) as usize;
        let table = rows(&mut dice, ["c", "d", "w"], count);
        let (keys, outer, filtered) = (1 + dice.roll(2) as usize, dice.roll(2) == 0, dice.roll(3) == 0);
        let stream_first = dice.roll(2) == 0;
        let (left, right) = (schema(["a", "b", "v"]), schema(["c", "d", "w"]));
        let both = if stream_first { [&left, &right] } else { [&right, &left] };
        let fields = both.iter().flat_map(|schema| schema.fields().iter().cloned()).collect::<Vec<_>>();
        let joined = Arc::new(Schema::new(fields));
        let session = SessionContext::new();
        let condition = DFSchema::try_from(joined.as_ref().clone()).unwrap();
        let filter = session.parse_sql_expr("v > w", &condition).unwrap();
        let filter = session.create_physical_expr(filter, &condition).unwrap();
        let spec = LookupSpec {
            keys: (0..keys).collect(),
            width: 3,
            table_keys: keys,
            outer,
            stream_first,
            filter: filtered.then_some(filter),
            schema: joined,
        };
        let with_keys: Vec<usize> = (0..3).chain(0..keys).collect();
        let keyed = table.project(&with_keys).unwrap();
        let lookup_table = LookupTable::new(&keyed.schema(), &[keyed], keys).unwrap();
        let (mut found, mut batches, mut deleted) = (BTreeMap::new(), Vec::new(), 0);
        for first in 0..1 + dice.roll(5) as i64 {
            let count = dice.roll(20) as usize;
            let input = rows(&mut dice, ["a", "b", "v"], count);
            let order = Int64Array::from_iter_values((0..input.num_rows() as i64).map(|at| first * 100 + at));
            let origin = Origin { time: order.clone(), place: order.clone(), offset: order };
            let batch = ChangeBatch::append(input.clone(), origin);
            let mut failed = Failed::new();
            let out = lookup(&spec, &lookup_table, &batch, false, &mut failed).unwrap();
            assert!(failed.is_empty() && out.origin.time.values().is_sorted());
            bag(&mut found, &out.rows);
            // Newest rows: what an inner join drops is a deletion.
            let newest = lookup(&spec, &lookup_table, &batch, true, &mut failed).unwrap();
            let gone =
                newest.weights.map_or(0, |weights| weights.values().iter().filter(|w| **w < 0).count());
            assert_eq!(newest.rows.num_rows(), out.rows.num_rows() + gone);
            deleted += gone;
            batches.push(input);
        }
        session.register_batch("s", concat_batches(&left, &batches).unwrap()).unwrap();
        session.register_batch("t", table).unwrap();
        let on = ["s.a = t.c", "s.b = t.d"][..keys].join(" AND ");
        let on = if filtered { format!("{on} AND v > w") } else { on };
        let tables = if stream_first { "a, b, v, c, d, w" } else { "c, d, w, a, b, v" };
        let sql = |join: &str| format!("SELECT {tables} FROM s {join} t ON {on}");
        let mut expected = BTreeMap::new();
        let join = if outer { "LEFT JOIN" } else { "JOIN" };
        for batch in session.sql(&sql(join)).await.unwrap().collect().await.unwrap() {
            bag(&mut expected, &batch);
        }
        assert_eq!(found, expected, "seed {seed}");
        let missing = sql("LEFT ANTI JOIN").replace(", c, d, w", "").replace("c, d, w, ", "");
        let missing = session.sql(&missing).await.unwrap().count().await.unwrap();
        assert_eq!(deleted, if outer { 0 } else { missing }, "seed {seed}: deletions");
    }
}
