//! What a backfill reads and writes, and which intervals there are to do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use datafusion::catalog::TableProvider;
use deltalake_core::logstore::LogStoreRef;

use super::{Clipped, Event, Finished, Interval, Listener, Method, Options, Outline, Planned};
use crate::batch::history::{self, Backup, backup_of};
use crate::connectors::delta::entries::{Added, added};
use crate::connectors::delta::ledger;
use crate::connectors::delta::replace::{Pinned, Replacer, progress};
use crate::connectors::delta::{DeltaConfig, Mode};
use crate::connectors::partition::time_text;
use crate::error::{Error, Result};
use crate::plan::lower::Emission;
use crate::plan::reach::Reach;
use crate::plan::session::{batch_session, stream_session};
use crate::plan::source::all_sources;
use crate::plan::views::quoted;
use crate::plan::{NodeId, NodeKind, SinkKind, SinkPlan, SourcePlan, StreamPlan};
use crate::sql::{Catalog, SinkInput};
use crate::stream::Micros;

/// How often a backup that lags behind is looked at.
const POLL: Duration = Duration::from_millis(500);
const MAX_INTERVALS: i64 = 100_000;

/// One sink of a pipeline, and the backup below it.
pub struct Prepared<'a> {
    pub catalog: &'a Catalog,
    /// The sink and the backup, nothing else.
    pub plan: StreamPlan,
    pub sources: BTreeMap<String, Arc<SourcePlan>>,
    pub source: SourcePlan,
    pub sink: SinkPlan,
    pub time: String,
    pub reach: Reach,
    pub table: Replacer,
    location: String,
    backup: Backup,
    /// The sink that writes the backup, and whether it stores which record a row comes from.
    written_by: Option<(String, bool)>,
    /// Rows close by time: the stream appends none to an old interval.
    closes: bool,
    fingerprint: String,
}

/// The rows of the backup that count.
pub struct Cut {
    /// The source's rows; `None`: they are opened by each who reads them.
    pub provider: Option<Arc<dyn TableProvider>>,
    pub version: Option<u64>,
    /// Of the backup, as Delta names it.
    pub table_id: String,
    /// (topic, partition, next offset).
    pub offsets: Vec<(String, i32, i64)>,
    /// µs: the backup gets no row on time below it.
    complete_until: Option<Micros>,
    /// It has everything that the sink has read.
    covers: bool,
    log: Option<(String, LogStoreRef)>,
}

impl Cut {
    /// Location and log of the backup, if it has versions.
    pub fn log(&self) -> Option<(&str, &LogStoreRef)> {
        self.log.as_ref().map(|(location, log)| (location.as_str(), log))
    }
}

impl<'a> Prepared<'a> {
    /// # Errors
    /// User: the sink cannot be backfilled.
    pub async fn new(catalog: &'a Catalog, name: &str, sink: &str) -> Result<Self> {
        let plan = crate::plan::sinks::plan(catalog, &[sink.to_owned()]).await?;
        let declared = catalog.sink(sink).ok_or_else(|| Error::internal("a planned sink is not declared"))?;
        let refuse = |message: String, hint: &str| {
            Error::user(format!("sink {sink}: {message}")).hint(hint).at(declared.place.clone())
        };
        let found = plan.sinks().find(|(_, planned)| planned.name == sink);
        let (id, planned) = found.ok_or_else(|| Error::internal("a planned sink is not in its plan"))?;
        let (config, time, reach) =
            checked(&plan, id, planned).map_err(|(message, hint)| refuse(message, hint))?;
        if let Some(other) = shared(catalog, sink, config).await {
            let hint =
                "Rows of an interval cannot be told apart by sink: give each sink a location of its own.";
            return Err(refuse(format!("the sink {other} writes {} too", config.location), hint));
        }
        let (_, source) = plan.source().ok_or_else(|| refuse("it reads no source".into(), "Read one."))?;
        let with_backup = with_backup(catalog, sink, source).await?;
        let backup = backup_of(catalog, &with_backup, source)?;
        let location = match &backup {
            Backup::Delta(location) => Some(location.clone()),
            Backup::Table(_) => None,
        };
        if location.as_ref() == Some(&config.location) {
            let hint = "Backfill the sinks that read views; a backup has the rows that its stream wrote.";
            return Err(refuse("it is the backup that a backfill would read".into(), hint));
        }
        let writer = with_backup.sinks().find(|(_, other)| match &other.kind {
            SinkKind::Delta(other) => Some(&other.location) == location.as_ref(),
            _ => false,
        });
        let written_by =
            writer.map(|(_, sink)| (sink.name.clone(), sink.schema.column_with_name("_offset").is_some()));
        let table = Replacer::open(config, &planned.schema, &time, name, sink).await?;
        Ok(Self {
            catalog,
            sources: all_sources(&stream_session()?, catalog)?,
            source: source.clone(),
            sink: planned.clone(),
            table,
            time,
            reach,
            location: config.location.clone(),
            backup,
            written_by,
            closes: closes(&plan, id),
            fingerprint: plan.fingerprint(id),
            plan: with_backup,
        })
    }

    /// Of the sink's table.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// Whether the backup is known to say which record a row comes from.
    pub fn has_offsets(&self) -> bool {
        self.written_by.as_ref().is_some_and(|(_, offsets)| *offsets)
    }

    /// Whether the backup must be read exactly as far as the sink's commits are.
    pub fn by_offset(&self, pinned: Option<&Pinned>) -> bool {
        pinned.is_some_and(|pinned| pinned.state_id.is_some()) && !self.closes
    }

    /// Stands for the SQL, and for the state that owns the table.
    pub fn fingerprint(&self, pinned: Option<&Pinned>) -> i64 {
        let owner = pinned.and_then(|pinned| pinned.state_id.as_deref());
        ledger::fingerprint(&self.fingerprint, owner)
    }

    /// Pins the backup, once it has what the pinned sink has read.
    ///
    /// # Errors
    /// User: the backup cannot be read. External: a store failed, or there is no backup.
    pub async fn cut(&self, pinned: Option<&Pinned>, wait: Duration, listener: Listener<'_>) -> Result<Cut> {
        let read = pinned.map(Pinned::offsets).unwrap_or_default();
        let Backup::Delta(location) = &self.backup else {
            return Ok(Cut {
                provider: None,
                version: None,
                table_id: String::new(),
                offsets: read,
                complete_until: None,
                covers: true,
                log: None,
            });
        };
        let by_offset = self.by_offset(pinned);
        if by_offset && !self.has_offsets() {
            let message = format!(
                "sink {}: its stream appends late rows at any time, and the backup does not say which record a row comes from",
                self.sink.name
            );
            let hint = "Store the metadata columns in the backup: leave metadata = 'none' out.";
            return Err(Error::user(message).hint(hint));
        }
        let writer = self.written_by.as_ref().map(|(name, _)| name.as_str()).unwrap_or_default();
        let mut left = wait.as_millis() / POLL.as_millis();
        let (backup, log, covers) = loop {
            let Some((backup, log)) = progress(location, writer).await? else {
                let hint = "It appears when the pipeline commits its first rows.";
                return Err(Error::external(format!("there is no backup at {location} yet")).hint(hint));
            };
            // Of a table that another program writes nothing is known.
            let covers = backup.offsets.is_empty() || covers(&backup.offsets, &read);
            if covers || left == 0 {
                break (backup, log, covers);
            }
            left -= 1;
            listener(Event::Waiting);
            tokio::time::sleep(POLL).await;
        };
        if by_offset && !covers {
            let message = format!("the backup {location} lacks rows that the sink {} has", self.sink.name);
            return Err(
                Error::external(message).hint("Start the pipeline that writes the backup, and try again.")
            );
        }
        let (session, offsets) = (batch_session()?, if by_offset { read } else { backup.offsets });
        let below = by_offset.then(|| offsets.clone());
        let rows = history::Cut { version: Some(backup.version), below, without: None };
        history::register(&session, self.catalog, &self.plan, &self.source, &rows).await?;
        Ok(Cut {
            provider: Some(session.table_provider(quoted(&self.source.name)).await?),
            version: Some(backup.version),
            table_id: backup.table_id,
            offsets,
            complete_until: backup.complete_until,
            covers,
            log: Some((location.clone(), log)),
        })
    }

    /// # Errors
    /// User: nothing of it is final. External: a store failed.
    pub async fn outline(
        &self,
        pinned: Option<&Pinned>,
        cut: &Cut,
        method: &Method<'_>,
        options: &Options,
    ) -> Result<Outline> {
        let (asked, from) = (options.to, options.from);
        if asked <= from {
            let message = format!("--to {} is not after --from {}", time_text(asked), time_text(from));
            return Err(Error::user(message).hint("An interval is from (included) to (excluded)."));
        }
        let limit = self.limit(pinned, cut)?;
        let clipped = limit.filter(|(limit, _)| *limit < asked).map(|(to, why)| Clipped { asked, to, why });
        let to = clipped.as_ref().map_or(asked, |clipped| clipped.to);
        if let Some(Clipped { to, why, .. }) = clipped.as_ref().filter(|clipped| clipped.to <= from) {
            let message = format!("sink {}: nothing from {} on is complete", self.sink.name, time_text(from));
            let hint = format!("{why}: {}. Give an interval before it, or wait.", time_text(*to));
            return Err(Error::user(message).hint(hint));
        }
        let step = options.step.max(1);
        if (to - from) / step >= MAX_INTERVALS {
            let message = format!("these are more than {MAX_INTERVALS} intervals");
            return Err(Error::user(message).hint("Take a longer --step, such as 1d."));
        }
        let starts = (0..).map(|n: i64| from + n * step).take_while(|start| *start < to);
        let all: Vec<Interval> =
            starts.map(|start| Interval { from: start, to: start.saturating_add(step).min(to) }).collect();
        let finished = match options.force {
            true => vec![None; all.len()],
            false => self.finished(pinned, cut, &all).await?,
        };
        let mut soon = None;
        let planned = |(interval, finished): (Interval, Option<Finished>)| {
            let start = method.start(interval.from, soon);
            soon = if finished.is_none() { Some(interval.to) } else { soon };
            Planned { interval, reads_from: self.reads(interval).0, start, finished }
        };
        Ok(Outline {
            sink: self.sink.name.clone(),
            location: self.location.clone(),
            source: self.source.name.clone(),
            backup_version: cut.version,
            reach: self.reach,
            clipped,
            streamed: pinned.is_some_and(|pinned| pinned.state_id.is_some()),
            chained: matches!(method, Method::Resume(_)),
            intervals: all.into_iter().zip(finished).map(planned).collect(),
        })
    }

    /// Up to where rows are complete, and by whose word.
    fn limit(&self, pinned: Option<&Pinned>, cut: &Cut) -> Result<Option<(Micros, &'static str)>> {
        // The rows of a window have its start as their time.
        let back = if self.reach.back > 0 { self.reach.back - 1 } else { 0 };
        let of_backup = cut.complete_until.map(|until| (until - back, "the backup is complete until there"));
        let Some(stream) = pinned.filter(|pinned| pinned.state_id.is_some()) else { return Ok(of_backup) };
        let Some(until) = stream.complete_until() else {
            let message = format!("sink {}: its stream has committed no final row yet", self.sink.name);
            return Err(Error::user(message).hint("Its own rows come first: wait for its first checkpoints."));
        };
        let own = (until, "rows from there on are the stream's (complete_until of the sink)");
        let lagging = of_backup.filter(|(until, _)| !cut.covers && *until < own.0);
        Ok(Some(lagging.unwrap_or(own)))
    }

    /// Event times of the source's rows that an interval sees: from, to.
    pub fn reads(&self, interval: Interval) -> (Option<Micros>, Micros) {
        let from = self.reach.ahead.map(|ahead| interval.from.saturating_sub(ahead));
        (from, interval.to.saturating_add(self.reach.back))
    }

    /// What the ledger says of each interval that needs nothing.
    async fn finished(
        &self,
        pinned: Option<&Pinned>,
        cut: &Cut,
        intervals: &[Interval],
    ) -> Result<Vec<Option<Finished>>> {
        let none = || Ok(vec![None; intervals.len()]);
        let (Some(pinned), Some((location, log)), Some(version)) = (pinned, cut.log(), cut.version) else {
            return none();
        };
        let (ledger, fingerprint) = (pinned.ledger(), self.fingerprint(Some(pinned)));
        let known: Vec<Option<Finished>> =
            intervals.iter().map(|interval| computed(&ledger, *interval, fingerprint)).collect();
        let Some(oldest) = known.iter().flatten().filter_map(|known| known.backup_version).min() else {
            return none();
        };
        let Some(time) = self.source.event_time.filter(|_| oldest <= version) else { return none() };
        let time = self.source.schema.field(time).name();
        let Some(grown) = added(location, log, oldest, version, time).await? else { return none() };
        let holds = |(interval, known): (&Interval, Option<Finished>)| {
            let (from, to) = self.reads(*interval);
            let seen = Interval { from: from.unwrap_or(Micros::MIN), to };
            known.filter(|known| unchanged(known, &grown, seen))
        };
        Ok(intervals.iter().zip(known).map(holds).collect())
    }
}

/// The newest time that an interval was computed by this SQL, if no other SQL came over it since.
pub fn computed(ledger: &[Finished], interval: Interval, fingerprint: i64) -> Option<Finished> {
    let same = |known: &&Finished| known.fingerprint == fingerprint && known.interval.covers(&interval);
    let known = ledger.iter().filter(same).max_by_key(|known| known.turn)?;
    let later = |other: &Finished| other.turn > known.turn && other.interval.overlaps(&interval);
    let spoilt = ledger.iter().any(|other| later(other) && other.fingerprint != fingerprint);
    (!spoilt).then(|| known.clone())
}

/// Whether the backup got no row since that the interval sees.
fn unchanged(known: &Finished, grown: &[Added], seen: Interval) -> bool {
    let Some(version) = known.backup_version else { return false };
    !grown.iter().any(|added| added.version > version && seen.touches(added.range))
}

fn covers(has: &[(String, i32, i64)], read: &[(String, i32, i64)]) -> bool {
    let next = |topic: &str, partition: i32| {
        has.iter().find(|(t, p, _)| t == topic && *p == partition).map_or(0, |(_, _, next)| *next)
    };
    read.iter().all(|(topic, partition, until)| next(topic, *partition) >= *until)
}

/// # Errors
/// User: the sink cannot be backfilled, as far as the SQL says.
pub async fn check(catalog: &Catalog, sink: &str) -> Result<()> {
    let plan = crate::plan::sinks::plan(catalog, &[sink.to_owned()]).await?;
    let found = plan.sinks().find(|(_, planned)| planned.name == sink);
    let (id, planned) = found.ok_or_else(|| Error::internal("a planned sink is not in its plan"))?;
    let place = catalog.sink(sink).map(|declared| declared.place.clone());
    checked(&plan, id, planned).map(drop).map_err(|(message, hint)| {
        let error = Error::user(format!("sink {sink}: {message}")).hint(hint);
        match place {
            Some(place) => error.at(place),
            None => error,
        }
    })
}

/// What a sink must be to be backfilled; else what is wrong, and what to do.
fn checked<'p>(
    plan: &StreamPlan,
    id: NodeId,
    sink: &'p SinkPlan,
) -> Result<(&'p DeltaConfig, String, Reach), (String, &'static str)> {
    let SinkKind::Delta(config) = &sink.kind else {
        let message = format!("a {} sink cannot be backfilled", sink.kind.connector());
        let hint = "Backfill writes Delta tables; online stores are filled by their stream alone.";
        return Err((message, hint));
    };
    if config.mode != Mode::Append || sink.emission != Emission::Final {
        let message = "its rows change, so no interval of time has them for good".to_owned();
        let hint =
            "Backfill sinks of views that close by time: rows, windows, or GROUP BY over TUMBLE or HOP.";
        return Err((message, hint));
    }
    if plan.reads_letters(id) {
        return Err(("it stores dead letters".into(), "They lie in the state: `millstream dead-letters`."));
    }
    if remote(plan, id) {
        let message = "it looks values up in a Redis, which does not know what they were".to_owned();
        return Err((message, "Backfill views over tables that keep their history."));
    }
    let (Some(time), Some(reach)) = (sink.time, plan.reach(id)) else {
        let message = "its rows have no time by which intervals could be told apart".to_owned();
        let hint = "Select the event time, or window_start of the windows, under any name and unchanged.";
        return Err((message, hint));
    };
    Ok((config, sink.schema.field(time).name().clone(), reach))
}

fn remote(plan: &StreamPlan, id: NodeId) -> bool {
    #[cfg(feature = "redis")]
    if matches!(plan.nodes[id].kind, NodeKind::Remote { .. }) {
        return true;
    }
    plan.nodes[id].inputs.iter().any(|edge| remote(plan, edge.from))
}

fn closes(plan: &StreamPlan, id: NodeId) -> bool {
    matches!(plan.nodes[id].kind, NodeKind::Over(_) | NodeKind::Group(_))
        || plan.nodes[id].inputs.iter().any(|edge| closes(plan, edge.from))
}

/// Another sink of the pipeline that writes the same table.
async fn shared(catalog: &Catalog, sink: &str, config: &DeltaConfig) -> Option<String> {
    let location = |options: &crate::sql::options::Options| options.shown("location");
    let same = catalog.sinks.iter().find(|other| {
        other.name != sink
            && location(&other.options)
                .is_some_and(|at| at.trim_end_matches('/') == config.location.trim_end_matches('/'))
    });
    same.map(|other| other.name.clone())
}

/// The sink and the sinks that may be the source's backup.
async fn with_backup(catalog: &Catalog, sink: &str, source: &SourcePlan) -> Result<StreamPlan> {
    let stores_it =
        |input: &SinkInput| matches!(input, SinkInput::Relation { name, .. } if *name == source.name);
    let backups = catalog.sinks.iter().filter(|other| match &source.history {
        Some(history) => other.name == *history,
        None => stores_it(&other.input),
    });
    let mut names: Vec<String> = backups.map(|other| other.name.clone()).collect();
    names.push(sink.to_owned());
    crate::plan::sinks::plan(catalog, &names).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(from: i64, to: i64, turn: i64, fingerprint: i64) -> Finished {
        let interval = Interval { from, to };
        Finished { interval, turn, fingerprint, rows: None, backup_version: Some(3), finished_at: None }
    }

    #[test]
    fn an_interval_is_finished_until_other_sql_or_new_rows_come_over_it() {
        let day = Interval { from: 10, to: 20 };
        let turn = |ledger: &[Finished]| computed(ledger, day, 1).map(|known| known.turn);
        assert_eq!(turn(&[]), None);
        assert_eq!(turn(&[known(10, 19, 1, 1)]), None, "a part of it");
        assert_eq!(turn(&[known(10, 20, 1, 2)]), None, "other SQL");
        assert_eq!(turn(&[known(0, 30, 1, 1), known(10, 20, 2, 1)]), Some(2));
        assert_eq!(turn(&[known(10, 20, 1, 1), known(19, 30, 2, 2)]), None, "other SQL at its edge");
        assert_eq!(turn(&[known(10, 20, 1, 1), known(20, 30, 2, 2)]), Some(1));
        assert_eq!(turn(&[known(19, 30, 1, 2), known(10, 20, 2, 1)]), Some(2), "other SQL before");
        let seen = Interval { from: 5, to: 20 };
        let grown = |version, range| unchanged(&known(10, 20, 1, 1), &[Added { version, range }], seen);
        assert!(grown(3, Some((10, 10))), "it was read");
        assert!(!grown(4, Some((10, 10))));
        assert!(!grown(4, Some((0, 5))), "in what it looks back at");
        assert!(grown(4, Some((0, 4))) && grown(4, Some((20, 30))));
        assert!(!grown(4, None), "who knows");
    }

    #[test]
    fn a_backup_covers_what_it_has_read_as_far() {
        let at = |p, next| ("t".to_owned(), p, next);
        assert!(covers(&[at(0, 5), at(1, 7)], &[at(1, 7)]));
        assert!(!covers(&[at(0, 5), at(1, 7)], &[at(1, 8)]));
        assert!(!covers(&[at(0, 5)], &[at(0, 5), at(1, 1)]));
        assert!(covers(&[at(0, 5)], &[at(0, 5), at(1, 0)]), "nothing was read of a partition");
    }
}
