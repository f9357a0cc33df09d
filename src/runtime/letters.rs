//! Dead letters of rows, the late ledger, and Parquet segments of both.
//!
//! # The record of a letter
//! A row carries where its record lies and nothing else of it. While a poll's rows go through the chain of the source,
//! the poll's records are still there: a letter of such a row gets payload, key, timestamp and headers ([`Records`]).
//! Behind an exchange (OVER, GROUP BY, a Redis table), in a sink and while history is read they are not, and keeping them
//! for rows that do not fail would cost every row: such a letter names the record's place, under which the backup has its
//! row (`dead-letters show`). A row of a GROUP BY names the newest record of its group.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arrow::array::{
    Array, AsArray, BinaryArray, BooleanArray, Int32Array, Int64Array, RecordBatch, StringArray,
};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{DataType, Field, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::connectors::SourceBatch;
use crate::error::{Error, Result};
use crate::plan::NodeId;
use crate::runtime::chain::{Chain, Outgoing};
use crate::stream::letters::with_origin;
use crate::stream::{Barrier, ChangeBatch, DeadLetter, Message, Place, Port, Reached, Stage};

/// The stage of `dead_letters`: the coordinator runs its chain, one task per sink reads it. The letters of an epoch go
/// through it when all other shards have reported the epoch, so what the sinks write of them is in the same manifest.
pub struct LetterStage {
    pub node: NodeId,
    pub chain: Chain,
    /// Reports of its sinks per epoch.
    pub reports: usize,
}

impl LetterStage {
    /// Sends the letters of an epoch, then its barrier. Gives the letters on which an expression failed; `None`: a sink
    /// is gone and says itself why.
    ///
    /// # Errors
    /// Internal only.
    pub async fn pass(
        &mut self,
        letters: Vec<ChangeBatch>,
        barrier: Barrier,
    ) -> Result<Option<Vec<DeadLetter>>> {
        let reached = Arc::new(Reached::default());
        let mut out = Outgoing::new();
        for batch in letters {
            // They come from nowhere: rows that the node adds.
            self.chain.counts.of(self.node).added += batch.num_rows() as u64;
            self.chain.counts.out(self.node, Port::Accepted, batch.num_rows());
            self.chain.run(self.node, Port::Accepted, &batch, &reached, &mut out)?;
            if self.chain.flush(&mut out).await.is_err() {
                return Ok(None);
            }
        }
        self.chain.broadcast(&Message::Barrier(barrier), &mut out);
        let sent = self.chain.flush(&mut out).await;
        Ok(sent.is_ok().then(|| std::mem::take(&mut self.chain.dead)))
    }
}

/// The records of a poll, for the letters of its rows.
pub struct Records {
    partition: Int32Array,
    offset: Int64Array,
    timestamp: Int64Array,
    key: Option<BinaryArray>,
    payload: Option<BinaryArray>,
}

impl Records {
    /// Shares the columns of the poll.
    pub fn of(batch: &SourceBatch) -> Self {
        Self {
            partition: batch.partition.clone(),
            offset: batch.offset.clone(),
            timestamp: batch.timestamp.clone(),
            key: batch.key.clone(),
            payload: batch.payload.clone(),
        }
    }

    /// Puts into each letter what there is of its record, but for headers.
    pub fn add_to(&self, letters: &mut [DeadLetter]) {
        let mut wanted: HashMap<(i32, i64), Vec<&mut DeadLetter>> = HashMap::new();
        for letter in letters {
            wanted.entry((letter.partition, letter.offset)).or_default().push(letter);
        }
        let bytes = |column: &Option<BinaryArray>, row: usize| {
            column.as_ref().filter(|column| column.is_valid(row)).map(|column| column.value(row).to_vec())
        };
        for (row, place) in self.partition.values().iter().zip(self.offset.values()).enumerate() {
            for letter in wanted.remove(&(*place.0, *place.1)).into_iter().flatten() {
                letter.timestamp_ms = self.timestamp.is_valid(row).then(|| self.timestamp.value(row));
                letter.key = bytes(&self.key, row);
                letter.payload = bytes(&self.payload, row);
            }
        }
    }
}

/// The dead letter of a row that came out of a record: it says where the record lies.
pub fn of_row(
    stage: Stage,
    at: &Arc<str>,
    kind: &'static str,
    topics: &[Arc<str>],
    batch: &ChangeBatch,
    row: usize,
    error: String,
) -> DeadLetter {
    let (_, place, offset) = batch.origin.key(row);
    let place = Place(place);
    DeadLetter {
        stage,
        at: Arc::clone(at),
        topic: topics.get(usize::from(place.topic())).cloned().unwrap_or_else(|| "".into()),
        partition: place.partition(),
        offset,
        timestamp_ms: None,
        key: None,
        payload: None,
        headers: None,
        error,
        kind,
    }
}

/// `topic, partition, offset` of late rows; `None` when there are none.
///
/// # Errors
/// Internal only.
pub fn ledger(topics: &[Arc<str>], late: &[(u16, i32, i64)]) -> Result<Option<RecordBatch>> {
    if late.is_empty() {
        return Ok(None);
    }
    let topic = |at: u16| topics.get(usize::from(at)).map_or("", |topic| topic);
    let schema = Schema::new(vec![
        Field::new("topic", DataType::Utf8, false),
        Field::new("partition", DataType::Int32, false),
        Field::new("offset", DataType::Int64, false),
    ]);
    Ok(Some(RecordBatch::try_new(
        Arc::new(schema),
        vec![
            Arc::new(StringArray::from_iter_values(late.iter().map(|(t, _, _)| topic(*t)))),
            Arc::new(Int32Array::from_iter_values(late.iter().map(|(_, p, _)| *p))),
            Arc::new(Int64Array::from_iter_values(late.iter().map(|(_, _, o)| *o))),
        ],
    )?))
}

/// The letters of a segment that went to the sinks of letters, in their order: all but those that `own` refused, which are
/// the names of these sinks and of their views.
///
/// # Errors
/// External: it is damaged, or was written by an earlier version.
#[cfg_attr(not(feature = "delta"), expect(dead_code, reason = "only Delta tables are made again"))]
pub fn read(segment: Bytes, own: &HashSet<&str>, topics: &[Arc<str>]) -> Result<Vec<ChangeBatch>> {
    let unreadable = || {
        Error::external("a segment of dead letters is damaged, or of an earlier version")
            .hint("Restore the state folder from a copy.")
    };
    let reader = ParquetRecordBatchReaderBuilder::try_new(segment).and_then(|builder| builder.build());
    let mut letters = Vec::new();
    for rows in reader.map_err(|error| unreadable().because(error))? {
        let rows = rows.map_err(|error| unreadable().because(error))?;
        let at = rows.column_by_name("at").and_then(|at| at.as_string_opt::<i32>()).ok_or_else(unreadable)?;
        let sent: BooleanArray = at.iter().map(|at| Some(at.is_some_and(|at| !own.contains(at)))).collect();
        let rows = filter_record_batch(&rows, &sent)?;
        letters.push(with_origin(rows, topics).map_err(|error| unreadable().because(error))?);
    }
    Ok(letters)
}

/// Batches of one schema as one Parquet file.
///
/// # Errors
/// Internal only.
pub fn parquet(batches: &[RecordBatch]) -> Result<Bytes> {
    let schema = batches.first().map_or_else(|| Arc::new(Schema::empty()), RecordBatch::schema);
    let mut writer = ArrowWriter::try_new(Vec::new(), schema, None)?;
    for batch in batches {
        writer.write(batch)?;
    }
    Ok(Bytes::from(writer.into_inner()?))
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::SchemaRef;

    use super::*;
    use crate::stream::Positions;

    #[test]
    fn letters_of_a_poll_get_their_records() {
        let schema: SchemaRef = Arc::new(Schema::empty());
        let bytes =
            |texts: [Option<&str>; 3]| Some(texts.iter().map(|text| text.map(str::as_bytes)).collect());
        let batch = SourceBatch {
            rows: RecordBatch::new_empty(schema),
            partition: Int32Array::from(vec![0, 1, 0]),
            offset: Int64Array::from(vec![5, 5, 6]),
            timestamp: Int64Array::from(vec![Some(50), None, Some(60)]),
            key: bytes([None, Some("k"), Some("l")]),
            payload: bytes([Some("a"), Some("b"), Some("c")]),
            dead: Vec::new(),
            tombstones: 0,
            skipped: 0,
            reached: Positions::default(),
            at_end: Vec::new(),
            missing_offsets: 0,
        };
        let letter = |partition, offset| DeadLetter {
            stage: Stage::Expression,
            at: "v".into(),
            topic: "t".into(),
            partition,
            offset,
            timestamp_ms: None,
            key: None,
            payload: None,
            headers: None,
            error: String::new(),
            kind: "expression",
        };
        let mut letters = [letter(1, 5), letter(0, 6), letter(0, 5), letter(1, 5), letter(1, 6)];
        Records::of(&batch).add_to(&mut letters);
        let text = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(|b| String::from_utf8_lossy(b).into_owned());
        let found: Vec<_> =
            letters.iter().map(|l| (l.timestamp_ms, text(&l.key), text(&l.payload))).collect();
        let some = |text: &str| Some(text.to_owned());
        let twice = (None, some("k"), some("b"));
        let expected = [
            twice.clone(),
            (Some(60), some("l"), some("c")),
            (Some(50), None, some("a")),
            twice,
            (None, None, None),
        ];
        assert_eq!(found, expected);
    }
}
