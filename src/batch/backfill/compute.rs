//! One interval: its rows, batch by batch into files, and the commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::array::RecordBatch;
use datafusion::dataframe::DataFrame;
use datafusion::logical_expr::{Expr, cast, lit};
use datafusion::prelude::ident;
use datafusion::scalar::ScalarValue;
use futures::StreamExt;
use tokio::sync::Mutex;

use super::prepare::{Cut, Prepared, computed};
use super::resume::Passed;
use super::{Done, Event, Interval, Listener, Method, Options, Permit, Read, Status};
use crate::batch::history;
use crate::batch::window::with_windows;
use crate::connectors::delta::replace::{Pinned, Replaced, Replacement};
use crate::connectors::delta::{DeltaWriter, PreparedFile};
use crate::error::{Error, Result};
use crate::plan::session::batch_session_within;
use crate::plan::views::{ViewPlanner, quoted};
use crate::sql::SinkInput;
use crate::stream::Micros;
use crate::stream::clock::Clock;

/// Times that an interval is begun again after a conflict.
const ATTEMPTS: usize = 20;

/// The intervals of one run.
pub struct Job<'a> {
    prepared: &'a Prepared<'a>,
    cut: &'a Cut,
    method: &'a Method<'a>,
    /// Snapshots are of no use: the state is larger than the memory.
    too_large: AtomicBool,
    /// The state that owned the table when it was planned.
    owner: Option<String>,
    /// The newest rebuild of the table then.
    rebuilt: Option<i64>,
    /// The newest turn of the ledger then.
    turn: i64,
    fingerprint: i64,
    by_offset: bool,
    /// Commits are made one after the other.
    commits: Mutex<()>,
    options: &'a Options,
    listener: Listener<'a>,
    permit: Option<&'a dyn Permit>,
}

/// The rows of an interval on their way into files.
pub struct Output<'a> {
    writer: DeltaWriter,
    listener: Listener<'a>,
}

impl Output<'_> {
    pub async fn write(&mut self, rows: &RecordBatch) -> Result<()> {
        self.writer.write(rows)?;
        (self.listener)(Event::Rows(rows.num_rows() as u64));
        match self.writer.wants_upload() {
            true => self.writer.upload(0).await,
            false => Ok(()),
        }
    }

    /// The files, which no commit names yet.
    async fn files(mut self) -> Result<Vec<PreparedFile>> {
        self.writer.prepare(0)?.await
    }
}

/// How an attempt to commit ended.
enum Outcome {
    Done(Done),
    /// What came between.
    Conflict(String),
}

impl<'a> Job<'a> {
    pub fn new(
        prepared: &'a Prepared<'a>,
        cut: &'a Cut,
        method: &'a Method<'a>,
        pinned: Option<&Pinned>,
        options: &'a Options,
        listener: Listener<'a>,
    ) -> Self {
        let turns = pinned.map(Pinned::ledger).unwrap_or_default();
        Self {
            prepared,
            cut,
            method,
            too_large: AtomicBool::new(false),
            owner: pinned.and_then(|pinned| pinned.state_id.clone()),
            rebuilt: pinned.and_then(Pinned::rebuilt),
            turn: turns.iter().map(|known| known.turn).max().unwrap_or(0),
            fingerprint: prepared.fingerprint(pinned),
            by_offset: prepared.by_offset(pinned),
            commits: Mutex::new(()),
            options,
            listener,
            permit: None,
        }
    }

    pub fn permitted(self, permit: Option<&'a dyn Permit>) -> Self {
        Self { permit, ..self }
    }

    /// # Errors
    /// User: the SQL fails on a row. External: a store failed, or others rewrite the interval all the time.
    pub async fn interval(&self, interval: Interval) -> Result<Done> {
        let begun = Clock.unix_millis();
        let mut done = match self.by_offset {
            true => self.by_offset(interval).await,
            false => self.by_version(interval).await,
        };
        if let Ok(done) = &mut done {
            done.seconds = (Clock.unix_millis() - begun) as f64 / 1e3;
        }
        done.map_err(|error| error.context(format_args!("interval {interval}")))
    }

    /// The rows do not depend on the table: after a conflict only the commit is made again.
    async fn by_version(&self, interval: Interval) -> Result<Done> {
        let (files, read) = match self.resumed(interval).await? {
            Some((files, read)) => (files, Some(read)),
            None => (self.compute(self.cut, interval).await?, None),
        };
        let _turn = self.commits.lock().await;
        for _ in 0..ATTEMPTS {
            let base = self.pin().await?;
            match self.commit(&base, self.cut, interval, &files).await? {
                Outcome::Done(done) => return Ok(Done { read, ..done }),
                Outcome::Conflict(why) => (self.listener)(Event::Again(interval, &why)),
            }
        }
        self.prepared.table.discard(&files).await;
        Err(self.busy())
    }

    /// The rows are those that the sink has read at the version whose files are replaced.
    async fn by_offset(&self, interval: Interval) -> Result<Done> {
        let _turn = self.commits.lock().await;
        for _ in 0..ATTEMPTS {
            let base = self.pin().await?;
            let cut = self.prepared.cut(Some(&base), self.options.wait, self.listener).await?;
            let files = self.compute(&cut, interval).await?;
            match self.commit(&base, &cut, interval, &files).await? {
                Outcome::Done(done) => return Ok(done),
                Outcome::Conflict(why) => (self.listener)(Event::Again(interval, &why)),
            }
            self.prepared.table.discard(&files).await;
        }
        Err(self.busy())
    }

    fn busy(&self) -> Error {
        let message =
            format!("others rewrite the table of the sink {} all the time", self.prepared.sink.name);
        Error::external(message).hint("Try again when they are through; finished intervals stay.")
    }

    async fn pin(&self) -> Result<Pinned> {
        let sink = &self.prepared.sink.name;
        let base = self.prepared.table.pin().await?;
        let base = base.ok_or_else(|| Error::external(format!("the table of the sink {sink} is gone")))?;
        if base.state_id != self.owner {
            let message = format!("the table of the sink {sink} was taken over meanwhile");
            return Err(
                Error::external(message).hint("Run the backfill again: what is complete has changed.")
            );
        }
        if base.rebuilt() != self.rebuilt {
            let message = format!("the table of the sink {sink} was rebuilt by other SQL meanwhile");
            return Err(
                Error::external(message).hint("Run the backfill again, with the SQL that it has now.")
            );
        }
        Ok(base)
    }

    async fn commit(
        &self,
        base: &Pinned,
        cut: &Cut,
        interval: Interval,
        files: &[PreparedFile],
    ) -> Result<Outcome> {
        let table = &self.prepared.table;
        if let Some(permit) = self.permit {
            permit.ask().await?;
        }
        // Another backfill of the same rows came first.
        let known = computed(&base.ledger(), interval, self.fingerprint);
        if let Some(known) = known.filter(|k| k.turn > self.turn && k.backup_version >= cut.version) {
            (self.listener)(Event::Again(interval, "another backfill has just finished it"));
            table.discard(files).await;
            let rows = known.rows.and_then(|rows| u64::try_from(rows).ok());
            return Ok(Outcome::Done(Done {
                interval,
                rows_before: rows,
                rows_after: rows,
                seconds: 0.0,
                version: None,
                status: Status::Unchanged,
                read: None,
            }));
        }
        let wanted = Replacement {
            interval,
            files,
            fingerprint: self.fingerprint,
            backup_version: cut.version,
            offsets: &cut.offsets,
        };
        Ok(match table.replace(base, &wanted).await? {
            Replaced::Conflict(why) => Outcome::Conflict(why),
            Replaced::Version { version, rows_before } => Outcome::Done(Done {
                interval,
                rows_before: Some(rows_before),
                rows_after: Some(files.iter().map(|file| file.rows).sum()),
                seconds: 0.0,
                version: Some(version),
                status: Status::Written,
                read: None,
            }),
        })
    }

    fn output(&self) -> Result<Output<'a>> {
        Ok(Output { writer: self.prepared.table.writer()?, listener: self.listener })
    }

    /// Bytes for one interval.
    fn memory(&self) -> Option<u64> {
        let at_once = match self.method {
            Method::Resume(_) => 1,
            _ => self.options.parallel.max(1),
        };
        self.options.memory.map(|bytes| bytes / at_once as u64)
    }

    /// Writes the rows of an interval into files that no commit names yet.
    async fn compute(&self, cut: &Cut, interval: Interval) -> Result<Vec<PreparedFile>> {
        let rows = rows(self.prepared, cut, interval, self.memory()).await?;
        let mut rows = rows.execute_stream().await?;
        let mut out = self.output()?;
        while let Some(batch) = rows.next().await {
            out.write(&batch?).await?;
        }
        out.files().await
    }

    /// The same from a state snapshot, and a new one; `None` where the sink has none.
    async fn resumed(&self, interval: Interval) -> Result<Option<(Vec<PreparedFile>, Read)>> {
        let (Method::Resume(resume), Some(provider)) = (self.method, &self.cut.provider) else {
            return Ok(None);
        };
        if self.too_large.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (start, from) = resume.begin(interval.from).await;
        let mut out = self.output()?;
        let passed = resume.compute(Arc::clone(provider), interval, from, self.memory(), &mut out).await?;
        let files = out.files().await?;
        match passed {
            Passed::Done { read: rows, states } => {
                if let Some(states) = states {
                    resume.snapshots.write(interval.to, &states, resume.width()).await;
                }
                Ok(Some((files, Read { rows, start })))
            }
            Passed::TooLarge => {
                self.prepared.table.discard(&files).await;
                self.too_large.store(true, Ordering::Relaxed);
                let why = "the state of its keys is larger than the memory; this and all that follows read all history";
                (self.listener)(Event::Again(interval, why));
                Ok(None)
            }
        }
    }
}

/// The sink's rows of an interval, as a plan over what of the backup they depend on.
async fn rows(
    prepared: &Prepared<'_>,
    cut: &Cut,
    interval: Interval,
    memory: Option<u64>,
) -> Result<DataFrame> {
    let (catalog, source) = (prepared.catalog, &prepared.source);
    let session = with_windows(&batch_session_within(memory)?);
    let name = quoted(&source.name);
    let provider = match &cut.provider {
        Some(provider) => Arc::clone(provider),
        None => {
            let all = history::Cut::default();
            history::register(&session, catalog, &prepared.plan, source, &all).await?;
            let provider = session.deregister_table(name.clone())?;
            provider.ok_or_else(|| Error::internal("a backup that was registered is not there"))?
        }
    };
    let mut input = session.read_table(provider)?;
    if let Some(time) = source.event_time {
        let (from, to) = prepared.reads(interval);
        let time = ident(source.schema.field(time).name());
        input = input.filter(time.clone().lt(at(to)))?;
        if let Some(from) = from {
            input = input.filter(time.gt_eq(at(from)))?;
        }
    }
    session.register_table(name, input.into_view())?;
    let declared = catalog.sink(&prepared.sink.name);
    let declared = declared.ok_or_else(|| Error::internal("a planned sink is not declared"))?;
    let mut views = ViewPlanner::new(&session, catalog, &prepared.sources);
    let plan = match &declared.input {
        SinkInput::Relation { name, place } => views.relation(name, place).await?,
        SinkInput::Query(query) => views.query(query, &declared.place).await?,
    };
    let time = ident(&prepared.time);
    let columns = prepared.sink.schema.fields().iter();
    let columns: Vec<Expr> = columns
        .map(|field| cast(ident(field.name()), field.data_type().clone()).alias(field.name()))
        .collect();
    let rows = DataFrame::new(session.state(), plan).select(columns)?;
    Ok(rows.filter(time.clone().gt_eq(at(interval.from)).and(time.lt(at(interval.to))))?)
}

pub(super) fn at(time: Micros) -> Expr {
    lit(ScalarValue::TimestampMicrosecond(Some(time), Some("UTC".into())))
}
