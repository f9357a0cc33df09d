//! A sink that keeps its rows in memory for whoever started the run, exactly once across restarts.
//!
//! # Meaning
//! Rows become part of the collection at the barrier of their epoch. A run that takes the collection over drops what
//! was collected for epochs that no manifest has published, and shuts out what tasks of older runs still bring: as a
//! Delta sink, it holds exactly the rows of published epochs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use super::AppendSink;
use crate::error::Result;
use crate::stream::ChangeBatch;

/// Rows of one sink; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Collector(Arc<Mutex<Collected>>);

#[derive(Debug, Default)]
struct Collected {
    generation: u64,
    /// Rows by epoch, of every shard.
    epochs: Vec<(u64, ChangeBatch)>,
}

impl Collector {
    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run of this generation begins, whose claim is manifest `claim`.
    pub fn take_over(&self, generation: u64, claim: u64) {
        let mut collected = self.lock();
        if generation > collected.generation {
            collected.generation = generation;
            collected.epochs.retain(|(epoch, _)| *epoch < claim);
        }
    }

    /// The rows of one shard and epoch; nothing happens when a newer run has taken over.
    pub fn commit(&self, generation: u64, epoch: u64, rows: Vec<ChangeBatch>) {
        let mut collected = self.lock();
        if generation == collected.generation {
            collected.epochs.extend(rows.into_iter().map(|batch| (epoch, batch)));
        }
    }

    /// Everything collected so far.
    pub fn rows(&self) -> Vec<ChangeBatch> {
        self.lock().epochs.iter().map(|(_, batch)| batch.clone()).collect()
    }
}

/// What one shard of a run brings.
pub struct CollectSink {
    collector: Collector,
    generation: u64,
    rows: Vec<ChangeBatch>,
}

impl CollectSink {
    pub fn new(collector: Collector, generation: u64) -> Self {
        Self { collector, generation, rows: Vec::new() }
    }
}

#[async_trait]
impl AppendSink for CollectSink {
    async fn write(&mut self, batch: &ChangeBatch) -> Result<()> {
        self.rows.push(batch.clone());
        Ok(())
    }

    async fn flush(&mut self, epoch: u64) -> Result<()> {
        self.collector.commit(self.generation, epoch, std::mem::take(&mut self.rows));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int64Array, RecordBatch};
    use arrow::datatypes::{DataType, Field, Schema};

    fn rows(values: &[i64]) -> Vec<ChangeBatch> {
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        let column = Int64Array::from(values.to_vec());
        let origin =
            crate::stream::Origin { time: column.clone(), place: column.clone(), offset: column.clone() };
        vec![ChangeBatch::append(RecordBatch::try_new(schema, vec![Arc::new(column)]).unwrap(), origin)]
    }

    #[test]
    fn unpublished_epochs_and_older_runs_leave_nothing() {
        let collector = Collector::default();
        collector.take_over(1, 1);
        collector.commit(1, 2, rows(&[1]));
        collector.commit(1, 3, rows(&[2, 3]));
        // Manifest 2 was the last one published, so the next claim is 3.
        collector.take_over(2, 3);
        collector.commit(1, 4, rows(&[9]));
        collector.commit(2, 4, rows(&[2, 3, 4]));
        collector.take_over(2, 5);
        let found: Vec<usize> = collector.rows().iter().map(ChangeBatch::num_rows).collect();
        assert_eq!(found, [1, 3]);
    }
}
