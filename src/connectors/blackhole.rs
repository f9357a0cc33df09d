//! A sink that counts and forgets: for measuring what comes before it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;

use super::AppendSink;
use crate::error::Result;
use crate::stream::ChangeBatch;

/// Rows written so far; clones share it.
#[derive(Debug, Clone, Default)]
pub struct BlackholeSink {
    rows: Arc<AtomicU64>,
}

impl BlackholeSink {
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }
}

#[async_trait]
impl AppendSink for BlackholeSink {
    async fn write(&mut self, batch: &ChangeBatch) -> Result<()> {
        self.rows.fetch_add(batch.num_rows() as u64, Ordering::Relaxed);
        Ok(())
    }

    async fn flush(&mut self, _: u64) -> Result<()> {
        Ok(())
    }
}
