//! Filter and projection. Rows keep their order and origin.
//!
//! A batch on which an expression fails is evaluated again row by row: the rows that fail are reported by index,
//! the others go on (DESIGN §3 *Failing expressions*). The fast path costs nothing for this.

use std::sync::Arc;

use arrow::array::{Array, AsArray, BooleanArray, Int64Array, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow::compute::{cast, concat_batches, prep_null_mask_filter, take};
use arrow::datatypes::{DataType, SchemaRef};
use datafusion::physical_plan::PhysicalExpr;

use crate::error::{Error, Result};
use crate::stream::ChangeBatch;

/// Rows of the input that an expression could not be evaluated on, with the reason.
pub type Failed = Vec<(usize, String)>;

/// Evaluates `exprs`; `schema` names the result. Failing rows are left out and reported in `failed`.
///
/// # Errors
/// Internal: an expression gave columns that do not fit `schema`.
pub fn project(
    exprs: &[Arc<dyn PhysicalExpr>],
    schema: &SchemaRef,
    batch: &ChangeBatch,
    failed: &mut Failed,
) -> Result<ChangeBatch> {
    match evaluate(exprs, schema, &batch.rows) {
        Ok(rows) => Ok(batch.with_rows(rows)),
        Err(_) => {
            let (kept, rows) = row_by_row(batch.rows.num_rows(), failed, |row| {
                evaluate(exprs, schema, &batch.rows.slice(row, 1))
            });
            let rows = concat_batches(schema, &rows)?;
            Ok(batch.take(&kept)?.with_rows(rows))
        }
    }
}

/// Keeps the rows on which `predicate` is true; NULL is not true. Failing rows are left out and reported.
///
/// # Errors
/// Internal: the predicate is not Boolean.
pub fn filter(
    predicate: &Arc<dyn PhysicalExpr>,
    batch: &ChangeBatch,
    failed: &mut Failed,
) -> Result<ChangeBatch> {
    let keep = decide(predicate, batch, failed)?;
    if keep.true_count() == keep.len() {
        return Ok(batch.clone());
    }
    Ok(batch.filter(&keep)?)
}

/// As [`filter`], for the newest rows of keys: a row on which `predicate` is not true becomes a deletion of its key
/// (weight −1), as its key may have had a row before.
///
/// # Errors
/// Internal: the predicate is not Boolean.
pub fn filter_newest(
    predicate: &Arc<dyn PhysicalExpr>,
    batch: &ChangeBatch,
    failed: &mut Failed,
) -> Result<ChangeBatch> {
    let keep = decide(predicate, batch, failed)?;
    let before = |row: usize| batch.weights.as_ref().map_or(1, |weights| weights.value(row));
    let weights = (0..batch.num_rows()).map(|row| if keep.value(row) { before(row) } else { -1 });
    Ok(ChangeBatch { weights: Some(weights.collect()), ..batch.clone() })
}

/// A row per element of the list column `list`, with the order key of its row. `columns` names the input column of each
/// output column; the list's stands for its elements. A row whose list is NULL or empty goes, or stays with NULL
/// (`keep_empty`).
///
/// # Errors
/// Internal: the column is no list.
pub fn unnest(
    columns: &[usize],
    list: usize,
    keep_empty: bool,
    schema: &SchemaRef,
    batch: &ChangeBatch,
) -> Result<ChangeBatch> {
    let lists = batch.rows.column(list);
    let lists = match lists.data_type() {
        DataType::List(_) => Arc::clone(lists),
        DataType::LargeList(field) | DataType::FixedSizeList(field, _) => {
            cast(lists, &DataType::List(Arc::clone(field)))?
        }
        other => return Err(Error::internal(format!("{other} cannot be unnested"))),
    };
    let lists = lists.as_list::<i32>();
    let (mut rows, mut elements) = (Vec::new(), Vec::new());
    for (row, bounds) in lists.offsets().windows(2).enumerate() {
        let (first, last) = if lists.is_valid(row) { (bounds[0], bounds[1]) } else { (0, 0) };
        if keep_empty && first == last {
            rows.push(row as u32);
            elements.push(None);
        }
        for element in first..last {
            rows.push(row as u32);
            elements.push(Some(element as u32));
        }
    }
    let (rows, elements) = (UInt32Array::from(rows), UInt32Array::from(elements));
    let pick = |column: &usize| match *column == list {
        true => take(lists.values(), &elements, None),
        false => take(batch.rows.column(*column), &rows, None),
    };
    let picked = columns.iter().map(pick).collect::<std::result::Result<Vec<_>, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
    let rows_out = RecordBatch::try_new_with_options(Arc::clone(schema), picked, &options)?;
    let weight = |weights: &Int64Array| Ok::<_, Error>(take(weights, &rows, None)?.as_primitive().clone());
    let weights = batch.weights.as_ref().map(weight).transpose()?;
    Ok(ChangeBatch { rows: rows_out, weights, origin: batch.origin.take(&rows)? })
}

/// Evaluates expressions over a batch whose schema they were planned for.
///
/// # Errors
/// A user error when an expression fails on some row.
pub fn evaluate(
    exprs: &[Arc<dyn PhysicalExpr>],
    schema: &SchemaRef,
    rows: &RecordBatch,
) -> Result<RecordBatch> {
    let columns = exprs
        .iter()
        .map(|expr| expr.evaluate(rows)?.into_array(rows.num_rows()))
        .collect::<datafusion::error::Result<Vec<_>>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    Ok(RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)?)
}

/// On which rows the predicate is true; those on which it fails are reported and count as not true.
pub(super) fn decide(
    predicate: &Arc<dyn PhysicalExpr>,
    batch: &ChangeBatch,
    failed: &mut Failed,
) -> Result<BooleanArray> {
    if let Ok(keep) = truth(predicate, &batch.rows) {
        return Ok(keep);
    }
    let rows = batch.rows.num_rows();
    let (kept, truths) = row_by_row(rows, failed, |row| truth(predicate, &batch.rows.slice(row, 1)));
    let mut keep = vec![false; rows];
    kept.values().iter().zip(&truths).for_each(|(row, truth)| keep[*row as usize] = truth.value(0));
    Ok(keep.into())
}

fn truth(predicate: &Arc<dyn PhysicalExpr>, rows: &RecordBatch) -> Result<BooleanArray> {
    let value = predicate.evaluate(rows)?.into_array(rows.num_rows())?;
    let any: &dyn std::any::Any = value.as_any();
    let truth = any
        .downcast_ref::<BooleanArray>()
        .ok_or_else(|| Error::internal("a WHERE condition is not Boolean"))?;
    Ok(if truth.null_count() > 0 { prep_null_mask_filter(truth) } else { truth.clone() })
}

/// The rows that succeed, with their results.
fn row_by_row<T>(
    rows: usize,
    failed: &mut Failed,
    one: impl Fn(usize) -> Result<T>,
) -> (UInt32Array, Vec<T>) {
    let mut kept = Vec::with_capacity(rows);
    let mut results = Vec::with_capacity(rows);
    for row in 0..rows {
        match one(row) {
            Ok(result) => {
                kept.push(row as u32);
                results.push(result);
            }
            Err(error) => failed.push((row, error.to_string())),
        }
    }
    (UInt32Array::from(kept), results)
}

#[cfg(test)]
mod tests {
    use arrow::array::{Int64Array, RecordBatch};
    use arrow::datatypes::{DataType, Field, Schema};
    use datafusion::common::DFSchema;
    use datafusion::prelude::{SessionContext, col, lit};

    use super::*;
    use crate::stream::Origin;

    fn batch(values: Vec<Option<i64>>) -> ChangeBatch {
        let schema = Arc::new(Schema::new(vec![Field::new("a", DataType::Int64, true)]));
        let n = values.len() as i64;
        let rows = RecordBatch::try_new(schema, vec![Arc::new(Int64Array::from(values))]).unwrap();
        let count = || Int64Array::from_iter_values(0..n);
        ChangeBatch::append(rows, Origin { time: count(), place: count(), offset: count() })
    }

    fn expr(of: datafusion::prelude::Expr, batch: &ChangeBatch) -> Arc<dyn PhysicalExpr> {
        let schema = DFSchema::try_from(batch.rows.schema()).unwrap();
        SessionContext::new().create_physical_expr(of, &schema).unwrap()
    }

    #[test]
    fn a_failing_row_does_not_take_its_neighbours_along() {
        let input = batch(vec![Some(1), Some(0), None, Some(4)]);
        let schema = Arc::new(Schema::new(vec![Field::new("b", DataType::Int64, true)]));
        let mut failed = Failed::new();
        let out = project(&[expr(lit(8i64) / col("a"), &input)], &schema, &input, &mut failed).unwrap();
        assert_eq!(
            out.rows.column(0).as_ref(),
            &Int64Array::from(vec![Some(8), None, Some(2)]) as &dyn Array
        );
        assert_eq!(out.origin.offset.values().to_vec(), [0, 2, 3]);
        assert_eq!(failed.iter().map(|(row, _)| *row).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn null_is_not_true_and_a_failing_condition_is_reported() {
        let input = batch(vec![Some(1), Some(0), None, Some(-4)]);
        let mut failed = Failed::new();
        let kept = filter(&expr((lit(8i64) / col("a")).gt(lit(0i64)), &input), &input, &mut failed).unwrap();
        assert_eq!(kept.origin.offset.values().to_vec(), [0]);
        assert_eq!(failed.len(), 1);
        let mut failed = Failed::new();
        let kept = filter(&expr(col("a").gt_eq(lit(0i64)), &input), &input, &mut failed).unwrap();
        assert_eq!((kept.origin.offset.values().to_vec(), failed.len()), (vec![0, 1], 0));
    }
}
