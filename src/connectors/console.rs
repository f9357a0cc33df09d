//! A sink for people: rows as NDJSON lines or as a table, to a writer that the command line hands in.
//!
//! Changes carry their weight in a column `_weight`. Each batch is written whole, so lines of several sinks that
//! share a terminal do not mix within a row.

use std::io::Write;

use arrow::util::pretty::pretty_format_batches;
use async_trait::async_trait;

use super::AppendSink;
use super::formats::json_encode::{JsonEncoder, with_texts, with_weights};
use crate::error::{Error, Result};
use crate::sql::options::Options;
use crate::stream::ChangeBatch;

/// How rows are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConsoleFormat {
    /// One JSON object per line.
    #[default]
    Ndjson,
    /// A framed table per batch.
    Table,
}

impl ConsoleFormat {
    /// The option `format = 'ndjson' | 'table'`.
    pub fn from_options(options: &mut Options) -> Result<Self> {
        Ok(match options.choice("format", &["ndjson", "table", "json"])? {
            Some(1) => Self::Table,
            _ => Self::Ndjson,
        })
    }
}

pub struct ConsoleSink {
    format: ConsoleFormat,
    out: Box<dyn Write + Send>,
    encoder: JsonEncoder,
}

impl ConsoleSink {
    pub fn new(format: ConsoleFormat, out: Box<dyn Write + Send>) -> Self {
        Self { format, out, encoder: JsonEncoder::default() }
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::external("the console cannot be written").because(error)
}

#[async_trait]
impl AppendSink for ConsoleSink {
    async fn write(&mut self, batch: &ChangeBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        match self.format {
            ConsoleFormat::Ndjson => {
                let rows = self.encoder.encode(&batch.rows, batch.weights.as_ref())?;
                self.out.write_all(rows.lines()).map_err(failed)
            }
            ConsoleFormat::Table => {
                let rows = with_texts(&batch.rows)?;
                let weighted =
                    batch.weights.as_ref().map(|weights| with_weights(&rows, weights)).transpose()?;
                let table = pretty_format_batches(std::slice::from_ref(weighted.as_ref().unwrap_or(&rows)))?;
                writeln!(self.out, "{table}").map_err(failed)
            }
        }
    }

    async fn flush(&mut self, _: u64) -> Result<()> {
        self.out.flush().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use arrow::array::{Int64Array, RecordBatch, StringArray};

    use super::super::blackhole::BlackholeSink;
    use super::*;
    use crate::stream::Origin;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn changes() -> ChangeBatch {
        let rows = RecordBatch::try_from_iter([
            ("a", Arc::new(Int64Array::from(vec![1, 2])) as _),
            ("b", Arc::new(StringArray::from(vec![Some("x"), None])) as _),
        ])
        .unwrap();
        let numbers = || Int64Array::from(vec![0, 1]);
        let origin = Origin { time: numbers(), place: numbers(), offset: numbers() };
        let mut batch = ChangeBatch::append(rows, origin);
        batch.weights = Some(Int64Array::from(vec![1, -1]));
        batch
    }

    #[tokio::test]
    async fn rows_are_lines_or_tables() {
        let out = Shared::default();
        let mut sink = ConsoleSink::new(ConsoleFormat::Ndjson, Box::new(out.clone()));
        sink.write(&changes()).await.unwrap();
        sink.flush(1).await.unwrap();
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "{\"a\":1,\"b\":\"x\",\"_weight\":1}\n{\"a\":2,\"b\":null,\"_weight\":-1}\n");
        let out = Shared::default();
        let mut options = Options::of("sink c", &[("format", "table")]);
        let mut sink =
            ConsoleSink::new(ConsoleFormat::from_options(&mut options).unwrap(), Box::new(out.clone()));
        sink.write(&changes()).await.unwrap();
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().nth(3), Some("| 1 | x | 1       |"), "{text}");
    }

    #[tokio::test]
    async fn the_blackhole_counts() {
        let mut sink = BlackholeSink::default();
        let counted = sink.clone();
        sink.write(&changes()).await.unwrap();
        sink.write(&changes()).await.unwrap();
        sink.flush(1).await.unwrap();
        assert_eq!(counted.rows(), 4);
    }
}
