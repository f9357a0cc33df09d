//! Two relations as multisets of rows: how many are equal, and in what the others differ.
//!
//! DataFusion counts each distinct row on both sides in one pass; the sums are those of all rows. Of the rows whose counts
//! differ at most [`KEPT`] are kept and paired: by the key, if there is one, else by all columns that are no floats, and
//! what is left among rows of the same time with those that agree in most columns.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, make_comparator};
use arrow::compute::{
    SortColumn, SortOptions, cast, concat_batches, filter_record_batch, lexsort_to_indices, take_record_batch,
};
use arrow::datatypes::{DataType, Float64Type, Int64Type, SchemaRef};
use arrow::row::{RowConverter, SortField};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::prelude::SessionContext;
use futures::StreamExt;
use serde::Serialize;

use crate::error::Result;

/// Differing rows that are kept.
const KEPT: usize = 100_000;
/// Share by which floats may differ that are compared in single precision: two of its steps.
const TOLERANCE: f64 = 2.5e-7;
/// Rows of one time that are tried against each other.
const TRIED: usize = 64;

/// One side, by its name in the session, and what a row counts.
pub struct Side<'a> {
    pub name: &'a str,
    pub weight: &'a str,
}

/// What is compared, and how.
pub struct Plan<'a> {
    pub table: Side<'a>,
    pub answer: Side<'a>,
    pub columns: SchemaRef,
    /// Rows of both sides that count, as SQL.
    pub condition: String,
    /// Columns by which differing rows are paired; empty: see the module.
    pub key: Vec<usize>,
    pub order: Option<usize>,
    /// Floats are equal when their first seven digits are.
    pub single_precision: bool,
    /// How many differences are shown.
    pub shown: usize,
}

/// Whether a difference is none after all, because of the time at which it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Both sides have the row; values differ.
    Changed,
    /// Only the answer has it.
    Missing,
    /// Only the table has it.
    Extra,
}

/// Time of the row of the table, and of the answer, in the column `order`.
pub type Excuse<'a> = dyn Fn(Kind, Option<i64>, Option<i64>) -> bool + Sync + 'a;

#[derive(Debug, Clone, Default, Serialize)]
pub struct Compared {
    pub table_rows: i64,
    pub answer_rows: i64,
    pub equal: i64,
    pub changed: i64,
    pub missing: i64,
    pub extra: i64,
    /// Differences that time explains: expired keys, rows newer than the checkpoint.
    pub excused: i64,
    /// More rows differ than were kept; columns and examples are of those that were.
    pub truncated: bool,
    pub columns: Vec<Column>,
    pub first: Vec<Difference>,
}

/// One column over the rows that both sides have.
#[derive(Debug, Clone, Serialize)]
pub struct Column {
    pub name: String,
    pub exact_percent: f64,
    pub null_mismatches: i64,
    /// Of numbers: mean of |t − a| ÷ ((|t| + |a|) ÷ 2), in percent.
    pub smape_percent: Option<f64>,
    pub max_difference: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// `changed`, `missing` (the answer has it), `extra` (the table has it).
    pub kind: &'static str,
    /// Columns that agree, or all of a row that one side has.
    pub row: Vec<(String, String)>,
    /// Column, table, answer.
    pub differs: Vec<(String, String, String)>,
}

impl Compared {
    pub fn differences(&self) -> i64 {
        self.changed + self.missing + self.extra
    }
}

pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// # Errors
/// User: an expression of the answer fails. External: a table cannot be read.
pub async fn compare(session: &SessionContext, plan: &Plan<'_>, excuse: &Excuse<'_>) -> Result<Compared> {
    let names: Vec<String> = plan.columns.fields().iter().map(|field| quote(field.name())).collect();
    let names = names.join(", ");
    let values = values(plan);
    let sql = format!(
        "SELECT {names}, sum(__t) AS __t, sum(__a) AS __a FROM (
             SELECT {values}, CAST({} AS BIGINT) AS __t, CAST(0 AS BIGINT) AS __a FROM {} WHERE {condition}
             UNION ALL
             SELECT {values}, CAST(0 AS BIGINT), CAST({} AS BIGINT) FROM {} WHERE {condition}) AS sides
         GROUP BY {names}",
        plan.table.weight,
        plan.table.name,
        plan.answer.weight,
        plan.answer.name,
        condition = plan.condition,
    );
    let frame = session.sql(&sql).await?;
    let schema = Arc::new(frame.schema().as_arrow().clone());
    let mut stream = frame.execute_stream().await?;
    let mut found = Compared::default();
    let (mut kept, mut rows) = (Vec::new(), 0);
    while let Some(batch) = stream.next().await {
        let batch = batch?;
        let width = batch.num_columns();
        let (t, a) = (
            batch.column(width - 2).as_primitive::<Int64Type>(),
            batch.column(width - 1).as_primitive::<Int64Type>(),
        );
        for (t, a) in t.values().iter().zip(a.values()) {
            found.table_rows += t;
            found.answer_rows += a;
            found.equal += t.min(a).max(&0);
        }
        let differ = filter_record_batch(&batch, &arrow::compute::kernels::cmp::neq(t, a)?)?;
        let take = differ.num_rows().min(KEPT - rows);
        found.truncated |= take < differ.num_rows();
        rows += take;
        kept.push(differ.slice(0, take));
    }
    let rows = sorted(plan, &concat_batches(&schema, &kept)?)?;
    Pairing::new(plan, &rows)?.into_result(&mut found, excuse)?;
    Ok(found)
}

/// By time, then by key, then by the other columns: what differs first is shown first.
fn sorted(plan: &Plan<'_>, rows: &RecordBatch) -> Result<RecordBatch> {
    let width = plan.columns.fields().len();
    let plain = |at: &usize| !rows.column(*at).data_type().is_nested();
    let columns = plan.order.iter().chain(&plan.key).copied().chain(0..width).filter(plain);
    let columns: Vec<SortColumn> =
        columns.map(|at| SortColumn { values: Arc::clone(rows.column(at)), options: None }).collect();
    if columns.is_empty() || rows.num_rows() == 0 {
        return Ok(rows.clone());
    }
    Ok(take_record_batch(rows, &lexsort_to_indices(&columns, None)?)?)
}

/// The columns as they are compared.
fn values(plan: &Plan<'_>) -> String {
    let value = |field: &arrow::datatypes::FieldRef| {
        let name = quote(field.name());
        match plan.single_precision && field.data_type().is_floating() {
            true => format!("CAST(CAST({name} AS REAL) AS DOUBLE) AS {name}"),
            false => name,
        }
    };
    plan.columns.fields().iter().map(value).collect::<Vec<_>>().join(", ")
}

/// Differing rows: those of the table and those of the answer, by their place in `rows`.
struct Pairing<'a> {
    plan: &'a Plan<'a>,
    rows: &'a RecordBatch,
    same: Vec<arrow::array::DynComparator>,
    pairs: Vec<(usize, usize)>,
    extra: Vec<usize>,
    missing: Vec<usize>,
    /// A row stands so often that not all of it is looked at.
    truncated: bool,
}

impl<'a> Pairing<'a> {
    fn new(plan: &'a Plan<'a>, rows: &'a RecordBatch) -> Result<Self> {
        let width = plan.columns.fields().len();
        let (t, a) = (
            rows.column(width).as_primitive::<Int64Type>(),
            rows.column(width + 1).as_primitive::<Int64Type>(),
        );
        let (mut extra, mut missing, mut truncated) = (Vec::new(), Vec::new(), false);
        for row in 0..rows.num_rows() {
            let surplus = t.value(row) - a.value(row);
            let side = if surplus > 0 { &mut extra } else { &mut missing };
            let times = surplus.unsigned_abs().min((KEPT - side.len().min(KEPT)) as u64) as usize;
            truncated |= (times as u64) < surplus.unsigned_abs();
            side.extend(std::iter::repeat_n(row, times));
        }
        let column = |at: usize| {
            make_comparator(rows.column(at).as_ref(), rows.column(at).as_ref(), SortOptions::default())
        };
        let same = (0..width).map(column).collect::<std::result::Result<_, _>>()?;
        let mut pairing = Self { plan, rows, same, pairs: Vec::new(), extra, missing, truncated };
        let exact = |at: &usize| !plan.columns.field(*at).data_type().is_floating();
        let key: Vec<usize> = match plan.key.is_empty() {
            true => (0..width).filter(exact).collect(),
            false => plan.key.clone(),
        };
        pairing.pair(&key, 0)?;
        if plan.key.is_empty() {
            let order: Vec<usize> = plan.order.into_iter().collect();
            pairing.pair(&order, width / 2 + 1)?;
        }
        Ok(pairing)
    }

    /// Pairs rows with equal values in `key` and at least so many equal columns.
    fn pair(&mut self, key: &[usize], least: usize) -> Result<()> {
        let fields = key.iter().map(|at| SortField::new(self.rows.column(*at).data_type().clone()));
        let columns: Vec<ArrayRef> = key.iter().map(|at| self.rows.column(*at).clone()).collect();
        let converted = match key.is_empty() {
            true => None,
            false => Some(RowConverter::new(fields.collect())?.convert_columns(&columns)?),
        };
        let bytes = |row: usize| converted.as_ref().map(|rows| rows.row(row).owned());
        let mut open: HashMap<_, Vec<usize>> = HashMap::new();
        for row in std::mem::take(&mut self.extra) {
            open.entry(bytes(row)).or_default().push(row);
        }
        for row in std::mem::take(&mut self.missing) {
            let candidates = open.entry(bytes(row)).or_default();
            let tried = candidates.iter().enumerate().take(if least == 0 { 1 } else { TRIED });
            let best = tried.map(|(at, other)| (self.agreeing(*other, row), at)).max();
            match best.filter(|(agree, _)| *agree >= least) {
                Some((_, at)) => self.pairs.push((candidates.swap_remove(at), row)),
                None => self.missing.push(row),
            }
        }
        self.extra = open.into_values().flatten().collect();
        self.extra.sort_unstable();
        Ok(())
    }

    fn agreeing(&self, a: usize, b: usize) -> usize {
        self.same.iter().filter(|compare| compare(a, b).is_eq()).count()
    }

    /// Whether two rows differ in floats alone, and there by rounding.
    fn near(&self, a: usize, b: usize) -> bool {
        (0..self.same.len()).all(|at| {
            if (self.same[at])(a, b).is_eq() {
                return true;
            }
            let column = self.rows.column(at);
            let Some(values) = column.as_primitive_opt::<Float64Type>() else { return false };
            let (a_value, b_value) = (values.value(a), values.value(b));
            let most = a_value.abs().max(b_value.abs()) * TOLERANCE;
            values.is_valid(a) && values.is_valid(b) && (a_value - b_value).abs() <= most
        })
    }

    fn into_result(mut self, found: &mut Compared, excuse: &Excuse<'_>) -> Result<()> {
        let micros = match self.plan.order {
            Some(order) => Some(cast(
                &cast(self.rows.column(order), &crate::stream::timestamp_type())?,
                &DataType::Int64,
            )?),
            None => None,
        };
        let time = |row: usize| {
            let micros = micros.as_ref()?.as_primitive::<Int64Type>();
            micros.is_valid(row).then(|| micros.value(row))
        };
        found.truncated |= self.truncated;
        if self.plan.single_precision {
            let pairs = std::mem::take(&mut self.pairs);
            let (near, far) = pairs.into_iter().partition(|(t, a)| self.near(*t, *a));
            let near: Vec<(usize, usize)> = near;
            found.equal += near.len() as i64;
            self.pairs = far;
        }
        let all = self.pairs.len() + self.missing.len() + self.extra.len();
        self.pairs.retain(|(t, a)| !excuse(Kind::Changed, time(*t), time(*a)));
        self.missing.retain(|row| !excuse(Kind::Missing, None, time(*row)));
        self.extra.retain(|row| !excuse(Kind::Extra, time(*row), None));
        found.excused = (all - self.pairs.len() - self.missing.len() - self.extra.len()) as i64;
        found.changed = self.pairs.len() as i64;
        found.missing = self.missing.len() as i64;
        found.extra = self.extra.len() as i64;
        for at in 0..self.plan.columns.fields().len() {
            found.columns.push(self.column(at, found.equal)?);
        }
        found.first = self.examples()?;
        Ok(())
    }

    fn column(&self, at: usize, equal: i64) -> Result<Column> {
        let values = self.rows.column(at);
        let both = equal + self.pairs.len() as i64;
        let agree = self.pairs.iter().filter(|(t, a)| (self.same[at])(*t, *a).is_eq()).count() as i64;
        let nulls = self.pairs.iter().filter(|(t, a)| values.is_null(*t) != values.is_null(*a)).count();
        let (mut smape, mut most) = (None, None);
        if values.data_type().is_numeric() {
            let numbers = cast(values, &DataType::Float64)?;
            let numbers = numbers.as_primitive::<Float64Type>();
            let (mut sum, mut greatest) = (0.0_f64, 0.0_f64);
            for (t, a) in self.pairs.iter().filter(|(t, a)| numbers.is_valid(*t) && numbers.is_valid(*a)) {
                let (t, a) = (numbers.value(*t), numbers.value(*a));
                let difference = (t - a).abs();
                if difference > 0.0 {
                    sum += difference / ((t.abs() + a.abs()) / 2.0);
                    greatest = greatest.max(difference);
                }
            }
            smape = Some(if both == 0 { 0.0 } else { 100.0 * sum / both as f64 });
            most = Some(greatest);
        }
        Ok(Column {
            name: self.plan.columns.field(at).name().clone(),
            exact_percent: if both == 0 { 100.0 } else { 100.0 * (equal + agree) as f64 / both as f64 },
            null_mismatches: nulls as i64,
            smape_percent: smape,
            max_difference: most,
        })
    }

    fn examples(&self) -> Result<Vec<Difference>> {
        let options = FormatOptions::default().with_null("NULL");
        let width = self.plan.columns.fields().len();
        let formatters =
            (0..width).map(|at| ArrayFormatter::try_new(self.rows.column(at).as_ref(), &options));
        let formatters = formatters.collect::<std::result::Result<Vec<_>, _>>()?;
        let name = |at: usize| self.plan.columns.field(at).name().clone();
        let text = |at: usize, row: usize| formatters[at].value(row).to_string();
        let whole = |kind, row: usize| Difference {
            kind,
            row: (0..width).map(|at| (name(at), text(at, row))).collect(),
            differs: Vec::new(),
        };
        let changed = self.pairs.iter().map(|(t, a)| {
            let (same, other): (Vec<usize>, Vec<usize>) =
                (0..width).partition(|at| (self.same[*at])(*t, *a).is_eq());
            Difference {
                kind: "changed",
                row: same.into_iter().map(|at| (name(at), text(at, *t))).collect(),
                differs: other.into_iter().map(|at| (name(at), text(at, *t), text(at, *a))).collect(),
            }
        });
        let shown = self.plan.shown;
        let missing = self.missing.iter().map(|row| whole("missing", *row));
        let extra = self.extra.iter().map(|row| whole("extra", *row));
        Ok(changed.take(shown).chain(missing.take(shown)).chain(extra.take(shown)).collect())
    }
}
