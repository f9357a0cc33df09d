//! What a source makes of decoded records: the same in the source task and wherever records are decoded again.
//!
//! Computed columns are evaluated in order; a row on which one fails, whose event time is NULL or is more than
//! `max_future` ahead of its record's timestamp becomes a dead letter of the source. The others get their place in the
//! total order and the metadata columns. Nothing here depends on other rows or on a clock.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt32Array,
};
use arrow::datatypes::{Schema, SchemaRef, TimestampMicrosecondType};

use crate::connectors::SourceBatch;
use crate::error::Result;
use crate::plan::SourcePlan;
use crate::stream::{DeadLetter, Origin, Place, Stage};

impl SourcePlan {
    /// Computed columns, event time, metadata; rows that fail become dead letters.
    ///
    /// # Errors
    /// Internal only.
    pub fn accept(
        &self,
        mut batch: SourceBatch,
        topic: &Arc<str>,
        dead: &mut Vec<DeadLetter>,
    ) -> Result<Option<(RecordBatch, Origin)>> {
        dead.append(&mut batch.dead);
        let mut schema: SchemaRef = Arc::clone(&self.physical);
        for (expr, field) in &self.computed {
            let value =
                |rows: &RecordBatch| expr.evaluate(rows).and_then(|value| value.into_array(rows.num_rows()));
            let column = match value(&batch.rows) {
                Ok(column) => column,
                Err(_) => {
                    let failing =
                        |row: usize| value(&batch.rows.slice(row, 1)).err().map(|error| error.to_string());
                    let failed: Vec<Option<String>> = (0..batch.rows.num_rows()).map(failing).collect();
                    batch = self.without(&batch, topic, &failed, (Stage::Expression, "expression"), dead)?;
                    value(&batch.rows)?
                }
            };
            let mut fields = schema.fields().to_vec();
            fields.push(Arc::new(field.clone()));
            schema = Arc::new(Schema::new(fields));
            let mut columns = batch.rows.columns().to_vec();
            // A NULL in a computed column that never is NULL by its types cannot happen; the schema says so.
            columns.push(column);
            batch.rows = RecordBatch::try_new(Arc::clone(&schema), columns)?;
        }
        let batch = self.timely(batch, topic, dead)?;
        if batch.rows.num_rows() == 0 {
            return Ok(None);
        }
        let origin = self.origin(&batch)?;
        let mut columns = batch.rows.columns().to_vec();
        if self.has_metadata() {
            columns.extend(metadata(topic, &batch));
        }
        Ok(Some((RecordBatch::try_new(Arc::clone(&self.schema), columns)?, origin)))
    }

    /// Refuses rows without event time or too far ahead of their record's timestamp (`max_future`).
    fn timely(
        &self,
        batch: SourceBatch,
        topic: &Arc<str>,
        dead: &mut Vec<DeadLetter>,
    ) -> Result<SourceBatch> {
        let Some(column) = self.event_time else { return Ok(batch) };
        let times = batch.rows.column(column).as_primitive::<TimestampMicrosecondType>();
        let future = |row: usize| {
            let bound = batch.timestamp.value(row).saturating_mul(1_000).saturating_add(self.max_future);
            batch.timestamp.is_valid(row) && times.value(row) > bound
        };
        let rows = 0..batch.rows.num_rows();
        if times.null_count() == 0 && !rows.clone().any(future) {
            return Ok(batch);
        }
        let nulls: Vec<Option<String>> =
            rows.clone().map(|row| times.is_null(row).then(|| "the event time is NULL".to_owned())).collect();
        let ahead = |row: usize| {
            let days = self.max_future / 86_400_000_000;
            (times.is_valid(row) && future(row))
                .then(|| format!("the event time is more than {days} day(s) after the record's timestamp"))
        };
        let ahead: Vec<Option<String>> = rows.map(ahead).collect();
        let kept: Vec<Option<String>> = ahead
            .into_iter()
            .zip(&nulls)
            .filter(|(_, null)| null.is_none())
            .map(|(ahead, _)| ahead)
            .collect();
        let batch = self.without(&batch, topic, &nulls, (Stage::Expression, "null_event_time"), dead)?;
        self.without(&batch, topic, &kept, (Stage::Future, "future"), dead)
    }

    /// Turns the rows with a reason into dead letters and returns the others.
    fn without(
        &self,
        batch: &SourceBatch,
        topic: &Arc<str>,
        failed: &[Option<String>],
        (stage, kind): (Stage, &'static str),
        dead: &mut Vec<DeadLetter>,
    ) -> Result<SourceBatch> {
        let bytes = |column: &Option<arrow::array::BinaryArray>, row: usize| {
            column.as_ref().filter(|column| column.is_valid(row)).map(|column| column.value(row).to_vec())
        };
        let at: Arc<str> = self.name.as_str().into();
        for (row, reason) in failed.iter().enumerate() {
            let Some(reason) = reason else { continue };
            dead.push(DeadLetter {
                stage,
                at: Arc::clone(&at),
                topic: Arc::clone(topic),
                partition: batch.partition.value(row),
                offset: batch.offset.value(row),
                timestamp_ms: batch.timestamp.is_valid(row).then(|| batch.timestamp.value(row)),
                key: bytes(&batch.key, row),
                payload: bytes(&batch.payload, row),
                headers: None,
                error: reason.clone(),
                kind,
            });
        }
        let kept: Vec<u32> = failed
            .iter()
            .enumerate()
            .filter(|(_, reason)| reason.is_none())
            .map(|(row, _)| row as u32)
            .collect();
        select(batch, &UInt32Array::from(kept))
    }

    fn origin(&self, batch: &SourceBatch) -> Result<Origin> {
        let place = batch.partition.values().iter().map(|partition| Place::new(0, 0, *partition).0);
        let time = match self.event_time {
            Some(column) => {
                let times = batch.rows.column(column).as_primitive::<TimestampMicrosecondType>();
                Int64Array::new(times.values().clone(), None)
            }
            None => batch.timestamp.values().iter().map(|ms| ms.saturating_mul(1_000)).collect(),
        };
        Ok(Origin { time, place: Int64Array::from_iter_values(place), offset: batch.offset.clone() })
    }
}

fn metadata(topic: &str, batch: &SourceBatch) -> Vec<ArrayRef> {
    let rows = batch.rows.num_rows();
    let timestamp: TimestampMicrosecondArray =
        batch.timestamp.iter().map(|ms| ms.map(|ms| ms.saturating_mul(1_000))).collect();
    let key = batch.key.clone().unwrap_or_else(|| arrow::array::BinaryArray::new_null(rows));
    vec![
        Arc::new(StringArray::from_iter_values(std::iter::repeat_n(topic, rows))),
        Arc::new(batch.partition.clone()),
        Arc::new(batch.offset.clone()),
        Arc::new(timestamp.with_timezone("UTC")),
        Arc::new(key),
    ]
}

fn select(batch: &SourceBatch, rows: &UInt32Array) -> Result<SourceBatch> {
    let take = |array: &dyn Array| arrow::compute::take(array, rows, None);
    let binary = |column: &Option<arrow::array::BinaryArray>| {
        column.as_ref().map(|column| take(column).map(|taken| taken.as_binary().clone())).transpose()
    };
    Ok(SourceBatch {
        rows: arrow::compute::take_record_batch(&batch.rows, rows)?,
        partition: take(&batch.partition)?.as_primitive().clone(),
        offset: take(&batch.offset)?.as_primitive().clone(),
        timestamp: take(&batch.timestamp)?.as_primitive().clone(),
        key: binary(&batch.key)?,
        payload: binary(&batch.payload)?,
        ..batch.clone()
    })
}
