//! Backfill: the rows of a Delta sink computed anew from the backup, interval by interval (DESIGN §6).
//!
//! **What an interval has.** [from, to) is cut into intervals of `step`, in the sink's time column: the event time, or the
//! start of the windows. An interval gets the rows of the sink's SQL over the backup whose time is in it. Late rows count:
//! what the stream left out is in. Rows of an interval see rows before it as far back as the longest frame reaches; over
//! stacked views these add up ([`Reach`]). That look-back decides which rows of the backup are read; an unbounded frame
//! reads from the start, or from a snapshot of its state at the end of an earlier interval ([`snapshots`], [`resume`]).
//!
//! **One commit** replaces all rows of the interval ([`Replacer`]), whatever they were, and holds the ledger of it. An
//! interval is finished when the ledger has it, computed by the same SQL, no later backfill by other SQL touched it, and
//! the backup got no row since that could change it. Finished intervals are left alone, unless `force`. So a backfill that
//! was killed goes on where it was when it is run again, and running it twice changes nothing.
//!
//! **Which rows of the backup.** It is pinned at one version for all intervals. Where a stream writes the sink,
//!
//! - no interval reaches beyond its `complete_until`, as the stream's own rows come there; `to` is clipped, and said so;
//! - the backup must have everything that the sink's commits have read: its own sink commits in the same epoch, so it is
//!   waited for; if it does not come, `to` is clipped to what the backup has final;
//! - rows of a view without windows are appended also late, into old intervals. There the backup is read below the sink's
//!   committed offsets, at the version whose files are replaced, and what the stream appends from then on stays beside the
//!   new rows: nothing is lost, nothing twice. Views that close by time never append there.
//!
//! Where no stream ever wrote, the table is made, as nobody's, and `to` is clipped to what the backup has final, if it
//! says so.
//!
//! **Refused** are sinks whose rows have no time, or change (`mode`); other connectors; look-ups in Redis, which has no
//! history; and the backup itself. Online stores are in no plan here.

mod compute;
mod prepare;
mod resume;
mod snapshots;

use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt};

use crate::connectors::delta::replace::Pinned;
pub use crate::connectors::delta::replace::{Finished, Interval};
use crate::error::{Error, Result};
use crate::plan::reach::Reach;
use crate::sql::Catalog;
use crate::stream::Micros;
use compute::Job;
use prepare::{Cut, Prepared};
use resume::Resume;
use snapshots::Snapshots;

/// Commits after which a table that no stream looks after gets a checkpoint of its log.
const COMMITS_PER_CHECKPOINT: usize = 20;

/// State snapshots that are kept if nobody says how many.
pub const SNAPSHOTS: usize = 3;

#[derive(Debug, Clone)]
pub struct Options {
    pub from: Micros,
    pub to: Micros,
    pub step: Micros,
    /// Intervals computed at the same time; commits are made one after the other.
    pub parallel: usize,
    /// Finished intervals too.
    pub force: bool,
    /// Plans, and writes nothing.
    pub dry_run: bool,
    /// How long the backup may lag behind the sink.
    pub wait: Duration,
    /// Bytes beyond which sorts and aggregations spill, shared by the intervals computed at the same time.
    pub memory: Option<u64>,
    /// State snapshots of unbounded frames that are kept; 0: none is made, none is used.
    pub snapshots: usize,
}

/// What is about to be done.
#[derive(Debug, Clone)]
pub struct Outline {
    pub sink: String,
    pub location: String,
    /// The source whose backup is read.
    pub source: String,
    /// `None`: a backup that has no versions.
    pub backup_version: Option<u64>,
    pub reach: Reach,
    /// `to` as asked for, where it is cut off, and why.
    pub clipped: Option<Clipped>,
    /// A stream writes the sink.
    pub streamed: bool,
    /// Intervals are computed one after the other, each from the state at the end of the one before.
    pub chained: bool,
    pub intervals: Vec<Planned>,
}

#[derive(Debug, Clone)]
pub struct Clipped {
    pub asked: Micros,
    pub to: Micros,
    pub why: &'static str,
}

#[derive(Debug, Clone)]
pub struct Planned {
    pub interval: Interval,
    /// Rows of the source from this event time on are read; `None`: from the start.
    pub reads_from: Option<Micros>,
    pub start: Start,
    /// What the ledger says, when there is nothing to do.
    pub finished: Option<Finished>,
}

/// From where an interval is computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// From where its look-back reaches.
    Reach,
    /// From the state at this time.
    Snapshot {
        at: Micros,
        /// Why it is not a later one.
        passed_over: Option<String>,
    },
    /// From the start of history, as there is no state to start from: why.
    History(String),
}

/// What computes the rows.
enum Method<'a> {
    /// No frame is unbounded.
    Reach,
    Resume(Box<Resume<'a>>),
    /// Each interval reads all history: why.
    History(&'static str),
}

impl<'a> Method<'a> {
    async fn of(prepared: &'a Prepared<'_>, cut: &Cut, keep: usize) -> Result<Self> {
        if prepared.reach.ahead.is_some() {
            return Ok(Self::Reach);
        }
        if keep == 0 {
            return Ok(Self::History("no snapshot is wanted (--snapshots 0)"));
        }
        if cut.log().is_none() {
            return Ok(Self::History("no snapshot is made: the backup has no versions"));
        }
        let shape = match prepared.shape() {
            Ok(shape) => shape,
            Err(why) => return Ok(Self::History(why)),
        };
        let snapshots = Snapshots::open(prepared, &shape, cut, keep).await?;
        Ok(Self::Resume(Box::new(Resume { shape, snapshots })))
    }

    /// `soon`: the end of an interval that is computed before.
    fn start(&self, from: Micros, soon: Option<Micros>) -> Start {
        match self {
            Self::Reach => Start::Reach,
            Self::Resume(resume) => resume.snapshots.start(from, soon),
            Self::History(why) => Start::History((*why).to_owned()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Written,
    /// It was finished before.
    Unchanged,
    /// A dry run.
    Planned,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Unchanged => "unchanged",
            Self::Planned => "planned",
        }
    }
}

/// An interval that is through.
#[derive(Debug, Clone)]
pub struct Done {
    pub interval: Interval,
    pub rows_before: Option<u64>,
    pub rows_after: Option<u64>,
    pub seconds: f64,
    /// Of the table, with the rows in it.
    pub version: Option<u64>,
    pub status: Status,
    /// What was read for it, where it is computed from states.
    pub read: Option<Read>,
}

#[derive(Debug, Clone)]
pub struct Read {
    /// Of the backup.
    pub rows: u64,
    pub start: Start,
}

impl Done {
    fn without_work(planned: &Planned) -> Self {
        let finished = planned.finished.as_ref();
        let rows = finished.and_then(|finished| finished.rows).and_then(|rows| u64::try_from(rows).ok());
        let status = if finished.is_some() { Status::Unchanged } else { Status::Planned };
        let interval = planned.interval;
        let (rows_before, rows_after) = (rows, rows);
        Self { interval, rows_before, rows_after, seconds: 0.0, version: None, status, read: None }
    }
}

/// What happens meanwhile.
#[derive(Debug)]
pub enum Event<'a> {
    Outline(&'a Outline),
    /// The backup lacks rows that the sink has read.
    Waiting,
    /// So many rows more are computed.
    Rows(u64),
    /// Somebody else's commit came between: the interval is committed, or begun, again.
    Again(Interval, &'a str),
    Done(&'a Done),
}

pub type Listener<'a> = &'a (dyn Fn(Event<'_>) + Send + Sync);

/// Says before each commit, behind the look at the table that it is made from, whether it may still be made.
#[async_trait]
pub trait Permit: Send + Sync {
    /// # Errors
    /// It may not.
    async fn ask(&self) -> Result<()>;
}

/// Backfills a sink of a pipeline named `name`.
///
/// # Errors
/// User: a sink that cannot be backfilled, or nothing to do before what is final. External: a store failed; finished
/// intervals stay, and running it again goes on behind them.
pub async fn run(
    catalog: &Catalog,
    name: &str,
    sink: &str,
    options: &Options,
    listener: Listener<'_>,
) -> Result<Vec<Done>> {
    run_permitted(catalog, name, sink, options, listener, None).await
}

/// # Errors
/// User: the sink cannot be backfilled.
pub async fn check(catalog: &Catalog, sink: &str) -> Result<()> {
    prepare::check(catalog, sink).await
}

/// [`run`] for a process that another one may take over from.
///
/// # Errors
/// Those of [`run`] and of `permit`.
pub async fn run_permitted(
    catalog: &Catalog,
    name: &str,
    sink: &str,
    options: &Options,
    listener: Listener<'_>,
    permit: Option<&dyn Permit>,
) -> Result<Vec<Done>> {
    let prepared = Prepared::new(catalog, name, sink).await?;
    let pinned: Option<Pinned> = prepared.table.pin().await?;
    let cut = prepared.cut(pinned.as_ref(), options.wait, listener).await?;
    let method = Method::of(&prepared, &cut, options.snapshots).await?;
    let outline = prepared.outline(pinned.as_ref(), &cut, &method, options).await?;
    listener(Event::Outline(&outline));
    if options.dry_run {
        return Ok(outline.intervals.iter().map(Done::without_work).collect());
    }
    if pinned.is_none() {
        prepared.table.create().await?;
    }
    let job = Job::new(&prepared, &cut, &method, pinned.as_ref(), options, listener).permitted(permit);
    let each = |planned: Planned| {
        let job = &job;
        async move {
            let done = match planned.finished {
                Some(_) => Done::without_work(&planned),
                None => job.interval(planned.interval).await?,
            };
            listener(Event::Done(&done));
            Ok::<_, Error>(done)
        }
    };
    let intervals = futures::stream::iter(outline.intervals.clone()).map(each);
    let at_once = if outline.chained { 1 } else { options.parallel.max(1) };
    let done: Vec<Done> = intervals.buffered(at_once).try_collect().await?;
    let written = done.iter().filter(|done| done.status == Status::Written).count();
    // Where a stream writes, its upkeep sees to it.
    if written >= COMMITS_PER_CHECKPOINT
        && !outline.streamed
        && let Err(error) = crate::connectors::delta::table::checkpoint(&outline.location).await
    {
        tracing::warn!(%error, "no checkpoint was written; readers replay more of the log");
    }
    Ok(done)
}
