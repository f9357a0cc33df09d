//! Rows on stdout.

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::Arc;

use arrow::array::RecordBatch;
use clap::ValueEnum;

use crate::batch::Answer;
use crate::connectors::formats::json_encode::with_texts;
use crate::error::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Csv,
    /// One array of objects.
    Json,
    /// One object per line.
    Ndjson,
    /// An Arrow IPC stream.
    Arrow,
}

pub fn rows(answer: &Answer, format: Format) -> Result<()> {
    write(&encoded(answer, format)?)
}

/// Text formats show a BYTEA as sinks write it into JSON.
pub fn encoded(answer: &Answer, format: Format) -> Result<Vec<u8>> {
    let texts;
    let answer = match format {
        Format::Arrow => answer,
        _ => {
            let schema = with_texts(&RecordBatch::new_empty(Arc::clone(&answer.schema)))?.schema();
            let batches = answer.batches.iter().map(with_texts).collect::<Result<_>>()?;
            texts = Answer { schema, batches };
            &texts
        }
    };
    let mut bytes = Vec::new();
    let batches: Vec<_> = answer.batches.iter().collect();
    match format {
        Format::Table => {
            let table = arrow::util::pretty::pretty_format_batches_with_schema(
                Arc::clone(&answer.schema),
                &answer.batches,
            )?;
            bytes.extend_from_slice(format!("{table}\n").as_bytes());
        }
        Format::Csv => {
            let mut writer = arrow::csv::WriterBuilder::new().with_header(true).build(&mut bytes);
            // The header stands there without rows too.
            writer.write(&RecordBatch::new_empty(Arc::clone(&answer.schema)))?;
            batches.iter().try_for_each(|batch| writer.write(batch))?;
        }
        Format::Json => {
            let mut writer = arrow::json::ArrayWriter::new(&mut bytes);
            writer.write_batches(&batches)?;
            writer.finish()?;
            bytes.push(b'\n');
        }
        Format::Ndjson => {
            let mut writer = arrow::json::LineDelimitedWriter::new(&mut bytes);
            writer.write_batches(&batches)?;
            writer.finish()?;
        }
        Format::Arrow => {
            let mut writer = arrow::ipc::writer::StreamWriter::try_new(&mut bytes, &answer.schema)?;
            batches.iter().try_for_each(|batch| writer.write(batch))?;
            writer.finish()?;
        }
    }
    Ok(bytes)
}

pub fn text(text: &str) -> Result<()> {
    write(text.as_bytes())
}

pub fn bytes(bytes: &[u8]) -> Result<()> {
    write(bytes)
}

#[expect(clippy::disallowed_methods, reason = "cli prints")]
pub fn stdout() -> std::io::Stdout {
    std::io::stdout()
}

/// What `console` sinks write to. On a terminal its lines go above the live view.
pub fn console() -> Box<dyn Write + Send> {
    match stdout().is_terminal() {
        true => Box::new(std::io::LineWriter::new(super::screen::Console)),
        false => Box::new(stdout()),
    }
}

/// A reader that has seen enough is no failure.
fn write(bytes: &[u8]) -> Result<()> {
    let mut out = stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::external("stdout cannot be written").because(error))
        }
        _ => Ok(()),
    }
}
