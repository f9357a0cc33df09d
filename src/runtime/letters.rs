//! Dead letters of rows, the late ledger, and Parquet segments of both.

use std::sync::Arc;

use arrow::array::{Int32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;

use crate::error::Result;
use crate::plan::NodeId;
use crate::runtime::chain::{Chain, Outgoing};
use crate::stream::letters::batches;
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
        dead: &[DeadLetter],
        topics: &[Arc<str>],
        barrier: Barrier,
    ) -> Result<Option<Vec<DeadLetter>>> {
        let reached = Arc::new(Reached::default());
        let mut out = Outgoing::new();
        for batch in batches(dead, topics)? {
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

/// The dead letter of a row that came out of a record: the record itself is found in the topic and its backup.
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
