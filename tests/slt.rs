//! Runs every `tests/slt/*.slt` against DataFusion with Millstream's functions.

use std::path::PathBuf;

use arrow::array::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::prelude::SessionContext;
use sqllogictest::{AsyncDB, DBOutput, DefaultColumnType, Runner};

struct Engine(SessionContext);

#[async_trait::async_trait]
impl AsyncDB for Engine {
    type Error = datafusion::error::DataFusionError;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, Self::Error> {
        let frame = self.0.sql(sql).await?;
        let types = vec![DefaultColumnType::Any; frame.schema().fields().len()];
        let mut rows = Vec::new();
        for batch in frame.collect().await? {
            rows.extend(text(&batch)?);
        }
        Ok(DBOutput::Rows { types, rows })
    }

    async fn shutdown(&mut self) {}
}

fn text(batch: &RecordBatch) -> Result<Vec<Vec<String>>, arrow::error::ArrowError> {
    let options = FormatOptions::default().with_null("NULL");
    let columns: Vec<ArrayFormatter> = batch
        .columns()
        .iter()
        .map(|c| ArrayFormatter::try_new(c.as_ref(), &options))
        .collect::<Result<_, _>>()?;
    Ok((0..batch.num_rows()).map(|row| columns.iter().map(|c| c.value(row).to_string()).collect()).collect())
}

#[tokio::test]
async fn every_file_gives_its_answers() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/slt");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ext| ext == "slt"));
    assert!(!files.is_empty(), "no .slt file was found");
    for file in files {
        let mut runner = Runner::new(|| async {
            let mut session = SessionContext::new();
            millstream_udfs::register_all(&mut session)?;
            Ok(Engine(session))
        });
        runner.run_file_async(&file).await.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
}
