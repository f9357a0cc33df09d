//! Sink tasks: Delta and NDJSON (files prepared per epoch), append (Kafka, console), collect. The online one is in `online`.

use std::sync::Arc;

#[cfg(feature = "delta")]
use arrow::array::BooleanArray;
use tokio::sync::mpsc::Sender;

use crate::connectors::AppendSink;
#[cfg(feature = "delta")]
use crate::connectors::delta::{DeltaConfig, DeltaWriter};
use crate::connectors::ndjson::NdjsonWriter;
use crate::error::{Error, Result};
use crate::plan::NodeId;
use crate::runtime::counts::Count;
use crate::runtime::inbox::{Event, Inbox};
use crate::runtime::metrics::{Metrics, SinkMetrics};
use crate::runtime::report::{Report, StatePart, behind};
use crate::state::manifest::PreparedFile;
use crate::stream::Barrier;
use crate::stream::clock::Clock;
#[cfg(feature = "delta")]
use crate::stream::{ChangeBatch, Place, Positions};

pub(super) fn coordinator_gone<E>(_: E) -> Error {
    Error::internal("the coordinator is gone")
}

/// Exactly-once: rows into files, files into the manifest.
#[cfg(feature = "delta")]
pub struct DeltaTask {
    pub node: NodeId,
    pub config: DeltaConfig,
    pub writer: DeltaWriter,
    /// The first epoch of this run, for the names of files.
    pub epoch: u64,
    /// The table has the rows below these offsets: they come from it, to build other states.
    pub floor: Positions,
    pub inbox: Inbox,
    pub reports: Sender<Report>,
    pub metrics: Arc<SinkMetrics>,
}

#[cfg(feature = "delta")]
impl DeltaTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// External: the table's store failed.
    pub async fn run(mut self) -> Result<()> {
        let mut watermark = crate::stream::START_OF_TIME;
        let mut epoch = self.epoch;
        let mut count = Count::default();
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, .. } => {
                    count.rows_in += batch.num_rows() as u64;
                    let batch = if self.floor.is_empty() { batch } else { self.above(&batch, &mut count)? };
                    self.writer.write(&self.config.stored(&batch, epoch)?)?;
                    // Closed files leave the memory during the epoch.
                    if self.writer.wants_upload() {
                        self.writer.upload(epoch).await?;
                    }
                    Metrics::add(&self.metrics.rows, batch.num_rows() as u64);
                }
                Event::Watermark { time, .. } => watermark = time,
                Event::Barrier(barrier) => {
                    let prepared = self.writer.prepare(barrier.epoch)?;
                    epoch = barrier.epoch + 1;
                    let (node, count) = (self.node, std::mem::take(&mut count));
                    behind(&self.reports, async move {
                        let files = prepared.await?.into_iter().map(PreparedFile::from).collect();
                        let dead = Vec::new();
                        Ok(Report::Prepared { node, epoch: barrier.epoch, files, watermark, dead, count })
                    });
                    if barrier.last {
                        return Ok(());
                    }
                }
                Event::End => return Ok(()),
            }
        }
    }

    /// The rows that the table does not have yet.
    fn above(&self, batch: &ChangeBatch, count: &mut Count) -> Result<ChangeBatch> {
        let origin = &batch.origin;
        let is_new = |(place, offset): (&i64, &i64)| {
            self.floor.get(Place(*place)).is_none_or(|floor| *offset >= floor)
        };
        let new: BooleanArray =
            origin.place.values().iter().zip(origin.offset.values()).map(|row| Some(is_new(row))).collect();
        count.filtered += (batch.num_rows() - new.true_count()) as u64;
        Ok(batch.filter(&new)?)
    }
}

#[cfg(feature = "delta")]
impl From<crate::connectors::delta::PreparedFile> for PreparedFile {
    fn from(file: crate::connectors::delta::PreparedFile) -> Self {
        Self { path: file.path, size: file.size, rows: file.rows, add: file.add }
    }
}

/// Each row once: lines into staged files, files into the manifest.
pub struct NdjsonTask {
    pub node: NodeId,
    pub writer: NdjsonWriter,
    pub inbox: Inbox,
    pub reports: Sender<Report>,
    pub metrics: Arc<SinkMetrics>,
}

impl NdjsonTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// External: the location failed.
    pub async fn run(mut self) -> Result<()> {
        let mut watermark = crate::stream::START_OF_TIME;
        let mut count = Count::default();
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, .. } => {
                    self.writer.write(&batch)?;
                    count.rows_in += batch.num_rows() as u64;
                    Metrics::add(&self.metrics.rows, batch.num_rows() as u64);
                }
                Event::Watermark { time, .. } => watermark = time,
                Event::Barrier(Barrier { epoch, last }) => {
                    let (staged, node) = (self.writer.prepare(epoch), self.node);
                    let count = std::mem::take(&mut count);
                    behind(&self.reports, async move {
                        let files = staged.await?.into_iter().map(PreparedFile::from).collect();
                        Ok(Report::Prepared { node, epoch, files, watermark, dead: Vec::new(), count })
                    });
                    if last {
                        return Ok(());
                    }
                }
                Event::End => return Ok(()),
            }
        }
    }
}

/// Writes on arrival, flushed at barriers: at least once, unless the sink makes more of the epochs.
pub struct AppendTask {
    pub node: NodeId,
    pub sink: Box<dyn AppendSink>,
    pub inbox: Inbox,
    pub reports: Sender<Report>,
    pub metrics: Arc<SinkMetrics>,
}

impl AppendTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// External: the sink failed.
    pub async fn run(mut self) -> Result<()> {
        let (mut written, mut rows) = (false, 0);
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, .. } => {
                    self.sink.write(&batch).await?;
                    written = true;
                    rows += batch.num_rows() as u64;
                    Metrics::add(&self.metrics.rows, batch.num_rows() as u64);
                }
                Event::Watermark { .. } => {}
                Event::Barrier(barrier) => {
                    self.sink.flush(barrier.epoch).await?;
                    if std::mem::take(&mut written) {
                        self.metrics.committed(Clock.unix_millis());
                    }
                    let mut part = StatePart::default();
                    let count = part.counts.of(self.node);
                    count.rows_in = std::mem::take(&mut rows);
                    count.written = count.rows_in;
                    let report = Report::State { node: self.node, epoch: barrier.epoch, part };
                    self.reports.send(report).await.map_err(coordinator_gone)?;
                    if barrier.last {
                        return Ok(());
                    }
                }
                Event::End => return Ok(()),
            }
        }
    }
}
