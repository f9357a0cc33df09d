//! The backup of a source as something to read, and what is different when somebody else wrote it: a Delta table whose log
//! names no offsets, or plain files (`CREATE TABLE … WITH (connector = 'parquet' | 'csv' | 'ndjson')`).
//!
//! - **Its rows say which records they come from**, in `_partition` and `_offset` or the columns that
//!   `history.partition_column` and `history.offset_column` name. Before a first start every offset is looked at: one that
//!   stands twice is an error; one that is missing between the first and the last of its partition is a gap, unless
//!   `--allow-gap`, as nothing tells a lost record from a tombstone or a transaction's marker. The topic goes on behind
//!   the last row, or at `history.end_offsets`, whatever is missing up to there.
//! - **They do not**: `history.end_offsets` must say where the topic goes on. Rows are numbered up to there, each
//!   partition in the order of event time, then of all columns: none of them is late, and the numbers are the same at
//!   each start while the rows are. The numbered copy is a temporary file. Without a column for the partition all rows are
//!   of the one that is named.
//!
//! Offsets of the user are taken on their word, which a warning says. What is below the hand-off must not change until the
//! history is read: the number of rows is kept, and looked at again after a kill.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{DataType, Int32Type, Int64Type};
use datafusion::catalog::TableProvider;
use datafusion::functions_aggregate::expr_fn::count;
use datafusion::functions_window::expr_fn::row_number;
use datafusion::logical_expr::{Expr, ExprFunctionExt, cast, lit, when};
use datafusion::prelude::{DataFrame, ParquetReadOptions, SessionContext, ident};
use datafusion::scalar::ScalarValue;
use futures::TryStreamExt;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

use super::origins::Origins;
use super::{history_of, time_of};
use crate::connectors::delta::history::{Pinned, Rows, pin};
use crate::connectors::delta::table::{AsOf, provider_as_of};
use crate::error::{Error, Result};
use crate::plan::SourcePlan;
use crate::plan::session::batch_session_within;
use crate::plan::source::Backup;
use crate::plan::tables;
use crate::plan::views::quoted;

/// Bytes beyond which numbering spills.
const SORT_BYTES: u64 = 512 << 20;
/// Rows of a row group of the numbered copy.
const ROW_GROUP_ROWS: usize = 65_536;
/// The columns that a backup may have beside the source's own.
const STORED: [&str; 3] = ["_topic", "_timestamp", "_key"];

/// The backup of a source.
pub struct Book<'p> {
    source: &'p SourcePlan,
    backup: &'p Backup,
    pub location: String,
}

impl<'p> Book<'p> {
    pub fn of(source: &'p SourcePlan) -> Option<Self> {
        let backup = history_of(source)?;
        Some(Self { source, backup, location: backup.location() })
    }

    /// Pins a version, the newest without. `None`: there is no table.
    ///
    /// # Errors
    /// Those of [`pin`].
    pub async fn pin(&self, topic: &str, version: Option<u64>) -> Result<Option<Pinned>> {
        match self.backup {
            Backup::Delta(location) => pin(location, topic, version).await,
            Backup::Table(_) => {
                Ok(Some(Pinned { version: version.unwrap_or(0), next: BTreeMap::new(), app: None }))
            }
        }
    }

    /// Says where the topic goes on, if the log does not. `first`: of a start without state, whether it goes on over gaps.
    ///
    /// # Errors
    /// User: nothing says it. External: a gap, duplicates; the store failed.
    pub async fn complete(&self, pinned: &mut Pinned, topic: &str, first: Option<bool>) -> Result<()> {
        let given = self.source.history_options.end_offsets.as_ref();
        if !pinned.next.is_empty() {
            return match given {
                None => Ok(()),
                Some(_) => {
                    Err(Error::user(format!("the log of {} says itself where it ends", self.location))
                        .hint("Leave history.end_offsets out."))
                }
            };
        }
        let (session, rows) = self.shaped(pinned.version).await?;
        let next = match self.has_offsets(&rows) {
            true => self.of_rows(&session, rows, topic, first).await?,
            false => {
                let counted = counted(rows, topic).await?;
                if pinned.version == 0 && matches!(self.backup, Backup::Table(_)) {
                    pinned.version = counted.values().sum();
                }
                self.of_counts(&counted, given)?
            }
        };
        pinned.next = next;
        Ok(())
    }

    /// What cannot be read is said.
    ///
    /// # Errors
    /// User: the backup lacks a column. External: the store failed.
    pub async fn check(&self, version: u64, topic: &str) -> Result<()> {
        match self.is_foreign() {
            true => self.shaped(version).await.map(drop),
            false => self.rows(version, topic).await.map(drop),
        }
    }

    /// The rows of a pinned version.
    ///
    /// # Errors
    /// User: the backup stores no offsets, or lacks a column. External: the store failed, or rows came or went.
    pub async fn rows(&self, version: u64, topic: &str) -> Result<Rows> {
        let (columns, time) = (&self.source.physical, time_of(self.source));
        if !self.is_foreign() {
            return Rows::open(&self.location, version, topic, columns, time).await;
        }
        let (session, rows) = self.shaped(version).await?;
        if self.has_offsets(&rows) {
            let rows = Rows::of(rows.into_view(), &self.location, topic, columns, time)?;
            return Ok(rows.of_others(session, None));
        }
        let (table, kept) = self.numbered(&session, rows, version, topic).await?;
        Ok(Rows::of(table, &self.location, topic, columns, time)?.of_others(session, Some(kept)))
    }

    /// Whether its columns are not those of our own backups.
    fn is_foreign(&self) -> bool {
        let options = &self.source.history_options;
        matches!(self.backup, Backup::Table(_)) || *options != Default::default()
    }

    fn has_offsets(&self, rows: &DataFrame) -> bool {
        rows.schema().as_arrow().column_with_name("_offset").is_some()
    }

    /// The backup with the source's columns, its event time, and the places of records under the names of our own.
    async fn shaped(&self, version: u64) -> Result<(SessionContext, DataFrame)> {
        let session = batch_session_within(Some(SORT_BYTES))?;
        let table = match self.backup {
            Backup::Delta(location) => {
                session.read_table(provider_as_of(location, AsOf::Version(version)).await?)?
            }
            Backup::Table(table) => {
                tables::register(&session, table).await?;
                session.table(quoted(&table.name)).await?
            }
        };
        let schema = Arc::new(table.schema().as_arrow().clone());
        let stored = |name: &str| schema.column_with_name(name).is_some();
        let mut columns = Vec::new();
        for field in self.source.physical.fields() {
            let (name, kind) = (field.name(), field.data_type());
            let value = match stored(name) {
                true => cast(ident(name), kind.clone()),
                false if field.is_nullable() => lit(ScalarValue::try_from(kind)?),
                false => {
                    let message = format!("the backup {} has no column {name}", self.location);
                    let hint = "Declare the column without NOT NULL: records of the backup do not have it.";
                    return Err(Error::user(message).hint(hint));
                }
            };
            columns.push(value.alias(name));
        }
        columns.push(self.partition(&stored)?.alias("_partition"));
        let options = &self.source.history_options;
        match (&options.offset_column, stored(options.offset_column.as_deref().unwrap_or("_offset"))) {
            (name, true) => {
                let name = name.as_deref().unwrap_or("_offset");
                columns.push(cast(ident(name), DataType::Int64).alias("_offset"));
            }
            (Some(name), false) => return Err(self.no_column(name, "history.offset_column")),
            (None, false) if options.end_offsets.is_none() => {
                let message = format!(
                    "the backup {} has no column _offset, so it is not known where the topic goes on",
                    self.location
                );
                let hint = "Name the column that has it with history.offset_column, or say where the topic goes on with \
                            history.end_offsets. Our own backups have it unless metadata = 'none'.";
                return Err(Error::user(message).hint(hint));
            }
            (None, false) => {}
        }
        columns.extend(STORED.iter().filter(|name| stored(name)).map(|name| ident(*name)));
        let mut rows = table.select(columns)?;
        for (expr, field) in &self.source.computed_sql {
            rows = rows.with_column(field.name(), cast(expr.clone(), field.data_type().clone()))?;
        }
        let time = time_of(self.source);
        let unused = |name: &str| {
            Some(name) != time && self.source.computed.iter().any(|(_, field)| field.name() == name)
        };
        let fields = rows.schema().as_arrow().fields().clone();
        let kept = fields.iter().filter(|field| !unused(field.name()));
        let kept: Vec<Expr> = kept.map(|field| ident(field.name())).collect();
        Ok((session, rows.select(kept)?))
    }

    fn partition(&self, stored: &dyn Fn(&str) -> bool) -> Result<Expr> {
        let options = &self.source.history_options;
        let name = options.partition_column.as_deref().unwrap_or("_partition");
        if stored(name) {
            // Names of folders are text.
            return Ok(cast(ident(name), DataType::Int32));
        }
        let only = options.end_offsets.as_ref().filter(|ends| ends.len() == 1);
        match only.and_then(|ends| ends.first_key_value()).filter(|_| options.partition_column.is_none()) {
            Some((partition, _)) => Ok(lit(*partition)),
            None => Err(self.no_column(name, "history.partition_column")),
        }
    }

    fn no_column(&self, name: &str, option: &str) -> Error {
        let message = format!("the backup {} has no column {name}", self.location);
        Error::user(message)
            .hint(format!("Name the column that says which record a row comes from with {option}."))
    }

    /// Where the rows end, by their own offsets.
    async fn of_rows(
        &self,
        session: &SessionContext,
        rows: DataFrame,
        topic: &str,
        first: Option<bool>,
    ) -> Result<BTreeMap<i32, i64>> {
        let (columns, location) = (&self.source.physical, &self.location);
        let rows = Rows::of(rows.into_view(), location, topic, columns, time_of(self.source))?;
        let rows = rows.of_others(session.clone(), None);
        let mut partitions: BTreeMap<i32, Origins> = BTreeMap::new();
        let mut batches = rows.origins().await?;
        while let Some(batch) = batches.try_next().await? {
            let p = batch.column(0).as_primitive::<Int32Type>();
            let offsets = batch.column(1).as_primitive::<Int64Type>();
            if p.null_count() + offsets.null_count() > 0 {
                let message = format!("the history {location} has rows without partition or offset");
                return Err(Error::external(message).hint(
                    "Leave them out with a query of your own, or say history.end_offsets without an offset column.",
                ));
            }
            for (p, offset) in p.values().iter().zip(offsets.values()) {
                partitions.entry(*p).or_default().add(*offset);
            }
        }
        if let Some(allow_gap) = first {
            partitions.iter().try_for_each(|(p, origins)| self.judge(*p, origins, allow_gap))?;
        }
        let next: BTreeMap<i32, i64> = partitions.iter().map(|(p, origins)| (*p, origins.end())).collect();
        let Some(ends) = &self.source.history_options.end_offsets else { return Ok(next) };
        for (p, next) in &next {
            let end = self.end_of(*p, *next)?;
            if *next != end && first.is_some() {
                let what = if *next < end { "not looked for" } else { "read from the topic" };
                tracing::warn!(
                    "{location}, partition {p}: its rows end at offset {next}, the topic goes on at {end} on your word \
                     (history.end_offsets); what lies between is {what}"
                );
            }
        }
        Ok(ends.clone())
    }

    /// Where the user says that a partition of the backup ends.
    fn end_of(&self, partition: i32, rows: i64) -> Result<i64> {
        let ends = self.source.history_options.end_offsets.as_ref();
        ends.and_then(|ends| ends.get(&partition)).copied().ok_or_else(|| {
            let message = format!(
                "the history {} has {rows} rows or offsets of partition {partition}, which history.end_offsets does not name",
                self.location
            );
            Error::user(message).hint("Say for each partition where the topic goes on.")
        })
    }

    fn judge(&self, partition: i32, origins: &Origins, allow_gap: bool) -> Result<()> {
        let (location, duplicates) = (&self.location, origins.duplicates);
        if let Some(twice) = origins.twice {
            let message = format!(
                "the history {location} has {duplicates} rows of partition {partition} more than once, offset {twice} first"
            );
            return Err(Error::external(message).hint("Take the duplicates out: each record counts once."));
        }
        let Some((holes, hole)) = origins.holes() else { return Ok(()) };
        let (first, last) = (origins.first(), origins.end() - 1);
        let message = format!(
            "the history {location} lacks {holes} offsets of partition {partition} between {first} and {last}, offset \
             {hole} first"
        );
        if allow_gap {
            tracing::warn!("{message}; if they were records, they are lost (--allow-gap)");
            return Ok(());
        }
        Err(Error::external(message).hint(
            "Records that are lost, or tombstones and markers of transactions, which no backup has. --allow-gap goes on \
             without them.",
        ))
    }

    /// Where the topic goes on behind rows that have no offsets.
    fn of_counts(
        &self,
        counted: &BTreeMap<i32, u64>,
        given: Option<&BTreeMap<i32, i64>>,
    ) -> Result<BTreeMap<i32, i64>> {
        for (p, rows) in counted {
            let rows = i64::try_from(*rows).unwrap_or(i64::MAX);
            let end = self.end_of(*p, rows)?;
            if rows > end {
                let message = format!(
                    "the history {} has {rows} rows of partition {p}, more than there are offsets below {end}",
                    self.location
                );
                return Err(Error::external(message)
                    .hint("Records stand there twice, or history.end_offsets is too low."));
            }
        }
        let ends = given.cloned().unwrap_or_default();
        let told: Vec<String> = ends.iter().map(|(p, end)| format!("{p}:{end}")).collect();
        tracing::warn!(
            "{}: its rows have no offsets; the topic goes on at {} on your word (history.end_offsets), which nothing proves",
            self.location,
            told.join(", ")
        );
        Ok(ends)
    }

    /// A copy of the rows in which each has an offset, and what it lies in.
    async fn numbered(
        &self,
        session: &SessionContext,
        rows: DataFrame,
        version: u64,
        topic: &str,
    ) -> Result<(Arc<dyn TableProvider>, Arc<dyn Any + Send + Sync>)> {
        let counted = counted(rows.clone(), topic).await?;
        let total: u64 = counted.values().sum();
        if matches!(self.backup, Backup::Table(_)) && total != version {
            let message = format!(
                "the history {} has {total} rows, and had {version} when it began to be read",
                self.location
            );
            return Err(Error::external(message).hint(
                "Rows without offsets are told apart by their number: read a copy that does not change, and begin anew \
                 (millstream reset).",
            ));
        }
        let rows = of_topic(rows, topic)?;
        let mut before = when(lit(false), lit(0_i64));
        for (p, rows) in &counted {
            let rows = i64::try_from(*rows).unwrap_or(i64::MAX);
            before = before.when(ident("_partition").eq(lit(*p)), lit(self.end_of(*p, rows)? - rows - 1));
        }
        let before = before.otherwise(lit(0_i64))?;
        let time = time_of(self.source).map(ident);
        let fields = rows.schema().as_arrow().fields().clone();
        let plain = fields.iter().filter(|field| !field.data_type().is_nested());
        let order = time.into_iter().chain(plain.map(|field| ident(field.name())));
        let number = row_number()
            .partition_by(vec![ident("_partition")])
            .order_by(order.map(|column| column.sort(true, true)).collect())
            .build()?;
        let mut columns: Vec<Expr> = fields.iter().map(|field| ident(field.name())).collect();
        columns.push((cast(number, DataType::Int64) + before).alias("_offset"));
        let rows = rows.select(columns)?;
        let schema = Arc::new(rows.schema().as_arrow().clone());
        let file = session.runtime_env().disk_manager.create_tmp_file("numbering a history")?;
        let path = file.path().ok_or_else(|| Error::internal("a temporary file without a name"))?;
        let path = path.to_string_lossy().into_owned();
        let unwritten =
            |error: std::io::Error| Error::external(format!("{path} cannot be written")).because(error);
        // Small ones: what is read at a time is a range of offsets.
        let groups = WriterProperties::builder().set_max_row_group_row_count(Some(ROW_GROUP_ROWS)).build();
        let file_of_rows = File::create(&path).map_err(unwritten)?;
        let mut writer = ArrowWriter::try_new(file_of_rows, schema, Some(groups))?;
        let mut batches = rows.execute_stream().await?;
        while let Some(batch) = batches.try_next().await? {
            writer.write(&batch)?;
        }
        writer.close()?;
        let options = ParquetReadOptions { file_extension: "", ..Default::default() };
        let table = session.read_parquet(path, options).await?.into_view();
        Ok((table, Arc::new(file)))
    }
}

/// Rows per partition.
async fn counted(rows: DataFrame, topic: &str) -> Result<BTreeMap<i32, u64>> {
    let number = count(lit(1_i64)).alias("n");
    let rows = of_topic(rows, topic)?.aggregate(vec![ident("_partition").alias("p")], vec![number])?;
    let mut counted = BTreeMap::new();
    for batch in rows.collect().await? {
        let (p, n) =
            (batch.column(0).as_primitive::<Int32Type>(), batch.column(1).as_primitive::<Int64Type>());
        if p.null_count() > 0 {
            return Err(Error::external("a history has rows without a partition")
                .hint("Name another column with history.partition_column."));
        }
        counted.extend(p.values().iter().zip(n.values()).map(|(p, n)| (*p, n.unsigned_abs())));
    }
    Ok(counted)
}

fn of_topic(rows: DataFrame, topic: &str) -> Result<DataFrame> {
    match rows.schema().as_arrow().column_with_name("_topic").is_some() {
        true => Ok(rows.filter(ident("_topic").eq(lit(topic)))?),
        false => Ok(rows),
    }
}
