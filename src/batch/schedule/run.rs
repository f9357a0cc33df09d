//! One process that runs the schedules of a pipeline: the I/O around [`super::decide`].

use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::try_join_all;
use tokio::sync::{Semaphore, watch};

use super::decide::{Asker, Entry, Now, Outcome, Run, State, Step, Task, ended, next};
use super::{FOLDER, Recorded, insert, parse};
use crate::batch::backfill::Permit;
use crate::batch::{World, backfill};
use crate::connectors::files;
use crate::error::{Domain, Error, Result};
use crate::sql::{CreateSchedule, ScheduleAction};
use crate::state::journal::{Appended, Journal, Journals};
use crate::stream::clock::Clock;
use crate::stream::{Micros, crash};

/// A sleep is never longer, as a clock may be set and a machine may be suspended.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// Pause after the state could not be reached.
const OUTAGE: Duration = Duration::from_secs(5);
/// How long a backfill waits for a backup that lags behind.
const WAIT: Duration = Duration::from_secs(60);
const DAY: Micros = 86_400_000_000;

#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the pipeline.
    pub name: String,
    pub state: String,
    /// Ends when nothing is due.
    pub once: bool,
    /// Runs of different schedules at the same time.
    pub parallel: usize,
    /// For how long a process may say nothing before its run counts as lost.
    pub lease: Duration,
    /// Of all runs together: bytes beyond which sorts and aggregations spill.
    pub memory: Option<u64>,
    /// Added to the clock.
    pub shift: Micros,
}

/// What happens meanwhile.
#[derive(Debug)]
pub enum Event<'a> {
    /// A schedule that was not known, and when it fires first.
    Begins(&'a str, Option<Micros>),
    /// Nothing is due before then; `true`: a run that failed is tried again then.
    Next(&'a str, Micros, bool),
    /// Another process runs it.
    Watching(&'a str),
    Started(&'a str, &'a Run),
    Ended(&'a str, &'a Run),
    /// The state cannot be reached, or another process took over; it goes on.
    Trouble(&'a str, &'a Error),
}

pub type Listener<'a> = &'a (dyn Fn(Event<'_>) + Send + Sync);

/// Runs the schedules of a catalog until `stop`, or what is due; gives the runs that this process made.
///
/// # Errors
/// External: the state cannot be reached at the start, or with `once` at any time.
pub async fn run(
    world: &World<'_>,
    options: &Options,
    stop: watch::Receiver<bool>,
    listener: Listener<'_>,
) -> Result<Vec<Recorded>> {
    let located = files::open_private(&options.state)?;
    files::probe(&located).await?;
    let journals = Journals::new(located.store, FOLDER);
    let runner = Runner {
        world,
        options,
        listener,
        writer: uuid::Uuid::new_v4().to_string(),
        slots: Semaphore::new(options.parallel.max(1)),
        made: Mutex::new(Vec::new()),
    };
    let each = world.catalog.schedules.iter().map(|schedule| {
        let journal = journals.journal(&schedule.name);
        runner.follow(schedule, journal, stop.clone())
    });
    try_join_all(each).await?;
    Ok(runner.made.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

struct Runner<'a> {
    world: &'a World<'a>,
    options: &'a Options,
    listener: Listener<'a>,
    writer: String,
    slots: Semaphore,
    made: Mutex<Vec<Recorded>>,
}

/// Whether a schedule is looked at again.
#[derive(PartialEq)]
enum Look {
    Again,
    Enough,
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

impl Runner<'_> {
    fn now(&self) -> Micros {
        Clock.unix_micros().saturating_add(self.options.shift)
    }

    fn asker(&self) -> Asker {
        Asker {
            writer: self.writer.clone(),
            id: uuid::Uuid::new_v4().to_string(),
            now: self.now(),
            lease_ms: u64::try_from(self.options.lease.as_millis()).unwrap_or(u64::MAX),
        }
    }

    async fn follow(
        &self,
        schedule: &CreateSchedule,
        journal: Journal,
        mut stop: watch::Receiver<bool>,
    ) -> Result<()> {
        let mut line = Line { journal, known: 0, said: None };
        loop {
            if *stop.borrow() {
                return Ok(());
            }
            match self.look(schedule, &mut line, &mut stop).await {
                Ok(Look::Again) => {}
                Ok(Look::Enough) => return Ok(()),
                // Another process has the run: what it does is looked at.
                Err(error) if error.domain() == Domain::Fenced => {
                    (self.listener)(Event::Trouble(&schedule.name, &error));
                }
                Err(error) if error.domain() == Domain::External && !self.options.once => {
                    (self.listener)(Event::Trouble(&schedule.name, &error));
                    tokio::select! {
                        () = stopped(&mut stop) => return Ok(()),
                        () = tokio::time::sleep(OUTAGE) => {}
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One step.
    async fn look(
        &self,
        schedule: &CreateSchedule,
        line: &mut Line,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<Look> {
        let newest = line.newest().await?;
        let number = newest.as_ref().map_or(0, |(number, _)| *number);
        let last = newest.map(|(_, entry)| entry);
        let name = &schedule.name;
        match next(schedule, last.as_ref(), &self.asker())? {
            Step::Note(entry) => {
                if self.append(line, number + 1, &entry).await? == Appended::Mine {
                    match &entry.run {
                        Some(run) => self.ended(name, run),
                        None => {
                            let first = schedule.calendar.fires_after(entry.settled).next();
                            (self.listener)(Event::Begins(name, first));
                        }
                    }
                }
            }
            Step::Watch { lease_ms } => {
                line.say((number, State::Running), || (self.listener)(Event::Watching(name)));
                let lease = Duration::from_millis(lease_ms);
                let gone = tokio::select! {
                    () = stopped(stop) => return Ok(Look::Enough),
                    gone = line.watch(number, lease) => gone?,
                };
                if let (true, Some(claim)) = (gone, &last) {
                    let why = format!("nothing was heard of it for {} s", lease.as_secs_f64());
                    let entry = ended(schedule, claim, Outcome::Lost(why), &self.asker())?;
                    if self.append(line, number + 1, &entry).await? == Appended::Mine
                        && let Some(run) = &entry.run
                    {
                        self.ended(name, run);
                    }
                }
            }
            Step::Start(_) => {
                let slot = tokio::select! {
                    () = stopped(stop) => return Ok(Look::Enough),
                    slot = self.slots.acquire() => slot,
                };
                let _slot = slot.map_err(|_| Error::internal("the slots of the schedules are closed"))?;
                // It may have waited for its slot: the time is another one.
                let Step::Start(claim) = next(schedule, last.as_ref(), &self.asker())? else {
                    return Ok(Look::Again);
                };
                crash::point("schedule.claim.before");
                if self.append(line, number + 1, &claim).await? == Appended::Mine {
                    crash::point("schedule.claim.after");
                    return self.attempt(schedule, line, number + 1, &claim, stop).await;
                }
            }
            Step::Sleep { until, retry } => {
                line.say((number, State::Skipped), || (self.listener)(Event::Next(name, until, retry)));
                if self.options.once {
                    return Ok(Look::Enough);
                }
                let left = u64::try_from(until - self.now()).unwrap_or(0);
                tokio::select! {
                    () = stopped(stop) => return Ok(Look::Enough),
                    () = tokio::time::sleep(Duration::from_micros(left).min(LONGEST_SLEEP)) => {}
                }
            }
        }
        Ok(Look::Again)
    }

    async fn append(&self, line: &mut Line, number: u64, entry: &Entry) -> Result<Appended> {
        let json = serde_json::to_vec_pretty(entry)
            .map_err(|error| Error::internal("an entry of a journal cannot be written").because(error))?;
        line.journal.append(number, &Bytes::from(json)).await
    }

    /// Runs what a claim says, and records how it ended.
    async fn attempt(
        &self,
        schedule: &CreateSchedule,
        line: &mut Line,
        number: u64,
        claim: &Entry,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<Look> {
        let (Now::Running { task, .. }, Some(run)) = (&claim.now, &claim.run) else {
            return Err(Error::internal("a claim claims nothing"));
        };
        (self.listener)(Event::Started(&schedule.name, run));
        let journal = &line.journal;
        let outcome = tokio::select! {
            biased;
            done = self.work(schedule, task, journal, number) => match done {
                Ok((rows, reached)) => Outcome::Succeeded { rows, reached },
                Err(error) if error.domain() == Domain::Fenced => return Err(error),
                Err(error) => Outcome::Failed(one_line(&error)),
            },
            lost = self.beats(journal, number) => match lost.domain() {
                Domain::Fenced => return Err(lost),
                _ => Outcome::Lost(one_line(&lost)),
            },
            () = stopped(stop) => Outcome::Stopped,
        };
        let look = if outcome == Outcome::Stopped { Look::Enough } else { Look::Again };
        let entry = ended(schedule, claim, outcome, &self.asker())?;
        crash::point("schedule.end.before");
        match self.append(line, number + 1, &entry).await? {
            Appended::Mine => {
                crash::point("schedule.end.after");
                line.journal.quiet(number).await;
                if let Some(run) = &entry.run {
                    self.ended(&schedule.name, run);
                }
                Ok(look)
            }
            Appended::Other => {
                Err(Error::fenced("another process took the run over; how it ended here is not recorded"))
            }
        }
    }

    fn ended(&self, schedule: &str, run: &Run) {
        (self.listener)(Event::Ended(schedule, run));
        let mut made = self.made.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        made.push((schedule.to_owned(), run.clone()));
    }

    /// Says that the run goes on until it may not: ends when another process owns it, or when nothing could be said for
    /// so long that another one might.
    async fn beats(&self, journal: &Journal, number: u64) -> Error {
        let lease = self.options.lease;
        let mut heard = Clock.instant();
        for count in 0_u64.. {
            let begun = Clock.instant();
            let beat = async {
                journal.check(number).await?;
                journal.beat(number, format!("{} {count}\n", self.writer)).await
            };
            match tokio::time::timeout(lease / 2, beat).await {
                Ok(Ok(())) => heard = begun,
                Ok(Err(error)) if error.domain() == Domain::Fenced => return error,
                Ok(Err(_)) | Err(_) => {}
            }
            if Clock.instant().duration_since(heard) > lease * 3 / 4 {
                break;
            }
            tokio::time::sleep(lease / 5).await;
        }
        Error::external("the state could not be reached for the time of the lease")
    }

    /// Rows, and up to where they are, if that is not the end of the interval.
    async fn work(
        &self,
        schedule: &CreateSchedule,
        task: &Task,
        journal: &Journal,
        number: u64,
    ) -> Result<(u64, Option<Micros>)> {
        let memory = self.options.memory.map(|bytes| bytes / self.options.parallel.max(1) as u64);
        let permit = Owned { journal, number };
        match &schedule.action {
            ScheduleAction::Insert(statement) => {
                let (world, name) = (self.world, &self.options.name);
                let interval = (task.from, task.to);
                let rows = insert::run(world, name, schedule, statement, interval, memory, &permit).await?;
                Ok((rows, None))
            }
            ScheduleAction::Backfill { sink, last_micros, .. } => {
                let whole = task.to - task.from;
                let options = backfill::Options {
                    from: task.from,
                    to: task.to,
                    // A local day may have 25 hours.
                    step: if whole > DAY * 3 / 2 { DAY } else { whole },
                    parallel: 1,
                    force: false,
                    dry_run: false,
                    wait: WAIT,
                    memory,
                    snapshots: backfill::SNAPSHOTS,
                };
                let clipped = Mutex::new(None);
                let listener = |event: backfill::Event<'_>| {
                    if let backfill::Event::Outline(outline) = event {
                        let to = outline.clipped.as_ref().map(|clipped| clipped.to);
                        *clipped.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = to;
                    }
                };
                let (catalog, name) = (self.world.catalog, &self.options.name);
                let done =
                    backfill::run_permitted(catalog, name, sink, &options, &listener, Some(&permit)).await?;
                let rows = done.iter().filter_map(|done| done.rows_after).sum();
                let clipped = clipped.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
                let unit = schedule.calendar.unit_of(*last_micros);
                let reached = clipped.and_then(|to| schedule.calendar.truncate(to, unit));
                Ok((rows, reached))
            }
        }
    }
}

/// A claim, as long as nobody took over.
struct Owned<'a> {
    journal: &'a Journal,
    number: u64,
}

#[async_trait]
impl Permit for Owned<'_> {
    async fn ask(&self) -> Result<()> {
        self.journal.check(self.number).await
    }
}

/// An error as a cell of a table.
fn one_line(error: &Error) -> String {
    let mut text = error.to_string().replace('\n', " ");
    if let Some(hint) = error.hint_text() {
        text = format!("{text}. {hint}");
    }
    text
}

/// A journal, and what was seen of it.
struct Line {
    journal: Journal,
    known: u64,
    /// What was last said of which entry: it is said once.
    said: Option<(u64, State)>,
}

impl Line {
    async fn newest(&mut self) -> Result<Option<(u64, Entry)>> {
        let Some((number, bytes)) = self.journal.newest(self.known).await? else { return Ok(None) };
        self.known = number;
        Ok(Some((number, parse(&bytes)?)))
    }

    fn say(&mut self, what: (u64, State), say: impl FnOnce()) {
        if self.said.as_ref() != Some(&what) {
            self.said = Some(what);
            say();
        }
    }

    /// Waits for the end of another process's run, or of its lease: true.
    async fn watch(&self, number: u64, lease: Duration) -> Result<bool> {
        let mut seen: Option<Bytes> = None;
        let mut heard = Clock.instant();
        loop {
            if self.journal.check(number).await.is_err_and(|error| error.domain() == Domain::Fenced) {
                return Ok(false);
            }
            let pulse = self.journal.pulse(number).await?;
            if pulse != seen {
                seen = pulse;
                heard = Clock.instant();
            }
            if Clock.instant().duration_since(heard) > lease {
                return Ok(true);
            }
            tokio::time::sleep((lease / 8).min(Duration::from_secs(2))).await;
        }
    }
}
