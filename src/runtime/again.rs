//! Records that are read again: what was decided about them stands, and reading ends where it ended. An epoch that runs
//! again ([`remake`](super::remake)), and all that a pipeline has read, for sinks that are new to it
//! ([`building`](super::building)).

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{AsArray, BooleanArray, Int64Array, RecordBatch};
use arrow::compute::{filter, filter_record_batch};
use arrow::datatypes::{Int32Type, Int64Type};
use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::connectors::SourceBatch;
use crate::error::{Error, Result};
use crate::state::store::StateStore;
use crate::stream::{Micros, Place, Positions};

/// What was decided about records that are read again.
#[derive(Debug, Default)]
pub struct Decided {
    /// (topic, partition, offset) of the late rows.
    pub late: HashSet<Origin>,
    /// Those that were never read: dead letters that are in the backup since they were replayed.
    pub never: HashSet<Origin>,
    /// The source's watermark at the end; `None` before any row.
    pub watermark: Option<Micros>,
    /// Its watermark moves meanwhile, with the slowest partition that has not come to its end, and never above the one at
    /// the end. A row below its own partition's watermark is late whether `late` has it or not: the ledger begins with
    /// the state. Else the watermark stands still until the end.
    pub moves: bool,
}

/// (topic, partition, offset).
pub type Origin = (u16, i32, i64);

/// What segments of the ledger hold, or files of replayed records.
///
/// # Errors
/// External: one is damaged or cannot be read, or names a topic that the source does not have.
pub async fn late<'s>(
    store: &StateStore,
    segments: impl Iterator<Item = &'s str>,
    topics: &[Arc<str>],
) -> Result<HashSet<Origin>> {
    let mut late = HashSet::new();
    for segment in segments {
        let bytes = store.get_file(segment).await?;
        let read = read_ledger(bytes, topics);
        late.extend(read.map_err(|error| error.context(segment))?);
    }
    Ok(late)
}

/// Reads a segment of the ledger back.
///
/// # Errors
/// External: it is damaged, or names a topic that the source does not have.
pub(super) fn read_ledger(segment: Bytes, topics: &[Arc<str>]) -> Result<Vec<Origin>> {
    let damaged = || {
        let hint = "Restore the state folder from a copy, or run `millstream reset` to begin a new state.";
        Error::external("a segment of the late ledger is damaged").hint(hint)
    };
    let reader = ParquetRecordBatchReaderBuilder::try_new(segment).and_then(|builder| builder.build());
    let mut late = Vec::new();
    for batch in reader.map_err(|error| damaged().because(error))? {
        let batch = batch.map_err(|error| damaged().because(error))?;
        let names = batch.column_by_name("topic").and_then(|column| column.as_string_opt::<i32>());
        let partitions =
            batch.column_by_name("partition").and_then(|column| column.as_primitive_opt::<Int32Type>());
        let offsets =
            batch.column_by_name("offset").and_then(|column| column.as_primitive_opt::<Int64Type>());
        let (Some(names), Some(partitions), Some(offsets)) = (names, partitions, offsets) else {
            return Err(damaged());
        };
        for row in 0..batch.num_rows() {
            let topic = topics.iter().position(|topic| **topic == *names.value(row)).ok_or_else(damaged)?;
            late.push((topic as u16, partitions.value(row), offsets.value(row)));
        }
    }
    Ok(late)
}

/// What of a batch lies before the ends and was read. No partition counts as idle.
pub fn up_to(mut batch: SourceBatch, ends: &Positions, never: &HashSet<Origin>) -> Result<SourceBatch> {
    batch.at_end.clear();
    let before = |partition: i32, offset: i64| {
        ends.iter().any(|(place, end)| place.partition() == partition && offset < end)
    };
    let within = |(place, reached): (Place, i64)| (place, ends.get(place).unwrap_or(0).min(reached));
    batch.reached = batch.reached.iter().map(within).collect();
    batch.dead.retain(|letter| before(letter.partition, letter.offset));
    let kept: BooleanArray = batch
        .partition
        .values()
        .iter()
        .zip(batch.offset.values())
        .map(|(partition, offset)| {
            Some(
                before(*partition, *offset)
                    && (never.is_empty() || !never.contains(&(0, *partition, *offset))),
            )
        })
        .collect();
    if kept.true_count() == kept.len() {
        return Ok(batch);
    }
    let offsets =
        |array: &Int64Array| filter(array, &kept).map(|kept| kept.as_primitive::<Int64Type>().clone());
    let bytes = |array: &Option<arrow::array::BinaryArray>| {
        array.as_ref().map(|array| filter(array, &kept).map(|kept| kept.as_binary().clone())).transpose()
    };
    let rows: RecordBatch = filter_record_batch(&batch.rows, &kept)?;
    Ok(SourceBatch {
        rows,
        partition: filter(&batch.partition, &kept)?.as_primitive().clone(),
        offset: offsets(&batch.offset)?,
        timestamp: offsets(&batch.timestamp)?,
        key: bytes(&batch.key)?,
        payload: bytes(&batch.payload)?,
        ..batch
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::Int32Array;
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;
    use crate::stream::{DeadLetter, Stage};

    fn place(partition: i32) -> Place {
        Place::new(0, 0, partition)
    }

    fn batch(rows: &[(i32, i64)], reached: &[(i32, i64)]) -> SourceBatch {
        let numbers: Int64Array = rows.iter().map(|(_, offset)| offset * 10).collect();
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        SourceBatch {
            rows: RecordBatch::try_new(schema, vec![Arc::new(numbers.clone())]).unwrap(),
            partition: rows.iter().map(|(partition, _)| *partition).collect::<Int32Array>(),
            offset: rows.iter().map(|(_, offset)| *offset).collect(),
            timestamp: numbers,
            key: None,
            payload: Some(rows.iter().map(|(_, offset)| Some(vec![*offset as u8])).collect()),
            dead: Vec::new(),
            tombstones: 0,
            skipped: 0,
            reached: reached.iter().map(|(partition, next)| (place(*partition), *next)).collect(),
            at_end: vec![place(0)],
            missing_offsets: 0,
        }
    }

    fn letter(partition: i32, offset: i64) -> DeadLetter {
        DeadLetter {
            stage: Stage::Decode,
            at: "s".into(),
            topic: "t".into(),
            partition,
            offset,
            timestamp_ms: None,
            key: None,
            payload: None,
            headers: None,
            error: String::new(),
            kind: "not_json",
        }
    }

    #[test]
    fn records_behind_the_end_are_not_read() {
        let ends: Positions = [(place(0), 5), (place(1), 9)].into_iter().collect();
        let mut whole = batch(&[(0, 3), (1, 8), (0, 4)], &[(0, 5), (1, 9)]);
        whole.dead = vec![letter(0, 2)];
        let kept = up_to(whole.clone(), &ends, &HashSet::new()).unwrap();
        assert_eq!((kept.rows, kept.dead.len(), kept.reached), (whole.rows, 1, whole.reached));
        assert!(kept.at_end.is_empty(), "a partition that was read to its end could become idle");

        let mut beyond = batch(&[(0, 4), (1, 7), (0, 5), (1, 8), (1, 9), (0, 6)], &[(0, 8), (1, 8)]);
        beyond.dead = vec![letter(0, 7), letter(1, 7)];
        let kept = up_to(beyond, &ends, &[(0, 1, 7)].into()).unwrap();
        assert_eq!(kept.offset.values().to_vec(), [4, 8]);
        assert_eq!(kept.partition.values().to_vec(), [0, 1]);
        assert_eq!(kept.timestamp.values().to_vec(), [40, 80]);
        assert_eq!(kept.rows.num_rows(), 2);
        assert_eq!(kept.payload.unwrap().value(1), [8]);
        assert_eq!(kept.dead.iter().map(|letter| letter.partition).collect::<Vec<_>>(), [1]);
        let reached: Vec<_> = kept.reached.iter().collect();
        assert_eq!(reached, [(place(0), 5), (place(1), 8)]);
    }
}
